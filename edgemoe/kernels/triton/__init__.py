"""Kernels for devices, in Triton. Nothing here is imported on a CPU alone."""
