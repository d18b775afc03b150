"""Kernels for GPUs, each the twin of a readable function in `modelwright.nn` and tested against it."""
