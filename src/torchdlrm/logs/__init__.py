"""Reads raw logs: their files, where they may be cut, and how their cells become typed columns."""
