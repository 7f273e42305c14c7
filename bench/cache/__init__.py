"""Measurements of memory, the expert cache and the start."""
