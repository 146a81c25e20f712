"""Each loss of the catalogue on one small problem: its surface, its weights, its embedding."""
