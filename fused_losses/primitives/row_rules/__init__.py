"""Each row of scores folded into a few numbers by a rule."""
