"""A run's folder: one process at a time, one configuration, a stop when a signal asks for it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TextIO, TypeVar

import torch

from fused_losses.base.files import write_text
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.log import LOG, TENSORBOARD, StepLog
from fused_losses.train.frame.options import Config, OptionError, differences

CONFIG, CHECKPOINT, LOCK = "config.json", "checkpoint.pt", "lock"
RESULT = "result.json"
# one Ctrl-C reaches a process more than once where a launcher hands it on
SAME_SECONDS = 1.0

C = TypeVar("C", bound=Config)
M = TypeVar("M")


class RunError(RuntimeError):
    """The folder cannot take this run, or no longer has it; the text says why."""


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step under way; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0

    def _note(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._at = number, now
        elif number == signal.SIGINT and now - self._at > SAME_SECONDS:
            raise KeyboardInterrupt

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


class Lock:
    """One process's hold of a run's folder."""

    def __init__(self, folder: Path, file: TextIO) -> None:
        self.folder, self._file = folder, file

    def check(self) -> None:
        """RunError where the folder was removed, or replaced, since it was locked."""
        try:
            there = os.stat(self.folder / LOCK)
        except FileNotFoundError:
            there = None
        if there is None or not os.path.samestat(there, os.fstat(self._file.fileno())):
            raise RunError(f"{self.folder}: the run's folder was removed while the run went on")


@contextlib.contextmanager
def locked(folder: Path, *, seconds: float = 0.0) -> Iterator[Lock]:
    """Two processes must not write one run; the lock goes with the process, however it ends.

    Raises RunError where another still has it after `seconds`. A folder in which an error leaves
    nothing but the lock goes again.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise OptionError("runs", f"{folder} cannot be written to ({error})") from error
    with file:
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= deadline:
                    raise RunError(f"{folder}: another process is training there") from None
            time.sleep(0.1)
        try:
            yield Lock(folder, file)
        except BaseException:
            forget(folder, ())
            raise


@dataclass(frozen=True)
class Run(Generic[C, M]):
    """A run that has its folder to itself."""

    config: C  # with the threads chosen
    folder: Path
    made: M  # what was made ready before there was a folder
    stop: StopSignals
    lock: Lock
    log: StepLog


@contextlib.contextmanager
def running(
    config: C,
    folder: Path,
    written: tuple[str, ...],
    *,
    ready: Callable[[C], M],
    resume: bool,
    overwrite: bool,
) -> Iterator[Run[C, M]]:
    """A run in its folder.

    written: the files (they have a suffix) and folders of a run, which alone `overwrite` deletes.
    ready: makes what the run needs; what it raises leaves no folder behind and none changed.
    The caller's threads and random state come back at the end.
    """
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    ours = (*written, CONFIG, CHECKPOINT, LOG, TENSORBOARD)
    random_state, threads = checkpoint.random_state(), torch.get_num_threads()
    try:
        config = _accepted(config, folder, ours, resume=resume, overwrite=overwrite)
        torch.set_num_threads(config.threads)
        made = ready(config)
        with locked(folder) as lock:
            # another process may have been there meanwhile
            config = _accepted(config, folder, ours, resume=resume, overwrite=overwrite)
            _begin(config, folder, ours, overwrite=overwrite)
            board = folder / TENSORBOARD if config.tensorboard else None
            try:
                with StopSignals().watching() as stop, StepLog(folder / LOG, board) as log:
                    yield Run(config, folder, made, stop, lock, log)
                    lock.check()
            except BaseException:
                forget(folder, ours)
                raise
    finally:
        checkpoint.set_random_state(random_state)
        torch.set_num_threads(threads)


def _accepted(
    config: C, folder: Path, ours: tuple[str, ...], *, resume: bool, overwrite: bool
) -> C:
    """The configuration to run in a folder, of which nothing is changed; a wrong one is refused."""
    left = [path for path in folder.iterdir() if path.name != LOCK] if folder.exists() else []
    for path in left:
        if path.name in ours and path.is_dir() == bool(path.suffix):
            kind = "a file" if path.suffix else "a folder"
            raise RunError(f"{path}: expected {kind} of the run, found something else")
    chosen = config.with_changes(threads=config.threads or torch.get_num_threads())
    if overwrite:
        return chosen
    saved = type(config).load(folder / CONFIG) if (folder / CONFIG).exists() else None
    if saved is not None and resume:
        # the split over threads orders sums: bitwise the same losses need the same number
        config = config.with_changes(threads=config.threads or saved.threads)
        unlike = differences(saved, config)
        if unlike:
            told = "\n  ".join(unlike)
            raise ValueError(f"{folder}: cannot resume, the configuration differs\n  {told}")
        return config
    parts = [path for path in left if path.name != CONFIG + ".part"]
    if parts and saved is None and not resume:
        raise ValueError(f"{folder}: holds files that are not a run; choose another name")
    if saved is not None:
        raise ValueError(f"{folder}: holds a run; go on with --resume, or start with --overwrite")
    return chosen


def forget(folder: Path, ours: tuple[str, ...]) -> None:
    """A run that ended before its first step is none: the next may have its name.

    ours: the files and folders of a run. A folder with nothing else goes, too, with its lock.
    """

    def holds(path: Path) -> bool:
        return any(path.iterdir()) if path.is_dir() else bool(path.stat().st_size)

    with contextlib.suppress(OSError):
        left = [folder / name for name in ours if (folder / name).exists()]
        # TensorBoard's files begin before there is a step
        if any(holds(path) for path in left if path.name not in (CONFIG, TENSORBOARD)):
            return
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def _begin(config: Config, folder: Path, ours: tuple[str, ...], *, overwrite: bool) -> None:
    """Record the configuration; what an earlier run left goes where that is wanted."""
    known = (folder / CONFIG).exists()
    if known and overwrite:
        left = [path for path in folder.iterdir() if path.name in (*ours, CHECKPOINT + ".part")]
        # the configuration last: killed in between, this is still known for a run
        for path in sorted(left, key=lambda path: path.name == CONFIG):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = config.to_json()
    if known and not overwrite and text != (folder / CONFIG).read_text():
        # a longer run's result is not there yet
        (folder / RESULT).unlink(missing_ok=True)
    write_text(folder / CONFIG, text)


LONGEST_NAME = 200  # bytes; file systems have 255, and files of the run may add to it


def run_folder(runs: Path, name: str, *, resume: bool = False) -> Path:
    """RUNS/NAME, which lies in RUNS whatever the name is; to resume, of a run that is there."""
    plain = name.isprintable() and name.strip() == name and Path(name).name == name
    if not plain or name in ("", ".", "..") or len(os.fsencode(name)) > LONGEST_NAME:
        raise OptionError(
            "name",
            f"expected the name of one folder in {runs}, of at most {LONGEST_NAME} bytes without "
            f"space around it, got {name!r}",
        )
    if resume and not (runs / name / CONFIG).exists():
        raise OptionError("resume", f"expected a run to go on with, {runs / name} holds none")
    return runs / name


def runs_folder(text: str) -> Path:
    """The folder of all runs, which is there or can be made."""
    return check_folder("runs", text)


def check_folder(option: str, text: str) -> Path:
    """A folder that is there, or in one that can be written to; OptionError for another."""
    folder = Path(text)
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        fits = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # a name that is too long, or has a zero
        raise OptionError(option, f"expected a folder, got {text!r} ({error})") from error
    if not fits:
        what = "a folder that cannot be written to" if there.is_dir() else "no folder"
        raise OptionError(option, f"expected a folder, got {text!r}: {there} is {what}")
    return folder
