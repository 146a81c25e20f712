"""The streamed work over a score matrix: one folder a primitive, with all its forms."""
