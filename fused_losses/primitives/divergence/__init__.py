"""Divergences of two softmaxes over classes, from two score matrices that are never stored."""
