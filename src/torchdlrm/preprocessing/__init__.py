"""Preprocesses a raw log into a dataset: resumable, in bounded memory."""
