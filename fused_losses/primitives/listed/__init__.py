"""Scores of listed pairs, and what the rows' lists of them fold into."""
