"""Putting a computation of ours in the place of a peer's, reversibly, and telling what ran.

A peer is a library with classes of its own; a row says which method of a class is replaced and by
what. The replacement raises `NotCovered` for what it does not compute as the peer does; the peer's
own method then runs, and the report has the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from types import ModuleType, TracebackType
from typing import Any, NamedTuple


class NotCovered(Exception):
    """A call whose result the peer's own code computes; the message says why."""


class PeerCall(NamedTuple):
    """What a replacement knows beside the method's own arguments."""

    original: Callable[..., Any]
    backend: str | None


class PeerRow(NamedTuple):
    """A method of a peer's public class and what computes in its place."""

    owner: str  # the class, by its path in the package: "losses.CircleLoss"
    method: str
    replacement: Callable[..., Any]  # (call, self, *args, **kwargs)
    runs_on: str  # our function, for the table
    leaves: str = ""  # which instances and calls stay with the peer's code

    @property
    def name(self) -> str:
        return self.owner.rpartition(".")[2]


class Left(NamedTuple):
    """A replacement's result where the peer's own code made the most of it after all."""

    result: Any
    why: str


class Peer(NamedTuple):
    """A library whose classes are accelerated."""

    package: str  # as it is imported
    distribution: str  # as it is installed
    versions: tuple[str, ...]  # tested, by their beginnings; empty: it has none
    rows: tuple[PeerRow, ...]
    left: Mapping[str, str]  # classes left alone, and why
    classes: Mapping[str, type] | None = None  # given by the user; None: imported by their paths

    @property
    def key(self) -> tuple[Any, ...]:
        """What accelerations of the same classes share."""
        return (self.package, *(self.classes or {}).values())


class Ran(NamedTuple):
    """How the calls of one class went."""

    name: str
    accelerated: int
    left: Mapping[str, int]  # reason: calls that the peer's own code computed

    def __str__(self) -> str:
        told = [f"{self.name}: {self.accelerated} accelerated"]
        return "; ".join(told + [f"{n} by the peer: {why}" for why, n in self.left.items()])


class _Patched(NamedTuple):
    owner: type
    method: str
    wrapper: Any
    own: Any  # what stood in the class's own dict, or MISSING


MISSING = object()
_lock = threading.RLock()
_active: dict[tuple[Any, ...], list[Acceleration]] = {}
_patched: dict[tuple[Any, ...], list[_Patched]] = {}


class Acceleration:
    """What `accelerate` returns: a context manager whose end, or `undo()`, restores the peer.

    The patch is of the classes, for all threads. Accelerations of one peer may nest and overlap:
    the classes are the peer's own again when the last of them is undone. The newest one's options
    hold; each counts the calls since it began.
    """

    def __init__(self, peer: Peer, strict: bool, backend: str | None) -> None:
        self.peer, self.strict, self.backend = peer, strict, backend
        self._ran: Counter[str] = Counter()
        self._left: dict[str, Counter[str]] = {}
        with _lock:
            active = _active.setdefault(peer.key, [])
            if not active:
                _patched[peer.key] = _patch(peer)
            active.append(self)

    @property
    def active(self) -> bool:
        with _lock:
            return self in _active.get(self.peer.key, [])

    def undo(self) -> None:
        """Ends this acceleration; a second call does nothing."""
        with _lock:
            active = _active.get(self.peer.key, [])
            if self not in active:
                return
            active.remove(self)
            if not active:
                _restore(_patched.pop(self.peer.key))

    def report(self) -> list[Ran]:
        """What ran since this acceleration began, a line a class, in the order of their names."""
        with _lock:
            names = sorted({*self._ran, *self._left})
            return [Ran(name, self._ran[name], dict(self._left.get(name, {}))) for name in names]

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "active" if self.active else "undone"
        return f"<Acceleration of {self.peer.package}, {state}>"


def _count(key: tuple[Any, ...], name: str, why: str | None) -> None:
    with _lock:
        for each in _active.get(key, []):
            if why is None:
                each._ran[name] += 1
            else:
                each._left.setdefault(name, Counter())[why] += 1


def _wrapper(
    peer: Peer, row: PeerRow, owner: type, owners: frozenset[type], original: Callable[..., Any]
) -> Any:
    key = peer.key

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        newest = _active.get(key, [])[-1:]
        # a class of the table that comes here by super() is computed by the peer already
        if not newest or (type(self) is not owner and type(self) in owners):
            return original(self, *args, **kwargs)
        (options,) = newest
        name, result, why = type(self).__name__, None, None
        try:
            if type(self) is not owner:
                # it may compute something else with what it inherits
                raise NotCovered(f"a class of its own, from {owner.__name__}")
            result = row.replacement(PeerCall(original, options.backend), self, *args, **kwargs)
        except NotCovered as left:
            why = str(left)
        if isinstance(result, Left):
            result, why = result
        elif why is not None and not options.strict:
            # an error of the peer's is its own, and not one that came of ours
            result = original(self, *args, **kwargs)
        _count(key, name, why)
        if why is not None and options.strict:
            raise RuntimeError(
                f"{peer.package}.{row.owner}.{row.method}: expected a call that is accelerated "
                f"(strict=True), got one that is not: {why}"
            )
        return result

    return method


def _owner(peer: Peer, row: PeerRow) -> type:
    if peer.classes is not None:
        return peer.classes[row.name]
    path = row.owner.rpartition(".")[0]
    module = importlib.import_module(f"{peer.package}.{path}" if path else peer.package)
    return getattr(module, row.name)


def _patch(peer: Peer) -> list[_Patched]:
    """Every row's method; all originals are looked up before the first is replaced."""
    found = []
    for row in peer.rows:
        owner = _owner(peer, row)
        found.append((row, owner, getattr(owner, row.method)))
    done, owners = [], frozenset(owner for _, owner, _ in found)
    for row, owner, original in found:
        wrapper = _wrapper(peer, row, owner, owners, original)
        own = vars(owner).get(row.method, MISSING)
        setattr(owner, row.method, wrapper)
        done.append(_Patched(owner, row.method, wrapper, own))
    return done


def _restore(patched: list[_Patched]) -> None:
    for owner, method, wrapper, own in reversed(patched):
        # what somebody put over ours since stays; ours below it passes calls on
        if vars(owner).get(method) is not wrapper:
            continue
        if own is MISSING:
            delattr(owner, method)
        else:
            setattr(owner, method, own)


def begin(peer: Peer, *, strict: bool, any_version: bool, backend: str | None) -> Acceleration:
    """Raises ImportError without the peer, RuntimeError for a version that is not tested."""
    if peer.classes is None:
        _import(peer)
    if peer.versions and not any_version:
        _check_version(peer)
    return Acceleration(peer, strict, backend)


def _import(peer: Peer) -> ModuleType:
    try:
        return importlib.import_module(peer.package)
    except ImportError as error:
        raise ImportError(
            f"peer: expected {peer.distribution} ({_told(peer)}) to be installed for "
            f"{peer.package!r}, got {type(error).__name__}: {error}"
        ) from error


def _check_version(peer: Peer) -> None:
    try:
        version = importlib.metadata.version(peer.distribution)
    except importlib.metadata.PackageNotFoundError:
        version = "no metadata of it"
    if not any(version == each or version.startswith(f"{each}.") for each in peer.versions):
        raise RuntimeError(
            f"peer: expected {peer.distribution} {_told(peer)}, got {version}; "
            "any_version=True takes it untested"
        )


def _told(peer: Peer) -> str:
    return " or ".join(peer.versions) or "any version"
