"""Long work cut into runs, so that what is alive at once has a bound."""

from __future__ import annotations

from collections.abc import Iterator


def runs(count: int, size: int) -> Iterator[slice]:
    """Of `count` things, so many at a time."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
