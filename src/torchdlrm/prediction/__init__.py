"""Predicts probabilities from raw rows with a bundle."""
