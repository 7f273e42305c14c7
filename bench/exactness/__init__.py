"""Measurements of what is computed, against a reference."""
