"""Materialised PyTorch: the truth."""
