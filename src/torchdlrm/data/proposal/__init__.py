"""A log -> a schema that reads it, with a reason beside each column, for a user to edit."""
