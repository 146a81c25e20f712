"""The ground of every room: checks, numbers, files. It imports torch alone."""
