"""The disk side: raw log -> dataset.  No torch in here."""
