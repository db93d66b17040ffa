"""Predictions over HTTP and gRPC, and a page."""
