"""Bytes and FLOPs of every operation's launches against its floor, without a GPU."""
