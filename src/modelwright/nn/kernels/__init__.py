"""Kernels in Triton (GPU) and C++ (CPU), each the twin of a readable function and tested against it."""
