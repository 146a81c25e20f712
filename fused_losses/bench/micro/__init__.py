"""Cases of the microbenchmarks: inputs, our ways to compute each, the rivals', the floor."""
