"""Similarity without its matrix: attention, kernels, transport."""
