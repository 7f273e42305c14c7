"""Kernels over packed weights."""
