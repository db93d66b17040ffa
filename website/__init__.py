"""Builds the site of the documents: `make site` writes it into build/site."""
