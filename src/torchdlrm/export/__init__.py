"""A run -> a bundle: one folder that predicts from raw rows."""
