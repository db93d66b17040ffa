"""Imports data that others have encoded: ids and floats are checked and stay as they are."""
