"""Pairs of different classes of the batch, as negatives that every row shares."""
