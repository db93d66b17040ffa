"""Speaks HTTP and gRPC: what comes over a socket becomes rows for the service, and its answers go back."""
