"""Kernels for CPUs, and the threads that run them."""
