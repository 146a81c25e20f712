"""Checkpoints of a distributed run that no kill can spoil, written while training goes on.

`torch.distributed.checkpoint` (DCP) writes each rank's part; a checkpoint is a folder that gets its
name in one rename, after every rank's files have reached the disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from fused_losses.centers.checkpoint_fit import CommonRows, check_fits, expect
from fused_losses.centers.checksums import ChecksumWriter, damage
from fused_losses.centers.collectives import everyones

COMPLETE = re.compile(r"step-(\d{8,})")
PART, DAMAGED = ".part", ".damaged"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the text names the ranks and their errors."""


class Checkpoints:
    """The checkpoints of one run, in one folder that every rank can write to.

    folder: made if it is not there. Checkpoint 12 is folder/step-00000012, with the checksums of
        its files; what is being written or removed ends in ".part" and is never read.
    keep: complete checkpoints that stay; older ones go when a newer one is in its place.
    process_group: the ranks that save and load together; default: all, or this process alone
        without torch.distributed. Gloo groups of its own are made from it, so that the writing
        threads' messages never meet others: every rank must construct this at one point.

    A state is a dict, nested as one likes, of tensors, DTensors and small plain values. Tensors
    that are not DTensors count as alike on every rank and are written once. Every method but
    `steps` is a collective call. Files hold pickles (DCP's metadata and plain values): load only
    what you trust.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        keep: int = 2,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep: expected at least 1, got {keep}")
        self.folder, self.keep = Path(folder), keep
        # one for the threads that write, one for what ranks ask each other meanwhile
        self.group, self._talk = _gloo_group(process_group), _gloo_group(process_group)
        self.rank = dist.get_rank(self.group) if self.group is not None else 0
        self.world = dist.get_world_size(self.group) if self.group is not None else 1
        self._closed = False
        self._pending: Future[None] | None = None
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish-checkpoint")
        # a name that no earlier process has used: what one that is still dying writes stays apart
        self._token: str = self._from_first(uuid.uuid4().hex[:12])
        self._first_does(self._tidy)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in increasing order, as this rank sees the folder."""
        found = (COMPLETE.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(
            int(match[1]) for match in found if match and (self._path(int(match[1]))).is_dir()
        )

    def latest(self) -> int | None:
        """The newest complete checkpoint's step, alike on every rank; None: there is none."""
        return self._from_first(max(self.steps(), default=None) if self.rank == 0 else None)

    def save(self, state: dict[str, Any], step: int, *, asynchronous: bool = True) -> None:
        """Write checkpoint `step`; it exists for `latest` once every rank's files are on the disk.

        asynchronous: return as soon as `state` is copied to host memory (as many bytes as this
            rank's part); training may change its tensors at once. Otherwise nothing is copied and
            the checkpoint is complete on return.
        Waits for the save before, and raises `CheckpointError` where that one failed.
        ValueError: the step is negative or has a checkpoint. CheckpointError besides: the folder
        was removed.
        """
        _check_state(state)
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}")
        self.wait()
        if self.rank == 0:
            self._sweep(f".{self._token}*")  # what a disk that was read-only did not let go
        exists, gone = self._from_first((self._path(step).exists(), not self.folder.is_dir()))
        if exists:
            raise ValueError(f"step: {self._path(step)} exists; a checkpoint is never rewritten")
        if gone:  # DCP would make it anew
            raise CheckpointError(f"{self.folder}: the folder of the checkpoints was removed")
        part = self.folder / f"{self._path(step).name}.{self._token}{PART}"
        options: dict[str, Any] = {
            "storage_writer": ChecksumWriter(part, sync_files=True),
            "process_group": self.group,
            "no_dist": self.group is None,
        }
        with _quiet():
            if asynchronous:
                written = state_dict_saver.async_save(state, **options)
                assert isinstance(written, Future)
                self._pending = self._publisher.submit(self._publish_after, written, part, step)
                return
            failure: BaseException | None = None
            try:
                state_dict_saver.save(state, **options)
                self._publish(part, step)
            except (Exception, CheckpointException) as error:
                self._drop(part)
                failure = error
        self._agree(failure)

    def wait(self) -> None:
        """Until the save under way is complete; `CheckpointError` on every rank if it failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        self._agree(pending.exception())

    def load(
        self, state: dict[str, Any], step: int | None = None, *, resize: bool = False
    ) -> int | None:
        """Read checkpoint `step` (None: the newest) into `state`; the step; None if none exists.

        Tensors are filled in place, plain values replaced. A DTensor takes its own rows whatever
        the number of ranks that wrote them. A head makes the states that only the checkpoint has.
        resize: a tensor with more rows than the checkpoint's, or fewer, takes those that both have
        and keeps its others: a head of another number of classes. Every file is read twice:
        against its checksum first.
        Where the newest is damaged, the newest whole one is read with a warning that names both;
        the damaged ones then end in ".damaged", to be looked at or removed.
        CheckpointError: there is no such checkpoint, or it (every one) is damaged.
        ValueError: the state has a key or a shape that the checkpoint does not have.
        """
        _check_state(state)
        self.wait()
        if step is not None:
            self._read(state, step, resize)
            return step
        damaged: dict[int, str] = {}
        for newest in reversed(self._from_first(self.steps() if self.rank == 0 else None)):
            try:
                self._read(state, newest, resize)
            except CheckpointError as error:  # alike on every rank
                damaged[newest] = str(error)
                continue
            if damaged:
                self._set_aside(damaged, newest)
            return newest
        if damaged:
            told = "; ".join(damaged.values())
            raise CheckpointError(f"{self.folder}: no checkpoint is whole: {told}")
        return None

    def _read(self, state: dict[str, Any], step: int, resize: bool) -> None:
        path = self._path(step)
        failure: BaseException | None = None
        reader = FileSystemReader(path)
        try:
            found = damage(path, self.rank, self.world)
            if found is not None:
                raise CheckpointError(f"damaged ({found})")
            saved = reader.read_metadata()
        # what is no pickle can fail in any way
        except Exception as error:
            failure = CheckpointError(f"{path.name}: {_one_line(error)}")
        self._agree(failure)
        try:
            expect(state, saved.state_dict_metadata)
            check_fits(state, saved, path, resize)
        except ValueError as error:
            failure = error
        self._agree(failure)
        try:
            with _quiet():
                state_dict_loader.load(
                    state,
                    storage_reader=reader,
                    planner=CommonRows() if resize else None,
                    process_group=self.group,
                    no_dist=self.group is None,
                )
        except (Exception, CheckpointException) as error:
            failure = CheckpointError(f"{path.name}: {_one_line(error)}")
        self._agree(failure)

    def _set_aside(self, damaged: dict[int, str], step: int) -> None:
        """Damaged checkpoints lose their names, or a run that goes on could not take these."""

        def rename() -> None:
            for one in damaged:
                path = self._path(one)
                to = path.with_name(path.name + DAMAGED)
                os.rename(path, to if not to.exists() else f"{to}.{self._token}")

        self._first_does(rename)
        told = "; ".join(damaged.values())
        warnings.warn(
            f"{told}; {self._path(step)} is read in its place, the name of what is damaged now "
            f"ends in {DAMAGED}",
            stacklevel=3,
        )

    def close(self) -> None:
        """Wait for the save under way and end the threads and the groups; a collective call.

        Once is enough; what reads or writes after it is a RuntimeError.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            self._publisher.shutdown()
            self._closed = True
            for group in (self.group, self._talk):  # their threads and connections
                if group is not None and self.world == dist.get_world_size():
                    dist.destroy_process_group(group)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # after an error other ranks may be gone, and waiting for them would hide it
        if kind is None:
            self.close()
        else:
            self._publisher.shutdown(wait=False)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _publish_after(self, written: Future[Metadata], part: Path, step: int) -> None:
        try:
            written.result()
            self._publish(part, step)
        except (Exception, CheckpointException):
            self._drop(part)
            raise

    def _drop(self, part: Path) -> None:
        """What a save that failed has written would take the room that the next one needs."""
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)

    def _publish(self, part: Path, step: int) -> None:
        """Give the checkpoint its name. DCP returns on rank 0 once all ranks' files are synced."""
        if self.rank:
            return
        _sync_folder(part)
        os.rename(part, self._path(step))
        _sync_folder(self.folder)
        for old in self.steps()[: -self.keep]:
            self._remove(self._path(old))

    def _remove(self, path: Path) -> None:
        """Take the name away before the files: a kill in between leaves no half checkpoint."""
        doomed = path.with_name(f"{path.name}.{self._token}.old{PART}")
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _tidy(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        for path in self.folder.iterdir():
            if COMPLETE.fullmatch(path.name) and not path.is_dir():
                raise FileExistsError(f"{path}: expected a checkpoint's folder, found a file")

    def _sweep(self, whose: str = "") -> None:
        for left in self.folder.glob(f"step-*{whose}{PART}"):
            shutil.rmtree(left, ignore_errors=True)

    def _first_does(self, work: Any) -> None:
        failure: BaseException | None = None
        if self.rank == 0:
            try:
                work()
            except OSError as error:
                failure = error
        self._agree(failure)

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self.folder}: these checkpoints were closed; expected new ones")

    def _from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        self._check_open()
        if self._talk is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self._talk, group_src=0)
        return box[0]

    def _agree(self, failure: BaseException | None) -> None:
        """Raise on every rank if any has failed: the rank's own ValueError, or what all failed by.

        One kind of error on all ranks: who catches it does so everywhere, or nowhere.
        """
        self._check_open()
        mine = None if failure is None else (isinstance(failure, ValueError), _one_line(failure))
        told = enumerate(everyones(mine, self._talk))
        failed: dict[int, tuple[bool, str]] = {rank: one for rank, one in told if one is not None}
        if not failed:
            return
        text = "; ".join(f"rank {rank}: {text}" for rank, (_, text) in failed.items())
        if any(bad_value for bad_value, _ in failed.values()):
            raise failure if isinstance(failure, ValueError) else ValueError(text)
        raise CheckpointError(f"{self.folder}: {text}") from failure


def _gloo_group(process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    if not (dist.is_available() and dist.is_initialized()):
        return None
    ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
    # torch names the group of a part by how many groups there are: the name of one that was ended
    # comes again, with what it left in the store, so that `close` ends those of all ranks alone
    part = len(ranks) < dist.get_world_size()
    group = dist.new_group(ranks, backend="gloo", use_local_synchronization=part)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _check_state(state: dict[str, Any]) -> None:
    if not isinstance(state, dict):
        raise TypeError(f"state: expected a dict of tensors, got {type(state).__name__}")


def _sync_folder(path: Path) -> None:
    """The names in a folder to the disk; fsync of a file does not write its name."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _one_line(error: BaseException) -> str:
    """The cause that DCP collected from the ranks, or the error itself."""
    if isinstance(error, CheckpointException):
        told = (f"rank {rank}: {pair[0]!r}" for rank, pair in error.failures.items())
        return "; ".join(told)
    return str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's remark that a single process is a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


__all__ = ["CheckpointError", "Checkpoints"]
