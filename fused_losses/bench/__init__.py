"""Microbenchmarks: our ops and their rivals in turn, in one process; ratios and peak memory."""
