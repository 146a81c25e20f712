"""Steps of an optimiser on some rows of a table, in place."""
