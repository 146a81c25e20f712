"""The dispatch table: what `auto` tries for an operation on a device, best first, and why.

Bytes are those between L2 and the processors, counted by `fused_losses.bench.roofline`; nothing
here was timed on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple


class Preference(NamedTuple):
    """An order that holds for an operation from a width of rows on."""

    operation: str
    order: tuple[str, ...]
    why: str
    least_width: int = 0  # D
    half: bool = False  # of 16-bit rows alone


ON_GPU = (
    Preference(
        "row_statistics",
        ("triton", "cuda", "bounded"),
        "one sweep: the scores stay in registers; only the backward at D > 256 stores a chunk. On "
        "sm_90, up to D = 512, 256 rows of 16 bits stay resident: W is read D/128 bytes a score",
    ),
    Preference(
        "row_statistics",
        ("cuda", "triton", "bounded"),
        "from sm_90 on a library product of 16-bit rows reads D/64 bytes a score, the sweep's "
        "128 x 256 D/43; storing and reading a float32 score costs 8: even at 1,024, fewer from "
        "2,048 on, where the backward, which stores G either way, is even. On sm_80, whose library "
        "tiles are taken for 128 x 256, the sweep is up to a tenth ahead at all widths. float32 "
        "rows stay with the sweep: split products on tensor cores, the library's are not",
        least_width=2048,
        half=True,
    ),
    Preference(
        "class_rules",
        ("triton", "cuda", "bounded"),
        "one sweep, as of row_statistics; on cuda the rule is PyTorch on a tile of the library's "
        "products, at 8 bytes a score for each of its passes",
    ),
    Preference("pairs", ("triton", "cuda", "bounded"), "one sweep, as of row_statistics"),
    Preference(
        "pairs",
        ("cuda", "triton", "bounded"),
        "tiles of 128 x 64, which is what registers leave room for, read D/21 bytes a pair; the "
        "library D/64, and 12 for a stored score that is read for both sides: fewer from 512 on, "
        "and a third of the bound's time less at 1,024 on sm_90, half on sm_100, a sixth more "
        "on sm_80",
        least_width=1024,
        half=True,
    ),
    Preference("maxsim", ("triton", "cuda", "bounded"), "documents are read once for all queries"),
    Preference("distance_products", ("triton", "cuda", "bounded"), "a product with an epilogue"),
    Preference(
        "distance_sums",
        ("cuda", "bounded"),
        "no product: sums over coordinates of pairs, which registers hold",
    ),
    Preference(
        "topk", ("triton", "cuda", "bounded"), "the best stay in registers as columns stream by"
    ),
    Preference(
        "topk",
        ("cuda", "triton", "bounded"),
        "tiles of 128 x 128 (sm_90) and 128 x 32 (sm_100) against the library's, and 8 bytes a "
        "score: fewer from 1,024 on",
        least_width=1024,
        half=True,
    ),
    Preference(
        "rows", ("cuda", "triton", "bounded"), "triplets are counted a row, in shared memory"
    ),
    Preference(
        "divergence",
        ("triton", "cuda", "bounded"),
        "one sweep of both sides' tiles: neither score is stored; on cuda two library products a "
        "tile, and what is made of them is PyTorch in float64",
    ),
    Preference("row_update", ("cuda", "bounded"), "one pass over the rows that have a gradient"),
)
ON_CPU = ("cpu", "bounded")
OPERATIONS = tuple(dict.fromkeys(e.operation for e in ON_GPU))


def order(operation: str, device: str, width: int = 0, half: bool = False) -> tuple[str, ...]:
    """What `auto` tries for this operation on rows of this width; half: of 16-bit elements."""
    if device == "cpu":
        return ON_CPU
    if device != "cuda":
        return ("bounded",)
    fitting = [
        e for e in ON_GPU if e.operation == operation and e.least_width <= width and half >= e.half
    ]
    return max(fitting, key=lambda e: e.least_width).order
