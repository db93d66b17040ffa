"""Dataset and config -> run."""
