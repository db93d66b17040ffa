"""Loads batches of tensors from a dataset."""
