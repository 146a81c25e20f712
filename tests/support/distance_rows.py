"""Rows, formulas and bounds of distances."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_losses.primitives.distances.inputs import FLAT

F64 = torch.float64
DTYPES = [F64, torch.float32, torch.bfloat16, torch.float16]
POSITIVE = ("hellinger", "jensenshannon", "kl")
BOUNDS = {F64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


def rows(metric: str, *shape: int, dtype: torch.dtype = F64) -> Tensor:
    """Rows that a metric is meant for, rounded to the dtype."""
    x = torch.randn(*shape, dtype=F64)
    if metric in FLAT:
        x = torch.randint(0, 3, shape).to(F64)
    elif metric in POSITIVE:
        x = torch.rand(*shape, dtype=F64) + 0.01
    elif metric == "poincare":
        x = x / x.norm(dim=-1, keepdim=True) * (0.1 + 0.8 * torch.rand(*shape[:-1], 1, dtype=F64))
    elif metric == "lorentz":
        space = (x[..., 1:] / shape[-1] ** 0.5).to(dtype).to(F64)
        x = torch.cat([(1 + space.square().sum(-1, keepdim=True)).sqrt(), space], -1)
    return x.to(dtype)


def few(backend: str, enough: bool) -> None:
    """Skips what the host would execute CUDA kernels for long, beyond cases that are enough."""
    if backend == "cuda" and not enough:
        pytest.skip("the host executes CUDA kernels slowly")


def options(metric: str, d: int) -> dict:
    if metric == "mahalanobis":
        a = torch.randn(d, d + 3, dtype=F64)
        return dict(VI=a @ a.T / d + torch.eye(d, dtype=F64))
    return dict(p=3.5) if metric == "minkowski" else {}


def close(got: Tensor, want: Tensor, bound: float) -> None:
    """Every element, relative to itself."""
    got, want = got.to(F64), torch.as_tensor(want, dtype=F64)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want, rtol=bound, atol=0, equal_nan=True)


def near(got: Tensor, want: Tensor, bound: float) -> None:
    """As a whole: sums cancel where single elements do not say much."""
    assert got.shape == want.shape
    off = float((got.to(F64) - want.to(F64)).norm())
    assert off <= bound * float(want.to(F64).norm()) + 1e-13, off


def gradients(f: Callable[..., Tensor], upstream: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    return list(torch.autograd.grad((f(*leaves) * upstream).sum(), leaves))
