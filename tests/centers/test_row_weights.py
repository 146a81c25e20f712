"""Rows that count for more or less in the head's mean, and embeddings [N, T, D]."""

from __future__ import annotations

from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from class_center_cases import C, D, N, data, head
from torch import Tensor

from fused_losses.margins import CosFace

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stepped": dict(optimizer="sgd", optimizer_options=dict(lr=0.5)),
    "sub-centres": dict(sub_centers=2),
}


def weights() -> Tensor:
    """One row without any weight, which holds NaN."""
    drawn = torch.rand(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    drawn[5] = 0
    return drawn


def literal(table: Tensor, x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    unit = table / table.norm(dim=-1, keepdim=True)
    cosine = (x / x.norm(dim=1, keepdim=True)) @ unit.flatten(0, -2).T
    cosine = cosine.view(len(x), C, -1).amax(2)
    own = torch.nn.functional.one_hot(y.clamp_min(0), C).double()
    z = 16 * (cosine - 0.2 * own)
    loss = torch.logsumexp(z, 1) - z.gather(1, y.clamp_min(0)[:, None])[:, 0]
    w = w * (y >= 0)
    return (loss * w).sum() / w.sum()


def answers(_: int) -> dict[str, Any]:
    ranks, rank = (2, dist.get_rank()) if dist.get_world_size() > 1 else (1, 0)
    own = slice(0, N) if ranks == 1 else (slice(0, 8), slice(8, N))[rank]
    found: dict[str, Any] = {}
    for name, options in OPTIONS.items():
        made = head(margin=CosFace(0.2), gradient_scale="global_sum", **options)
        before = made.weight.detach().clone()
        x, y = data()
        x = x.detach()[own].requires_grad_()
        loss = made(x, y[own], row_weight=weights()[own])
        loss.backward()
        moved = (before - made.weight) / 0.5 if name == "stepped" else made.weight.grad
        found[name] = dict(loss=loss.detach(), dx=x.grad, dw=moved, table=before)
    if ranks == 2:
        x, y = (t[own] for t in data())
        only = weights()[own] if rank == 0 else None
        with pytest.raises(ValueError, match="weights or none on all"):
            made(x, y, row_weight=only)
        bad = -weights()[own] if rank == 0 else weights()[own]
        told = (
            (ValueError, "row_weight: expected values >= 0")
            if rank == 0
            else (RuntimeError, "rank 0 refused")
        )
        with pytest.raises(told[0], match=told[1]):
            made(x, y, row_weight=bad)
    return found


@pytest.mark.processes
@pytest.mark.parametrize("world", [1, 2])
def test_weights_of_rows(world: int) -> None:
    found = processes.run(world, answers)
    for name in OPTIONS:
        table = torch.cat([ranks[name]["table"] for ranks in found]).requires_grad_()
        x, y = data()
        expected = literal(table, x, y, weights())
        dx, dw = torch.autograd.grad(expected, (x, table))
        for ranks in found:
            torch.testing.assert_close(ranks[name]["loss"], expected, rtol=1e-10, atol=1e-10)
        for key, whole in (("dx", dx), ("dw", dw)):
            parts = torch.cat([ranks[name][key] for ranks in found])
            torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-10, msg=f"{name} {key}")


def test_what_counts_for_nothing_may_be_anything() -> None:
    made, (x, y) = head(), data()
    assert made(x, y, row_weight=torch.zeros(N, dtype=torch.float64)) == 0
    ones = made(x, y, row_weight=torch.ones(N))
    torch.testing.assert_close(ones, made(x, y), rtol=1e-12, atol=0)
    w = torch.rand(C, dtype=torch.float64)
    by_class = made(x, y, row_weight=w[y.clamp_min(0)])
    unit = torch.nn.functional.normalize
    scores = 16 * unit(x) @ unit(made.weight).T
    own = torch.nn.functional.one_hot(y.clamp_min(0), C).bool()
    angle = (scores / 16).clamp(-1, 1).acos() + 0.5 * own
    expected = torch.nn.functional.cross_entropy(16 * angle.cos(), y, weight=w)
    torch.testing.assert_close(by_class, expected, rtol=1e-9, atol=1e-9)


def test_bad_weights() -> None:
    made, (x, y) = head(), data()
    for given, kind, text in (
        (torch.ones(N - 1), ValueError, r"row_weight: expected shape \(13,\)"),
        (torch.ones(N, dtype=torch.int64), TypeError, "row_weight: expected a floating point"),
        (torch.full((N,), torch.nan), ValueError, "row_weight: expected values >= 0"),
        (torch.ones(N, requires_grad=True), TypeError, "row_weight: .* without gradient"),
    ):
        with pytest.raises(kind, match=text):
            made(x, y, row_weight=given)


def test_embeddings_of_sequences() -> None:
    made, (x, y) = head(), data()
    tokens, labels = x.detach()[:12].view(4, 3, D).requires_grad_(), y[:12].view(4, 3)
    w = weights()[:12]
    loss, stats = made(tokens, labels, row_weight=w.view(4, 3), return_stats=True)
    flat, told = made(x[:12], y[:12], row_weight=w, return_stats=True)
    assert loss == flat and stats.hit.shape == stats.target_cosine.shape == (4, 3)
    assert torch.equal(stats.target_cosine.flatten(), told.target_cosine)
    (dx,) = torch.autograd.grad(loss, tokens)
    assert torch.equal(dx.view(12, D), torch.autograd.grad(flat, x)[0][:12])
    with pytest.raises(ValueError, match=r"labels: expected shape \(4, 3\)"):
        made(tokens, labels[:, :2])
