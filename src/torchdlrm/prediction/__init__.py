"""Raw rows -> probabilities, from a bundle."""
