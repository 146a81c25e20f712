"""The authors' numbers for the losses over rows, values and gradients."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from pair_cases import BACKENDS
from places import GOLDEN
from row_loss_cases import require_rows
from row_loss_goldens import GOLDENS

FOLDER = GOLDEN / "pairs"
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]


# the authors' small numbers in divisors are others than ours
LOOSE = {"icnn_full": 1e-6}
# those that ask no backend hold for the CUDA rows, too
ANYWHERE = ("pml_TripletMarginLoss_swap_smooth",)
NAMES = [pytest.param(n, marks=() if n in ANYWHERE else pytest.mark.float64) for n in GOLDENS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_the_authors(name: str, backend: str) -> None:
    with np.load(FOLDER / f"{name}.npz") as stored:
        data: dict[str, Any] = {key: torch.from_numpy(stored[key]) for key in stored.files}
    x, bound = data["x"].requires_grad_(), LOOSE.get(name, 1e-12)
    loss = GOLDENS[name](x, data["labels"], backend=require_rows(backend))
    assert abs(loss - data["loss"]).item() <= bound * abs(data["loss"].item())
    (grad,) = torch.autograd.grad(loss, x)
    assert float((grad - data["grad_x"]).norm()) <= bound * float(data["grad_x"].norm())


def test_every_golden_has_its_source() -> None:
    assert set(GOLDENS) <= set(INDEX)
    assert set(GOLDENS) <= {path.stem for path in FOLDER.glob("*.npz")}
