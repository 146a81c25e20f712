"""The extension's helpers around a sweep, where plain eager code may call them past the dispatcher.

They are faster forms of PyTorch formulas that stand beside each call, a rounding apart at most.
Whatever looks at single operations has those: compiled code, torch.func, forward mode, a mode, a
subclass; and whatever is not on the CPU or not built.
"""

from __future__ import annotations

import importlib
import mmap
import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

BUILT_FOR = b"fused_losses built for torch "  # and the version, NUL: csrc/bind/module.cpp


@lru_cache
def load() -> ModuleType | ImportError:
    """The compiled module, or why it cannot be imported. Importing it registers its ops."""
    try:
        spec = find_spec("fused_losses._C")
        if spec is not None and spec.origin is not None:
            check_torch(Path(spec.origin))
        loaded = importlib.import_module("fused_losses._C")
    except ImportError as error:
        return error
    os.register_at_fork(after_in_child=_on_one_thread)
    return loaded


def check_torch(library: Path) -> None:
    """Raises ImportError for an extension that was built for another torch than this one.

    PyTorch's C++ interface holds within a minor release: with another, loading may crash.
    """
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as held:
        # constants lie behind the code, which is most of the file
        at = held.rfind(BUILT_FOR)
        version = held[at + len(BUILT_FOR) : held.find(b"\0", at)] if at >= 0 else b""
    theirs = version.decode() or "an unknown version"
    if _minor(theirs) != _minor(torch.__version__):
        raise ImportError(
            f"{library.name} was built for torch {theirs}, this is torch {torch.__version__}: "
            "install fused-losses again beside it"
        )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _on_one_thread() -> None:
    """A forked child of a process whose kernels had threads: PyTorch's would wait for OpenMP's.

    Those do not follow a fork. A child that asks for more again has workers of its own in our
    kernels. Where no kernel has run on several threads, nothing changes.
    """
    loaded = load()
    if not isinstance(loaded, ImportError) and loaded.has_threads():
        torch.set_num_threads(1)


def extension() -> Any:
    """The compiled module, or None where it was not built (and none of its ops can be called)."""
    loaded = load()
    return None if isinstance(loaded, ImportError) else loaded


def transformed() -> bool:
    """Within a transform of torch.func or a level of forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def seen() -> bool:
    """Whether a mode looks at the ops of a call, which it then finds by their registered names."""
    return (torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()) > 0


def offered() -> Any:
    """The extension, for its functions that look themselves whether a call is plain, or None."""
    # whatever else traces has a mode or tensors of its own
    return None if torch.compiler.is_dynamo_compiling() else _with_helpers()


def helpers(*tensors: Tensor) -> Any:
    """The extension, or None where these tensors ask for PyTorch's own operations."""
    built = offered()
    return built if built is not None and built.all_plain(*tensors) else None


@lru_cache
def _with_helpers() -> Any:
    """The extension, unless it was built of sources that had no helpers."""
    built = extension()
    return built if hasattr(built, "rows_meet") else None


def dense_rows(*tensors: Tensor) -> bool:
    """Matrices whose rows are dense, which helpers read in place."""
    return all(t.dim() == 2 and (t.shape[1] <= 1 or t.stride(1) == 1) for t in tensors)
