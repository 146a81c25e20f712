"""The compiled C++ kernels."""
