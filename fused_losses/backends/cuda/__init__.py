"""The CUDA C++ kernels: whether they can run, and their launches."""
