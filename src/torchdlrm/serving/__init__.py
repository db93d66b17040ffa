"""Serves predictions over HTTP and gRPC, and a page."""
