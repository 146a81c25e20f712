"""The fused operations: one folder each, with its row through all backends."""
