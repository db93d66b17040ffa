"""Exact metrics of a trained run."""
