"""kl and jensenshannon of entries whose ratio is no number of their dtype, against 60 digits."""

from __future__ import annotations

from typing import Any

import mpmath
import pytest
import torch
from conftest import require
from mpmath import mpf
from torch import Tensor

from fused_losses.primitives.distances.op import distance_matrix

# exponents of entries and their partners: ratios of 2^3, 2^130 and more, both ways, and near ones
EXPONENTS = {
    torch.float32: ((-80, 60), (60, -80), (-100, 45), (2, -1), (-3, -2), (-120, -118), (0, 0)),
    torch.float64: ((-600, 500), (500, -600), (-990, 60), (2, -1), (-3, -2), (-900, -898), (0, 0)),
}


def sides(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[1, 7] each, whose last entries are nearly equal."""
    found = []
    for at in range(2):
        powers = torch.tensor([pair[at] for pair in EXPONENTS[dtype]])
        found.append(torch.ldexp(1 + torch.rand(1, len(powers), dtype=dtype) / 2, powers))
    found[1][0, -1] = found[0][0, -1] * (1 + 1e-3)
    return found[0], found[1]


def _kl(x: list[Any], y: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    value = mpmath.fsum(a * mpmath.log(a / b) for a, b in zip(x, y, strict=True))
    to_x = [mpmath.log(a / b) + 1 for a, b in zip(x, y, strict=True)]
    return value, to_x, [-a / b for a, b in zip(x, y, strict=True)]


def _jensenshannon(x: list[Any], y: list[Any]) -> tuple[Any, list[Any], list[Any]]:
    middle = [(a + b) / 2 for a, b in zip(x, y, strict=True)]
    to_x, to_y = ([mpmath.log(a / m) for a, m in zip(s, middle, strict=True)] for s in (x, y))
    value = mpmath.sqrt((mpmath.fdot(x, to_x) + mpmath.fdot(y, to_y)) / 2)
    return value, to_x, to_y


TRUTH = {"kl": _kl, "jensenshannon": _jensenshannon}


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.float64, marks=pytest.mark.float64)], ids=str
)
@pytest.mark.parametrize("kind", TRUTH)
def test_far_ratios(kind: str, dtype: torch.dtype, backend: str) -> None:
    require(backend)
    if backend == "cuda" and dtype == torch.float64:
        pytest.skip("cuda takes no float64")
    x, y = (side.requires_grad_() for side in sides(dtype))
    got = distance_matrix(x, y, kind=kind, backend=backend)
    # of jensenshannon a slope is 1 over the distance, which is no number near 1
    weight = 4 * got.detach() if kind == "jensenshannon" else torch.ones_like(got)
    slopes = torch.autograd.grad((weight * got).sum(), [x, y])
    with mpmath.workdps(60):
        value, *right = TRUTH[kind](*([mpf(a) for a in s[0].tolist()] for s in (x, y)))
        # a difference of two logarithms is rounded in their lengths
        length = max(max(map(abs, pair)) for pair in EXPONENTS[dtype])
        step = (16 + 2 * length) * torch.finfo(dtype).eps
        assert abs(got.item() - value) <= step * abs(value)
        for mine, want in zip(slopes, right, strict=True):
            for a, b in zip(mine[0].tolist(), want, strict=True):
                # out of range: inf, of the right sign
                if abs(b) > torch.finfo(dtype).max:
                    assert a == float("-inf")
                else:
                    assert abs(a - b) <= step * max(1, abs(b)), (a, float(b))
