"""Packed and quantised weights: how checkpoints have them, and how they are made."""
