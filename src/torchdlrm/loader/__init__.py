"""Dataset -> batches of tensors."""
