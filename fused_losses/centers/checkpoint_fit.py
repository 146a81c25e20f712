"""Whether a state fits a checkpoint: by key and shape, with rows in common, with states to make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from fused_losses.centers.state import TableState


def check_fits(state: dict[str, Any], saved: Metadata, path: Path, resize: bool) -> None:
    """Every tensor of the state is in the checkpoint, with its shape: DCP's own text is a page."""
    for key, value in _leaves(state):
        if key not in saved.state_dict_metadata:
            raise ValueError(f"state[{key!r}]: {path} has no such entry")
        there = saved.state_dict_metadata[key]
        if not isinstance(value, Tensor) or not isinstance(there, TensorStorageMetadata):
            continue
        rows = int(resize and value.dim() > 0)
        if len(there.size) != value.dim() or there.size[rows:] != value.shape[rows:]:
            raise ValueError(
                f"state[{key!r}]: expected shape {tuple(there.size)} as in {path}, got "
                f"shape {tuple(value.shape)}, {value.dtype}"
            )


class CommonRows(DefaultLoadPlanner):
    """Loads what overlaps: DCP finds it by offsets, and asks that sizes be equal besides."""

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert metadata is not None
        there = dict(metadata.state_dict_metadata)
        for key, value in self.state_dict.items():
            saved = there[key]
            if isinstance(value, Tensor) and isinstance(saved, TensorStorageMetadata):
                there[key] = replace(saved, size=value.shape)
        self.metadata = replace(metadata, state_dict_metadata=there)


def expect(state: Any, there: Iterable[str], prefix: str = "") -> None:
    """Tells the parts of a state that can make room for them what names a checkpoint has."""
    if not isinstance(state, dict):
        return
    if isinstance(state, TableState):
        state.expect(key.removeprefix(prefix) for key in there if key.startswith(prefix))
    for name, part in state.items():
        expect(part, there, f"{prefix}{name}.")


def _leaves(state: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key, value) with DCP's own names for nested entries; lists of plain values are leaves."""
    yield from flatten_state_dict(state)[0].items()
