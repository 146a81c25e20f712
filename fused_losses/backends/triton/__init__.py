"""The Triton kernels: whether they can run, their launches, what their tiles share."""
