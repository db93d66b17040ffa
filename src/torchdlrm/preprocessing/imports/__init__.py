"""Data that others have encoded -> a dataset: ids and floats as they are, checked."""
