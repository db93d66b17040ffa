"""Exports a run to a bundle, and checks both."""
