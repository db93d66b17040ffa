"""Computes exact metrics of a trained run."""
