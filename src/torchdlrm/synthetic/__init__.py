"""Synthetic click logs whose truth is known."""
