"""This machine, the bytes of a model on it, and the performance model with its profile."""
