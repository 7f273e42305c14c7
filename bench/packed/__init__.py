"""Packed formats: what they cost, what they save, and how they are made and loaded."""
