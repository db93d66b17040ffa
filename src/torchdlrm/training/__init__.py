"""Trains a run from a dataset and a config."""
