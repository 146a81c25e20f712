"""One file an idea: a loss's function, its memory plan, its example."""
