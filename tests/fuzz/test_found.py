"""What drawn hard data found: each as the call that showed it."""

from __future__ import annotations

import pytest
import torch
from conftest import require
from draws import CASES, Draw, excess

FOUND = {
    # a class without pairs, in whose sum the loss has slope 1e6, set the scale of float16's G
    "steep in nothing": (
        "orthogonal_projection",
        Draw((29, 29, 8), "decaying", "all distinct", torch.float16, "cuda", 847525359),
    ),
    # a boundary a class took its rows' gradients up in 16 bits
    "one boundary, many rows": (
        "margin_loss_none",
        Draw((7, 17, 33), "plain", "all distinct", torch.bfloat16, "bounded", 1259257193),
    ),
}


@pytest.mark.parametrize("find", list(FOUND))
def test_found(find: str) -> None:
    name, draw = FOUND[find]
    require(draw.backend)
    share, found = excess(CASES[name], draw)
    assert share <= 1, found
