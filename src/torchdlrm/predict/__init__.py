"""A bundle and raw rows -> click probabilities, by the transform code of preprocessing."""
