"""A rank that dies or hangs makes the others fail with its name, within a stated time.

Collectives alone wait for a lost peer until the process group's timeout (half an hour by default),
and then name no rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

EXIT_CODE = 86  # of a process that the watch ends: no shell's, no signal's and no interpreter's own
VERDICT = "verdict"
# what gloo, NCCL and the stores say when the other end is gone
BROKEN = ("connection", "broken pipe", "gloo", "nccl", "timed out", "timeout", "peer", "socket")


class RankFailure(RuntimeError):
    """Another rank died, hangs or failed; the text names it, its host and its process id."""


@dataclass(frozen=True)
class Mark:
    """What a rank tells the others each interval."""

    rank: int
    host: str
    pid: int
    space: str  # where the process id is meant: pids of two containers are not comparable
    beat: int = 0  # heartbeats so far
    step: int = -1  # the step that the main thread has begun
    collectives: int = 0  # that the main thread has issued
    at: str = ""  # where its main thread is
    done: bool = False  # left the watch in good order

    def name(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"

    def place(self) -> tuple[int, int]:
        """How far the main thread has come; equal for ranks that wait in one collective."""
        return self.step, self.collectives


class RankWatch:
    """Watches all ranks of a run from one thread of each process.

        with RankWatch.of_group(timeout=30.0, hang_timeout=600.0) as watch:
            for step in range(steps):
                watch.progress(step)
                ...

    store: any `torch.distributed` store that all ranks share, used under a prefix that no other
        watch has had. rank, world: this process among the watched ones.
    interval: seconds between heartbeats. timeout: without a heartbeat for so long, a rank has died
        (or is stopped, or its machine is gone). hang_timeout: a main thread that neither begins a
        step nor issues a collective for so long makes its rank look for the one that is furthest
        behind. start_timeout: takes the place of both until a rank has beaten once and begun its
        second step, for slow starts.
    groups: process groups whose collectives count as progress; default: the default group.
    on_failure: called with the verdict before the process ends, e.g. to flush logs.

    A verdict is written to the store once and read by all: every other process writes one line to
    stderr and ends with `EXIT_CODE`, at most `timeout` (or `hang_timeout`) + 4 `interval` after the
    last sign of life. A rank whose body raises gives its own verdict at once, and watches no more.
    Where the body raises because a peer closed a connection, `RankFailure` that names the dead
    rank takes the error's place.

    Each rank reads the next rank's mark and the verdict, two small messages an interval whatever
    the world's size; the rank behind a dead one is read by the one before it. A store that does not
    answer ends the process as a dead rank does.
    A heartbeat needs the interpreter's lock: who keeps it for `timeout` counts as dead.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world: int,
        *,
        interval: float = 1.0,
        timeout: float = 30.0,
        hang_timeout: float = 600.0,
        start_timeout: float = 1800.0,
        groups: Sequence[dist.ProcessGroup] | None = None,
        on_failure: Callable[[str], None] | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1} in a world of {world}, got {rank}")
        if not 0 < interval < timeout / 2:
            raise ValueError(
                f"interval: expected more than 0 and less than half of timeout={timeout}, "
                f"got {interval}"
            )
        if hang_timeout <= interval or start_timeout < timeout:
            raise ValueError(
                f"hang_timeout, start_timeout: expected more than interval={interval} and at least "
                f"timeout={timeout}, got {hang_timeout} and {start_timeout}"
            )
        # a connection of its own: the main thread may block the one it shares
        # (torch's stub leaves the method out)
        self.store: Store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.rank, self.world = rank, world
        self.interval, self.timeout = interval, timeout
        self.hang_timeout, self.start_timeout = hang_timeout, start_timeout
        self.on_failure = on_failure
        self.groups = tuple(groups) if groups is not None else _default_groups()
        self.verdict: str | None = None
        self._me = Mark(rank, socket.gethostname(), os.getpid(), _pid_space())
        self._step, self._steps_begun, self._beats = -1, 0, 0
        self._leaving = threading.Event()  # the main thread is at hand, with an error to raise
        self._stopped = threading.Event()
        self._judged = threading.Event()
        self._main = threading.main_thread().ident
        self._rounds = 0  # of the watching thread, each of which asks the store
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._guard = threading.Thread(target=self._run_guard, name="rank-watch-guard", daemon=True)

    @classmethod
    def of_group(cls, process_group: dist.ProcessGroup | None = None, **options: Any) -> RankWatch:
        """The watch of a group's ranks, over the default group's store; a collective call."""
        token = [uuid.uuid4().hex]
        dist.broadcast_object_list(token, group=process_group, group_src=0)
        # a restarted run may meet the marks of the one before in the same store
        store = PrefixStore(f"rank-watch/{token[0]}", _default_store())
        rank, world = dist.get_rank(process_group), dist.get_world_size(process_group)
        return cls(store, rank, world, **options)

    def progress(self, step: int) -> None:
        """The main thread begins this step."""
        self._step = step
        self._steps_begun += 1

    def start(self) -> None:
        self._send()
        self._thread.start()
        self._guard.start()

    def stop(self) -> None:
        """This rank has ended in good order."""
        self._stopped.set()
        self._thread.join(timeout=self.timeout)
        with contextlib.suppress(RuntimeError):  # the store may be gone with its process
            self._send(done=True)

    def __enter__(self) -> RankWatch:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.stop()
            return
        self._leaving.set()
        if _peer_is_gone(error):
            # the peer's death breaks the connection long before its heartbeat is missed
            self._judged.wait(self.timeout + 4 * self.interval)
            if self.verdict is not None:
                raise RankFailure(self.verdict) from error
        self._stopped.set()
        told = f"{self._me.name()} raised {type(error).__name__}: {error}"
        # the store may not answer, and this rank has an error to raise
        telling = threading.Thread(target=self._tell, args=(told,), daemon=True)
        telling.start()
        telling.join(self.timeout)

    def _tell(self, verdict: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._judge(verdict)

    # what follows runs in the threads

    def _run_guard(self) -> None:
        """Ends the process where the store is silent: torch's calls to it then never return."""
        rounds, moved = self._rounds, time.monotonic()
        looked, most = moved, self.timeout + 2 * self.interval
        while not self._stopped.wait(self.interval) and self.verdict is None:
            now = time.monotonic()
            if now - looked > self.timeout / 2 or self._rounds != rounds:  # starved, as below
                rounds, moved = self._rounds, now
            looked = now
            if now - moved > most:
                self._end(
                    f"the ranks' store has not answered for {now - moved:.1f} s: the process that "
                    "serves it (rank 0, or the launcher's agent) is stopped, or its machine lost"
                )
                return

    def _run(self) -> None:
        try:
            verdict = self._watch()
        except RuntimeError as error:
            # at the end of a run the process that serves the store may leave first
            if self._stopped.wait(self.timeout):
                return
            verdict = (
                "the ranks' store cannot be reached: the process that serves it (rank 0, or the "
                f"launcher's agent) is gone ({_first_line(error)})"
            )
        if verdict is not None:
            self._end(verdict)

    def _watch(self) -> str | None:
        """Beat and look until there is a verdict; None: stopped in good order."""
        peer, peer_beat = (self.rank + 1) % self.world, -1
        place = self._mark().place()
        looked = peer_seen = moved = time.monotonic()
        while not self._stopped.wait(self.interval):
            self._rounds += 1
            now = time.monotonic()
            if now - looked > self.timeout / 2:
                # this process was itself stopped or starved: the time away is nobody's fault
                peer_seen, moved = now, now
            looked = now
            mark = self._send()
            if (found := self._read(VERDICT)) is not None:
                return found
            if mark.place() != place:
                place, moved = mark.place(), now
            elif now - moved > (self.hang_timeout if self._steps_begun > 1 else self.start_timeout):
                return self._judge(self._who_hangs(now - moved))
            if peer == self.rank:
                continue
            other = self._read_mark(peer)
            if other is not None and other.done:
                peer, peer_beat, peer_seen = (peer + 1) % self.world, -1, now
            elif other is not None and other.beat != peer_beat:
                peer_beat, peer_seen = other.beat, now
            elif now - peer_seen > (self.start_timeout if other is None else self.timeout):
                name = f"rank {peer} (never seen)" if other is None else other.name()
                fate = "has not started" if other is None else _fate(other, self._me)
                return self._judge(f"{name} {fate}: no heartbeat for {now - peer_seen:.1f} s")
        return None

    def _mark(self, done: bool = False) -> Mark:
        issued = sum(map(_issued, self.groups))
        me = self._me
        return Mark(
            me.rank,
            me.host,
            me.pid,
            me.space,
            beat=self._beats,
            step=self._step,
            collectives=issued,
            at=_where(self._main),
            done=done,
        )

    def _send(self, done: bool = False) -> Mark:
        self._beats += 1
        mark = self._mark(done)
        self.store.set(f"{self.rank}", json.dumps(asdict(mark)))
        return mark

    def _read(self, key: str) -> str | None:
        """A key's text; None where it is not there: `get` alone would wait for it."""
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _read_mark(self, rank: int) -> Mark | None:
        text = self._read(f"{rank}")
        return None if text is None else Mark(**json.loads(text))

    def _judge(self, verdict: str) -> str:
        """Give the verdict, or take the one that another rank was first to give."""
        return self.store.compare_set(VERDICT, "", verdict).decode()

    def _who_hangs(self, seconds: float) -> str:
        """The ranks that are furthest behind: the others wait for them in a collective."""
        read = (self._read_mark(rank) for rank in range(self.world))
        marks = [mark for mark in read if mark is not None and not mark.done]
        last = min(mark.place() for mark in marks)
        behind = [mark for mark in marks if mark.place() == last]
        told = "; ".join(f"{mark.name()} at {mark.at}" for mark in behind[:8])
        if len(behind) == len(marks):
            return f"no rank made progress in step {last[0]} for {seconds:.1f} s: {told}"
        verb = "hangs" if len(behind) == 1 else "hang"
        return f"{told} {verb} in step {last[0]}: no progress for {seconds:.1f} s, the others wait"

    def _end(self, verdict: str) -> None:
        """Tell, and end the process: the main thread may never come back from a collective."""
        self.verdict = verdict
        self._judged.set()
        if self._leaving.is_set():
            return  # the main thread has come back, and raises
        print(f"{self._me.name()} ends: {verdict}", file=sys.stderr, flush=True)
        with contextlib.suppress(Exception):  # nothing may keep the process from ending
            if self.on_failure is not None:
                self.on_failure(verdict)
        os._exit(EXIT_CODE)


def _default_store() -> Store:
    return dist.distributed_c10d._get_default_store()


def _default_groups() -> tuple[dist.ProcessGroup, ...]:
    world = dist.group.WORLD if dist.is_initialized() else None
    return () if world is None else (world,)


def _issued(group: dist.ProcessGroup) -> int:
    """Collectives that this process has begun in a group; 0 for a backend that does not count."""
    try:
        # torch's stub leaves it out
        return group._get_sequence_number_for_group()  # pyright: ignore[reportAttributeAccessIssue]
    except RuntimeError:
        return 0


def _peer_is_gone(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in BROKEN)


def _pid_space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _fate(mark: Mark, me: Mark) -> str:
    """What became of a silent process, as far as this machine can tell."""
    if not me.space or (mark.host, mark.space) != (me.host, me.space):
        return "died or lost its network"
    try:
        with open(f"/proc/{mark.pid}/stat") as file:
            state = file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "died"
    return {"Z": "died", "X": "died", "T": "is stopped", "t": "is stopped"}.get(state, "is silent")


def _where(thread: int | None) -> str:
    """file:line of the Python code that a thread is in."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    if frame is None:
        return "unknown"
    code = frame.f_code
    place = "/".join(code.co_filename.split(os.sep)[-2:])
    return f"{place}:{frame.f_lineno} in {code.co_name}"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


__all__ = ["EXIT_CODE", "Mark", "RankFailure", "RankWatch"]
