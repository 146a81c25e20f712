"""Files of torch.save: looked through before they are read, for what would take memory or hours.

torch's reader runs no code of a file, but believes it: a packed part may be of any size, a pickle
of any length, and tuples that hold one tuple twice, over and over, are hashed in 2^depth steps.
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from fused_losses.base.files import DataError

MAX_PICKLE = 1 << 26  # bytes of what says where the tensors are
MAX_STEPS = 1 << 19  # instructions; a tensor and its name take some forty
MAX_NODES = 1 << 22  # of all tuples, each shared part counted wherever it stands
LEGACY_PICKLES = 5  # at the start of the format before torch 1.6
TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3")
GETS, PUTS = ("GET", "BINGET", "LONG_BINGET"), ("PUT", "BINPUT", "LONG_BINPUT")
MARK = -1


def _effect(before: list[str], after: int) -> tuple[bool, int, int]:
    """What an instruction takes from the stack and leaves: (all up to the mark, values, values)."""
    whole = "mark" in before
    return whole, before.index("mark") if whole else len(before), after


EFFECTS = {
    code.name: _effect([one.name for one in code.stack_before], len(code.stack_after))
    for code in pickletools.opcodes
}


def check_saved(path: Path) -> bool:
    """Whether it is of the format since torch 1.6, a zip archive.

    DataError for what is no pickle, or too much. Time O(instructions), at most some seconds.
    """
    try:
        if zipfile.is_zipfile(path):
            _check_archive(path)
            return True
        with path.open("rb") as file:
            for _ in range(LEGACY_PICKLES):
                _check_pickle(file, f"{path}: pickle at offset {file.tell()}")
            return False
    except (DataError, FileNotFoundError):
        raise
    # zipfile and pickletools raise whatever their parsing trips over
    except Exception as error:
        raise DataError(
            f"{path}: not a file of tensors that can be read ({type(error).__name__}: {error})"
        ) from None


def check_owned(tensor: Tensor, where: str) -> None:
    """DataError for a tensor of more values than its storage has: strides of 0 make any number."""
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise DataError(
            f"{where}: expected a tensor of the bytes that are stored, "
            f"{tensor.untyped_storage().nbytes()}, got shape {tuple(tensor.shape)}, {tensor.dtype}"
        )


def check_all_owned(value: Any, where: str) -> None:
    """`check_owned` for every tensor of a tree of dicts, lists and tuples."""
    if isinstance(value, Tensor):
        check_owned(value, where)
    elif isinstance(value, dict):
        for key, part in value.items():
            check_all_owned(part, f"{where}: {str(key)[:40]}")
    elif isinstance(value, list | tuple):
        for part in value:
            check_all_owned(part, where)


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        total = 0
        for part in archive.infolist():
            where = f"{path}: {part.filename}"
            if part.compress_type != zipfile.ZIP_STORED:
                raise DataError(f"{where}: expected a stored part, not a packed one")
            total += part.file_size
            if total > path.stat().st_size:
                raise DataError(f"{where}: expected parts of the file's size, got {total} bytes")
            if part.filename.endswith("data.pkl"):
                if part.file_size > MAX_PICKLE:
                    raise DataError(
                        f"{where}: expected at most {MAX_PICKLE} bytes, got {part.file_size}"
                    )
                with archive.open(part) as file:
                    _check_pickle(file, where)


def _check_pickle(file: Any, where: str) -> None:
    """DataError for too many instructions, and for tuples that unfold without end.

    Keeps a stack as the reader will, of the number of nodes in each tuple, 1 for all else.
    """
    stack: list[int] = []
    memo: dict[Any, int] = {}
    unfolded = 0
    for number, (code, argument, _) in enumerate(pickletools.genops(file)):
        if number == MAX_STEPS:
            raise DataError(f"{where}: expected at most {MAX_STEPS} instructions, got more")
        name = code.name
        if name in PUTS:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in GETS:
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(MARK)
        else:
            whole, count, pushed = EFFECTS[name]
            parts = 0
            if whole:
                while (part := stack.pop()) != MARK:
                    parts += part
            for _ in range(count):
                parts += stack.pop()
            if name in TUPLES:
                stack.append(1 + parts)
            else:
                stack += [1] * pushed
        if stack and stack[-1] > 1:
            unfolded += stack[-1]
            if unfolded > MAX_NODES:
                raise DataError(f"{where}: expected tuples of at most {MAX_NODES} parts, got more")


__all__ = ["check_all_owned", "check_owned", "check_saved"]
