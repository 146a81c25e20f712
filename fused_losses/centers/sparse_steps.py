"""Optimisers of torch that cannot step a table by the sparse gradient of a sample: said in time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

SPARSE = (torch.optim.SparseAdam, torch.optim.LBFGS)
UNDECAYED = (torch.optim.SGD, torch.optim.Adagrad)  # sparse, too, without weight decay

_tables = WeakTensorKeyDictionary()  # parameters that have had a sparse gradient of a head


def watch(table: Tensor) -> None:
    """Whoever steps this parameter is asked whether it can."""
    _tables[table] = True
    _ask_every_optimizer()


def gradient(table: Tensor, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The gradient of some rows, in parts, as a sparse tensor of the table's shape."""
    ids, values = table.new_empty(0, dtype=torch.int64), table.new_empty((0, *table.shape[1:]))
    if parts:
        ids, values = (torch.cat(part) for part in zip(*parts, strict=True))
    return torch.sparse_coo_tensor(ids[None], values, table.shape, check_invariants=False)


@functools.cache
def _ask_every_optimizer() -> None:
    register_optimizer_step_pre_hook(_refuse_unfit)


def _refuse_unfit(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Raises before anything is stepped; optimisers that are not torch's own know best."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim.") or isinstance(optimizer, SPARSE):
        return
    for group in optimizer.param_groups:
        decay = group.get("weight_decay", 0)
        if isinstance(optimizer, UNDECAYED) and not decay:
            continue
        for p in group["params"]:
            if p.grad is not None and p.grad.is_sparse and p in _tables:
                raise RuntimeError(
                    f"{kind.__name__}(weight_decay={decay}) cannot step ClassCenters.weight, whose "
                    "gradient is sparse below sample_rate=1: expected torch.optim.SGD or Adagrad "
                    "without weight decay, or SparseAdam, for its parameter group; or "
                    "ClassCenters(optimizer='sgd', 'adamw' or 'adagrad'), whose weight decay "
                    "reaches the rows that took no part, too"
                )
