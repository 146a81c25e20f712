"""Pairs of rows at several widths of the same rows, from one product of the whole width."""
