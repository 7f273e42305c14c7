"""Parsers to be fed with anything."""
