"""Seeds: every use of random numbers has its own."""

from __future__ import annotations

from hashlib import blake2b


def seed_from(*parts: object) -> int:
    """One seed for each use, so that no two streams of random numbers are the same."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest()) >> 1
