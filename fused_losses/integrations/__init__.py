"""One line in another library's training: its own classes run on this package's kernels.

    import fused_losses.integrations
    fused_losses.integrations.accelerate("pytorch_metric_learning")

Each peer has a file or folder here with the table of its classes; none is a dependency.
"""

from __future__ import annotations

import importlib

from fused_losses.base.validation import check_choice
from fused_losses.integrations.acceleration import (
    Acceleration as Acceleration,
)
from fused_losses.integrations.acceleration import (
    Peer,
    begin,
)
from fused_losses.integrations.acceleration import (
    PeerRow as PeerRow,
)
from fused_losses.integrations.acceleration import (
    Ran as Ran,
)

PEERS = ("pytorch_metric_learning", "open_clip", "sentence_transformers")


def table(peer: str) -> Peer:
    """The classes of a peer: those accelerated, by what, and those left alone, with the reason.

    peer: one of `PEERS`; it need not be installed. Raises ValueError for another name.
    """
    check_choice("peer", peer, PEERS)
    return importlib.import_module(f"fused_losses.integrations.{peer}").PEER


def accelerate(
    peer: str,
    *,
    strict: bool = False,
    any_version: bool = False,
    backend: str | None = None,
) -> Acceleration:
    """The peer's public classes compute with our ops from here on, results as theirs.

    Args:
        peer: one of `PEERS`.
        strict: raise RuntimeError where an instance or a call is not covered; else the peer's own
            code computes it, and `report()` says so.
        any_version: take a version of the peer that is not among the tested ones.
        backend: as in `fused_losses.functional`, for all calls.

    Returns an `Acceleration`: `undo()` restores the peer's classes, a `with` block does at its end,
    `report()` tells what ran on what. Instances made before and after are the same; parameters and
    state dicts are the peer's. Raises ImportError if the peer is not there, RuntimeError if its
    version is not tested, ValueError for another name. Time and memory: of the functions named in
    `table(peer)`, which hold no N x M matrix.
    """
    return begin(table(peer), strict=strict, any_version=any_version, backend=backend)
