"""This machine, the bytes that a model takes on it, and the performance model with its profile."""
