"""Proposes a schema that reads a log, with a reason for each column, for a user to edit."""
