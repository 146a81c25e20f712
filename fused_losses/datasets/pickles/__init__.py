"""The plain values of a pickle, read without running it."""
