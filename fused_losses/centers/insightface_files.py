"""The files that insightface's ranks leave: found, and read as far as they are of use here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.files import DataError
from fused_losses.base.saved import check_owned, check_saved
from fused_losses.base.validation import describe

PARTIAL_FC_2 = re.compile(r"checkpoint_gpu_(\d+)\.pt")
PARTIAL_FC_1 = re.compile(r"rank_(\d+)_softmax_weight\.pt")
TABLE, WEIGHT, OPTIMIZER, STEP = "state_dict_softmax_fc", "weight", "state_optimizer", "global_step"


class Part(NamedTuple):
    """What one rank left."""

    tables: dict[str, Tensor]  # "weight" and optimiser states, [rows, D] each
    step: int | None


# ---- which files --------------------------------------------------------------------------------


def find_files(source: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files of all ranks, in the order of the ranks."""
    if isinstance(source, (str, Path)):
        folder = Path(source)
        if not folder.is_dir():
            raise ValueError(f"source: expected a folder or a list of files, got {str(source)!r}")
        for pattern in (PARTIAL_FC_2, PARTIAL_FC_1):
            found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
            if found:
                break
    else:
        found = [Path(path) for path in source]
        folder = found[0].parent if found else Path()
    ranks = {_rank_of(path): path for path in found}
    if not found or sorted(ranks) != list(range(len(found))):
        has = ", ".join(sorted(path.name for path in found)) or "none"
        raise ValueError(
            f"{folder}: expected checkpoint_gpu_0.pt (or rank_0_softmax_weight.pt) and so on "
            f"without a gap, one for each rank, got {has}"
        )
    return [ranks[rank] for rank in range(len(found))]


def _rank_of(path: Path) -> int:
    match = PARTIAL_FC_2.fullmatch(path.name) or PARTIAL_FC_1.fullmatch(path.name)
    if match is None:
        raise ValueError(
            f"{path}: expected a file named checkpoint_gpu_(rank).pt or "
            "rank_(rank)_softmax_weight.pt"
        )
    return int(match[1])


# ---- one file -----------------------------------------------------------------------------------


def read_part(path: Path) -> Part:
    """DataError, with file and key, for what is damaged or something else."""
    saved = _load(path)
    if PARTIAL_FC_1.fullmatch(path.name):
        tables = {WEIGHT: _matrix(path, "the tensor", saved)}
        momentum = path.with_name(path.name.replace("weight.pt", "weight_mom.pt"))
        if momentum.exists():
            tables["momentum_buffer"] = _matrix(momentum, "the tensor", _load(momentum))
        return Part(tables, None)
    if not isinstance(saved, dict) or not isinstance(saved.get(TABLE), dict):
        got = ", ".join(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        raise DataError(f"{path}: expected a dict {TABLE!r}, got {got[:200]}")
    if WEIGHT not in saved[TABLE]:
        keys = ", ".join(map(str, saved[TABLE])) or "none"
        raise DataError(f"{path}: {TABLE}: expected a key {WEIGHT!r}, got {keys[:200]}")
    weight = _matrix(path, f"{TABLE}[{WEIGHT!r}]", saved[TABLE][WEIGHT])
    states = _optimizer_states(path, saved.get(OPTIMIZER), weight)
    return Part({WEIGHT: weight, **states}, _step(path, saved.get(STEP)))


def _step(path: Path, value: Any) -> int | None:
    if value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool) or not 0 <= int(value) < 1 << 63:
        raise DataError(
            f"{path}: {STEP}: expected an integer in [0, 2^63), got {str(value)[:40]} "
            f"({type(value).__name__})"
        )
    return int(value)


def _optimizer_states(path: Path, saved: Any, weight: Tensor) -> dict[str, Tensor]:
    """The states of the last parameter, which is the table, as far as they have its shape."""
    try:
        last = saved["param_groups"][-1]["params"][-1]
        states = saved["state"][last]
        found = {name: value for name, value in states.items() if _is_matrix(value)}
    except (KeyError, IndexError, TypeError, AttributeError):
        return {}  # a run that saved no optimiser, or one without momentum
    for name in found:
        if not isinstance(name, str) or name == WEIGHT:
            raise DataError(
                f"{path}: {OPTIMIZER}: expected states of an optimiser by name, got one called "
                f"{str(name)[:40]!r}"
            )
    return {name: value for name, value in found.items() if value.shape == weight.shape}


def _is_matrix(value: Any) -> bool:
    """Whether it is a plain tensor of floats in memory, [C, D]."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.dim() == 2
        and value.is_floating_point()
    )


def _matrix(path: Path, key: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise DataError(f"{path}: {key}: expected a tensor [C, D], got {type(value).__name__}")
    if not _is_matrix(value) or value.shape[1] == 0:
        raise DataError(f"{path}: {key}: expected floats [C, D], got {describe(value)}")
    check_owned(value, f"{path}: {key}")
    return value.detach()


# ---- without running it -------------------------------------------------------------------------


class _NumpyKind:
    """Stands for numpy.dtype: its name and the order of bytes."""

    def __init__(self, name: Any = "", *_: Any) -> None:
        self.name, self.big = str(name), False

    def __setstate__(self, state: Any) -> None:
        self.big = state[1] in (">", b">")


class _NumpyValue:
    """Stands for numpy.ndarray and for scalars of which nothing here has a use."""

    def __setstate__(self, state: Any) -> None:
        pass


INTEGERS = [f"{sign}{size}" for sign in "iu" for size in (1, 2, 4, 8)]


def _numpy_scalar(kind: Any, data: Any) -> int | _NumpyValue:
    """An integer's value: of the step, perhaps."""
    if not isinstance(kind, _NumpyKind) or kind.name not in INTEGERS or len(data) > 8:
        return _NumpyValue()
    return int.from_bytes(data, "big" if kind.big else "little", signed=kind.name[0] == "i")


def _numpy_array(*_: Any) -> _NumpyValue:
    return _NumpyValue()


NUMPY = [
    (_NumpyKind, "numpy.dtype"),
    (_NumpyValue, "numpy.ndarray"),
    *(
        (stand_in, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for stand_in, name in ((_numpy_scalar, "scalar"), (_numpy_array, "_reconstruct"))
    ),
]


def _load(path: Path) -> Any:
    try:
        zipped = check_saved(path)
        with torch.serialization.safe_globals(NUMPY):
            return torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except DataError:
        raise
    # torch's reader raises whatever its parsing trips over
    except Exception as error:
        raise DataError(
            f"{path}: not a file of tensors that can be read ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    """What torch found, without its advice to load the file and run it."""
    text = str(error)
    found = text.partition("WeightsUnpickler error:")[2] or text
    first = found.strip().partition("\n")[0].partition(". Please")[0]
    return f"{type(error).__name__}: {first[:300]}"
