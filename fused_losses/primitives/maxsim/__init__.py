"""The largest product a query token finds in each document, summed."""
