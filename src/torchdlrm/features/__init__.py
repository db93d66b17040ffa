"""Defines what a raw value means: schema, cells, transforms, vocabularies, ids. No torch in here."""
