"""Searches values for the keys of a config: many runs, of which the best are repeated and compared with the first."""
