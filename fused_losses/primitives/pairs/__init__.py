"""Statistics of the rows and columns of a score matrix over pairs, and attention by it."""
