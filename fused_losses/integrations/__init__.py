"""One line in another library's training: its own classes run on this package's kernels.

    import fused_losses.integrations
    fused_losses.integrations.accelerate("pytorch_metric_learning")

Each peer has a file or folder here with the table of its classes; none is a dependency.
"""

from __future__ import annotations

import importlib
from types import ModuleType

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

PEERS = (
    "pytorch_metric_learning",
    "open_clip",
    "sentence_transformers",
    "insightface",
    "grad_cache",
    "pylate",
)
# whose files people copy into their own code
COPIED = ("insightface", "grad_cache", "pylate")


def table(peer: str) -> Peer:
    """The classes of a peer: those accelerated, by what, and those left alone, with the reason.

    peer: one of `PEERS`; it need not be installed. Raises ValueError for another name.
    """
    check_choice("peer", peer, PEERS)
    return importlib.import_module(f"fused_losses.integrations.{peer}").PEER


def _given(given: ModuleType | type) -> Peer:
    """The table of a module or class of the user's own that is a peer's, by its classes' names."""
    named = {given.__name__: given} if isinstance(given, type) else vars(given)
    for peer in COPIED:
        found = table(peer)
        rows = tuple(row for row in found.rows if isinstance(named.get(row.name), type))
        if rows:
            classes = {row.name: named[row.name] for row in rows}
            package = given.__module__ if isinstance(given, type) else given.__name__
            return found._replace(package=package, rows=rows, classes=classes, versions=())
    known = [row.name for peer in COPIED for row in table(peer).rows]
    raise ValueError(
        f"peer: expected one of {', '.join(PEERS)}, or a module or class with one of "
        f"{', '.join(known)}, got {given!r}"
    )


def accelerate(
    peer: str | ModuleType | type,
    *,
    strict: bool = False,
    any_version: bool = False,
    backend: str | None = None,
) -> Acceleration:
    """The peer's public classes compute with our ops from here on, results as theirs.

    Args:
        peer: one of `PEERS`, its package as a module, or a module or class of one's own that is a
            copy of a peer's in `COPIED`: `accelerate(partial_fc_v2)`.
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
    if isinstance(peer, str):
        found = table(peer)
    elif isinstance(peer, ModuleType) and peer.__name__ in PEERS:
        found = table(peer.__name__)
    elif isinstance(peer, ModuleType | type):
        found = _given(peer)
    else:
        raise TypeError(f"peer: expected a name, module or class, got {type(peer).__name__}")
    return begin(found, strict=strict, any_version=any_version, backend=backend)
