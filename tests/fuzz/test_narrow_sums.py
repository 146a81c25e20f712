"""What is allowed for sums of narrowed G is above what narrowing does, and not far above."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from draws import CASES, any_draw, inputs
from narrow_sums import SUMS, spare
from pair_cases import in_dtype, outcome
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.base.disturbance import distance


class Narrowed(TorchDispatchMode):
    """Rounds what a term that many scores share has for a gradient, before it is summed."""

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        node = torch._C._current_autograd_node()
        of_shared = node is not None and node.name() in ("AddBackward0", "SubBackward0")
        if of_shared and func.overloadpacket.__name__ == "sum":
            args = (args[0].bfloat16().double(), *args[1:])
        return func(*args, **(kwargs or {}))


# a temperature is no term
@pytest.mark.parametrize("name", [name for name in SUMS if SUMS[name].leaf != "temperature"])
def test_between_what_is_done_and_a_multiple(name: str) -> None:
    case, shares = CASES[name], []
    at = 1 + case.leaves.index(SUMS[name].leaf)
    for number in range(40):
        exact = inputs(case, any_draw(random.Random(number)))
        t = in_dtype(case, exact, torch.float64)
        truth = outcome(case, t, case.formula)
        if not all(part.isfinite().all() for part in truth):
            continue
        with Narrowed():
            narrowed = outcome(case, in_dtype(case, exact, torch.float64), case.formula)
        leaf, most = spare(name, "cuda", "bf16", torch.float32, exact, truth[0])
        error = distance(narrowed[at], truth[at])
        assert leaf == SUMS[name].leaf
        assert error <= most * (1 + 1e-9) + 1e-12 * float(truth[at].norm())
        shares.append(error / most if most else 0.0)
    # the roundings' signs are not all one
    assert max(shares) > 1 / 16
