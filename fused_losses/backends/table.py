"""The dispatch table: what `auto` tries for an operation on a device, best first, and why.

Bytes are those between L2 and the processors, counted by `fused_losses.bench.roofline`; nothing
here was timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """An order that holds for an operation from a width of rows on."""

    operation: str
    order: tuple[str, ...]
    why: str
    least_width: int = 0  # D


ON_GPU = (
    Entry(
        "row_statistics",
        ("triton", "cuda", "bounded"),
        "one sweep: the scores stay in registers; only the backward at D > 256 stores a chunk",
    ),
    Entry(
        "row_statistics",
        ("cuda", "triton", "bounded"),
        "a library product reads 256 x 256 tiles, D/64 bytes a score; the sweep's 128 x 256 read "
        "D/43; storing and reading a float32 score costs 8: even at D = 1024",
        least_width=1024,
    ),
    Entry("pairs", ("triton", "cuda", "bounded"), "one sweep, as of row_statistics"),
    Entry("maxsim", ("triton", "cuda", "bounded"), "documents are read once for all queries"),
    Entry("distance_products", ("triton", "cuda", "bounded"), "a product with an epilogue"),
    Entry(
        "distance_sums",
        ("cuda", "bounded"),
        "no product: sums over coordinates of pairs, which registers hold",
    ),
    Entry("topk", ("triton", "cuda", "bounded"), "the best stay in registers as columns stream by"),
    Entry("rows", ("cuda", "triton", "bounded"), "triplets are counted a row, in shared memory"),
)
ON_CPU = ("cpu", "bounded")
OPERATIONS = tuple(dict.fromkeys(e.operation for e in ON_GPU))


def order(operation: str, device: str, width: int = 0) -> tuple[str, ...]:
    """What `auto` tries for this operation on rows of this width."""
    if device == "cpu":
        return ON_CPU
    if device != "cuda":
        return ("bounded",)
    fitting = [e for e in ON_GPU if e.operation == operation and e.least_width <= width]
    return max(fitting, key=lambda e: e.least_width).order
