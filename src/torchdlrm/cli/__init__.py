"""The `dlrm` command: one command a file."""
