"""What a run says of each step: a JSON line, and scalars for TensorBoard where they are wanted."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self, TextIO

from fused_losses.base.files import write_text
from fused_losses.train.frame.files import RunFileError, parse_json

LOG, TENSORBOARD = "log.jsonl", "tensorboard"
MAX_LINE = 1 << 16  # bytes


class StepLog:
    """One JSON line a step: {..., "step", "loss", "lr", "seconds"}, the fields of `begin` first.

    A loss that is not finite (of a step that was skipped) is null.

    path: None writes nothing (a rank other than the first). board: folder of TensorBoard's files.
    """

    def __init__(self, path: Path | None, board: Path | None = None) -> None:
        self.path, self.board = path, board
        self._which: dict[str, Any] = {}
        self._file: TextIO | None = None
        self._refused = False  # the last line
        self._writer: Any = None

    def begin(self, start: int, **which: Any) -> None:
        """Go on at step `start` of the training that `which` tells from the others of its run.

        Its later lines go: what came after the checkpoint is done again, and is then there once.
        """
        self.close()
        self._which = which
        if self.path is None:
            return
        kept = [
            line
            for line in read_log(self.path)
            if line["step"] < start or any(line.get(key) != told for key, told in which.items())
        ]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a")  # noqa: SIM115
        if self.board is not None:
            # optional, and slow to import
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415

            name = "-".join(str(value) for value in which.values())
            self._writer = SummaryWriter(str(self.board / name), purge_step=start)

    def write(self, step: int, loss: float, lr: float, seconds: float) -> None:
        if self._file is not None:
            told = loss if math.isfinite(loss) else None  # JSON has no NaN
            record = {"step": step, "loss": told, "lr": lr, "seconds": round(seconds, 6)}
            self._refused = True
            self._file.write(json.dumps({**self._which, **record}) + "\n")
            self._file.flush()
            self._refused = False
        if self._writer is not None:
            for name, value in (("loss", loss), ("lr", lr), ("seconds", seconds)):
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """The lines so far reach the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            # a line that the disk refused is tried again here, and was told of then
            with contextlib.suppress(*([OSError] if self._refused else [])):
                self._file.close()
        if self._writer is not None:
            self._writer.close()
        self._file = self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that a kill has torn is none.

    RunFileError names the line of other damage.
    """
    return list(_lines(path)) if path.exists() else []


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            place, torn = f"{path}: line {number}", not line.endswith(b"\n")
            if len(line) > MAX_LINE:
                raise RunFileError(f"{place}: expected at most {MAX_LINE} bytes, got more")
            try:
                record = parse_json(line, place)
            except RunFileError:
                if torn:
                    return
                raise
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise RunFileError(f"{place}: expected an object with an integer 'step'")
            yield record
