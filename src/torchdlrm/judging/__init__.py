"""Judges models by rows that they have predicted: statistics alone, without torch, datasets or runs."""
