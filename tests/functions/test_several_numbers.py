"""Arguments of several numbers: none of them is a tensor whose gradient would be lost."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fused_losses
from fused_losses import losses, margins, metrics, miners

X, LABELS = torch.randn(6, 4), torch.arange(6) % 2
Given = tuple[Any, ...]
CALLS: dict[tuple[str, str], Callable[[Given], object]] = {
    ("adaptive_temperature", "bounds"): lambda v: fused_losses.adaptive_temperature(
        X, X, X, X, bounds=v[:2]
    ),
    ("binary_codes", "window"): lambda v: fused_losses.binary_codes(X, window=v[:2]),
    **{
        (name, side): lambda v, name=name, side=side: getattr(fused_losses, name)(
            X, LABELS, **{side: v[:2]}
        )
        for name in ("mine_pairs", "mine_triplets")
        for side in ("positive_range", "negative_range")
    },
    ("sinkhorn", "unbalanced"): lambda v: fused_losses.sinkhorn(X, X, unbalanced=v[:2]),
    ("OCALoss", "weights"): lambda v: losses.OCALoss(3, 4, torch.eye(3), v),
    ("MatryoshkaLoss", "weights"): lambda v: losses.MatryoshkaLoss(nn.Identity(), (1, 2, 3), v),
    **{
        ("BatchEasyHardMiner", side): lambda v, side=side: miners.BatchEasyHardMiner(
            **{side: v[:2]}
        )
        for side in ("allowed_pos_range", "allowed_neg_range")
    },
    ("dir_at_far", "far"): lambda v: metrics.dir_at_far(X, LABELS, X, LABELS, far=v),
    ("all_pairs_tar_at_far", "far"): lambda v: metrics.all_pairs_tar_at_far(X, LABELS, far=v),
}


def several(module: ModuleType) -> set[tuple[str, str]]:
    """The arguments of public functions and classes that hold several floats."""
    found = set()
    for name, value in vars(module).items():
        if name.startswith("_") or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if not value.__module__.startswith("fused_losses"):
            continue
        for p in inspect.signature(value).parameters.values():
            words = str(p.annotation)
            if "float" in words and any(kind in words for kind in ("tuple", "Sequence", "list")):
                found.add((name, p.name))
    return found


def test_every_argument_of_several_numbers_is_here() -> None:
    public = (fused_losses, losses, margins, metrics, miners)
    assert set.union(*map(several, public)) == set(CALLS)


@pytest.mark.parametrize("case", CALLS, ids=", ".join)
def test_a_tensor_among_them_is_refused(case: tuple[str, str]) -> None:
    number: Tensor = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(TypeError, match=rf"^{case[1]}: expected .*(gradient|Tensor)"):
        CALLS[case]((number, number, number))
