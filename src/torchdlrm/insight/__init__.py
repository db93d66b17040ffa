"""Looks into a model: which features it uses, and what its tables hold."""
