"""The `dlrm` command: one verb a file."""
