"""Distances, similarities and nearest neighbours of rows, by metric."""
