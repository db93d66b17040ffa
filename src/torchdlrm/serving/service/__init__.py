"""Predicts rows for many clients at once: batches, limits, swaps, metrics, logs; knows no protocol."""
