"""A run's folder: one process at a time, one configuration, a stop when a signal asks for it."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch

from fused_losses.base.files import write_text
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.options import Config, differences

CONFIG, CHECKPOINT, LOCK = "config.json", "checkpoint.pt", "lock"

C = TypeVar("C", bound=Config)


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step under way; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, _: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __call__(self) -> int | None:
        """The signal that asks for a stop, if one came."""
        return self.received

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopSignals]:
        former = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # only the main thread may set handlers; elsewhere the caller's stay
            with contextlib.suppress(ValueError):
                former[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: Path, *, seconds: float = 0.0) -> Iterator[None]:
    """Two processes must not write one run; the lock goes with the process, however it ends.

    Raises RuntimeError where another still has it after `seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise RuntimeError(f"{folder}: another process is training there") from None
            time.sleep(0.1)
        yield


@contextlib.contextmanager
def running(
    config: C, folder: Path, written: tuple[str, ...], *, resume: bool, overwrite: bool
) -> Iterator[tuple[C, StopSignals]]:
    """A run in its folder: (its configuration with the threads chosen, the stop asked for).

    written: the files and folders of a run, which alone `overwrite` deletes. The caller's threads
    and random state come back at the end.
    """
    with locked(folder):
        config = _prepare(config, folder, written, resume=resume, overwrite=overwrite)
        random_state, threads = checkpoint.random_state(), torch.get_num_threads()
        torch.set_num_threads(config.threads)
        try:
            with StopSignals().watching() as stop:
                yield config, stop
        finally:
            checkpoint.set_random_state(random_state)
            torch.set_num_threads(threads)


def _prepare(
    config: C, folder: Path, written: tuple[str, ...], *, resume: bool, overwrite: bool
) -> C:
    """The configuration to run, recorded in the folder; a folder in the wrong state is refused."""
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    saved = type(config).load(folder / CONFIG) if (folder / CONFIG).exists() else None
    if saved is not None and resume:
        # the split over threads orders sums: bitwise the same losses need the same number
        config = config.with_changes(threads=config.threads or saved.threads)
        unlike = differences(saved, config)
        if unlike:
            told = "\n  ".join(unlike)
            raise ValueError(f"{folder}: cannot resume, the configuration differs\n  {told}")
        return config
    left = [path for path in folder.iterdir() if path.name not in (LOCK, CONFIG + ".part")]
    if left and saved is None and not overwrite and not resume:
        raise ValueError(f"{folder}: holds files that are not a run; choose another name")
    if saved is not None and not overwrite:
        raise ValueError(f"{folder}: holds a run; go on with --resume, or start with --overwrite")
    if saved is not None:
        ours = {*written, CONFIG, CHECKPOINT, CHECKPOINT + ".part"}
        # the configuration last: killed in between, this is still known for a run
        for path in sorted(left, key=lambda path: path.name == CONFIG):
            if path.name in ours:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    config = config.with_changes(threads=config.threads or torch.get_num_threads())
    write_text(folder / CONFIG, config.to_json())
    return config
