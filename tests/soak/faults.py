"""A disk of a soak, which can be full, read-only or damaged, and the processes that write to it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

COMPLETE = re.compile(r"step-\d{8}")


class Disk:
    """A small tmpfs: `unshare --mount --map-root-user` lets anyone mount one."""

    def __init__(self, folder: Path, mib: int) -> None:
        self.folder = folder
        self.damaged: set[tuple[str, int, int]] = set()
        folder.mkdir(parents=True)
        _call("mount", "-t", "tmpfs", "-o", f"size={mib}m", "soak", str(folder))

    def close(self) -> None:
        _call("umount", "--lazy", str(self.folder))
        self.folder.rmdir()

    @contextmanager
    def full(self, room: int) -> Iterator[None]:
        """But for so many bytes, which the next files may take or not."""
        filler = self.folder / "filler"
        with open(filler, "wb") as file:
            free = os.statvfs(self.folder)
            os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_bsize - room))
        yield
        filler.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """As soon as no file is open for writing: at once where there are checkpoints alone."""
        deadline = time.monotonic() + 5
        while not _call("mount", "-o", "remount,ro", str(self.folder), check=False):
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.02)
        yield
        _call("mount", "-o", "remount,rw", str(self.folder))

    def complete(self) -> list[Path]:
        """The whole checkpoints, by step."""
        found = self.folder.rglob("step-*")
        found = [path for path in found if COMPLETE.fullmatch(path.name)]
        # a run that was ended early has not put a damaged one aside
        return sorted(path for path in found if _which(path) not in self.damaged)

    def damage(self, chance: random.Random) -> str:
        """One file of the newest checkpoint loses a bit, its end, or itself; what was done."""
        path = chance.choice([p for p in sorted(self.complete()[-1].iterdir()) if p.is_file()])
        # without its checksums a checkpoint is an old one, and whole
        kind = chance.choice(("bit", "end", *(("all",) if path.suffix != ".json" else ())))
        data = bytearray(path.read_bytes())
        if kind == "all":
            path.unlink()
        elif kind == "end":
            path.write_bytes(data[: chance.randrange(len(data))])
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        self.damaged.add(_which(path.parent))
        return f"{path.parent.name}/{path.name}: {kind}"


def _which(folder: Path) -> tuple[str, int, int]:
    """Another for a checkpoint that is written anew."""
    told = folder.stat()
    return folder.name, told.st_ino, told.st_mtime_ns


def _call(*command: str, check: bool = True) -> bool:
    return subprocess.run(command, check=check, capture_output=not check).returncode == 0


class Attempt:
    """Ranks that train from the newest checkpoint until they end, or something ends them."""

    def __init__(
        self,
        context: ForkServerContext,
        work: Callable[..., None],
        world: int,
        episode: Any,
        disk: Disk,
        told: Path,
    ) -> None:
        self.told = [told / f"{rank}" for rank in range(world)]
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        self.processes = [
            context.Process(
                target=work,
                args=(rank, world, episode, str(disk.folder), str(self.told[rank]), port),
            )
            for rank in range(world)
        ]
        self._read = [path.with_suffix(".jsonl") for path in self.told]
        self._before = [len(self._lines(rank)) for rank in range(world)]
        for process in self.processes:
            process.start()

    def _lines(self, rank: int) -> list[dict[str, Any]]:
        if not self._read[rank].exists():
            return []
        lines = self._read[rank].read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def lines(self, rank: int) -> list[dict[str, Any]]:
        """What this rank has told in this attempt."""
        return self._lines(rank)[self._before[rank] :]

    @property
    def codes(self) -> list[int | None]:
        return [process.exitcode for process in self.processes]

    @property
    def alive(self) -> list[int]:
        return [p.pid for p in self.processes if p.exitcode is None and p.pid is not None]

    def signal(self, number: signal.Signals, pids: list[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def pause(self, seconds: float) -> bool:
        """Whether all ranks are there after so long."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(self.alive) == len(self.processes):
            time.sleep(0.05)
        return len(self.alive) == len(self.processes)

    def ended(self, seconds: float) -> bool:
        """Whether all have ended by then, by themselves; who has not is killed."""
        deadline = time.monotonic() + seconds
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        late = self.alive
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
            process.join()
        return not late

    def errors(self) -> str:
        """The ends of what the ranks wrote to stderr, where they came so far."""
        paths = (path.with_suffix(".err") for path in self.told)
        return "\n".join(path.read_text()[-1500:] for path in paths if path.exists())
