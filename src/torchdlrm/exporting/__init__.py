"""A run -> a bundle, and the checks of both."""
