"""Every metric-learning module of the catalogue: lists of a miner, a second batch, a memory."""

from __future__ import annotations

import pytest
import torch
from catalogue_table import CASES, built, labelled
from torch import Tensor, nn

from fused_losses import losses
from fused_losses.losses.module import MetricLoss
from fused_losses.miners import CrossBatchMemory, TripletMarginMiner

N, D = 12, 5
NAMES = sorted(
    e.name
    for e in losses.catalogue()
    if issubclass(e.module, MetricLoss)
    and e.block in ("pairs", "contrastive")
    # rows with labels are all that it is called with
    and CASES[e.name].call is labelled
)
ONE_BATCH = ("NPairsLoss",)  # refuses a second one


def batch(name: str, n: int = N) -> tuple[nn.Module, Tensor, Tensor]:
    """A module, unit rows [n, D] and labels of three classes."""
    rows = torch.randn(n, D, dtype=torch.float64)
    return built(name, D), rows.requires_grad_(), torch.arange(n) % 3


def all_pairs(labels: Tensor, others: Tensor, alone: bool) -> tuple[Tensor, ...]:
    same = labels[:, None] == others
    own = torch.eye(*same.shape, dtype=torch.bool) & alone
    return (*(same & ~own).nonzero().T, *(~same).nonzero().T)


def answer(module: nn.Module, x: Tensor, *given: object) -> tuple[Tensor, Tensor]:
    loss = module(x, *given)
    (grad,) = torch.autograd.grad(loss, x, allow_unused=True, materialize_grads=True)
    return loss.detach(), grad


@pytest.mark.parametrize("name", NAMES)
def test_a_list_of_all_pairs_is_none(name: str) -> None:
    module, x, labels = batch(name)
    want = answer(module, x, labels)
    got = answer(module, x, labels, all_pairs(labels, labels, True))
    assert want[1].abs().sum() > 0
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ONE_BATCH])
def test_a_list_of_all_pairs_of_two_batches_is_none(name: str) -> None:
    module, x, labels = batch(name)
    y, y_labels = torch.randn(7, D, dtype=torch.float64), torch.arange(7) % 4
    want = answer(module, x, labels, None, y, y_labels)
    got = answer(module, x, labels, all_pairs(labels, y_labels, False), y, y_labels)
    assert want[1].abs().sum() > 0
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_a_miners_triplets_take_part_alone(name: str) -> None:
    """No other row has a gradient, and a list of nothing has none at all."""
    module, x, labels = batch(name)
    a, p, n = TripletMarginMiner(margin=0.05)(x, labels)
    kept = (a < 6) & (p < 6) & (n < 6)
    a, p, n = a[kept], p[kept], n[kept]
    loss, grad = answer(module, x, labels, (a, p, n))
    met = torch.zeros(N, dtype=torch.bool)
    met[torch.cat([a, p, n])] = True
    assert loss.isfinite() and len(a) > 2
    if name != "MarginLoss":  # of which beta has a part for every row
        assert grad.abs().sum() > 0
    assert (grad[~met] == 0).all() and (~met).any()
    loss, grad = answer(module, x, labels, (a[:0], p[:0], n[:0]))
    assert loss.isfinite() and (grad == 0).all()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ONE_BATCH])
def test_a_memory(name: str) -> None:
    """What has been stored is no pair of itself."""
    module, x, labels = batch(name)
    memory = CrossBatchMemory(32, D, dtype=torch.float64)
    memory.enqueue(torch.randn(9, D, dtype=torch.float64), torch.arange(9) % 3)
    ids = memory.enqueue(x, labels)
    a, p, b, n = all_pairs(labels, memory.labels, False)
    other = ids[a] != memory.ids[p]
    want = module(x, labels, (a[other], p[other], b, n), memory.embeddings, memory.labels)
    torch.testing.assert_close(memory.loss(module, x, labels, ids), want)
    mined = memory.loss(module, x, labels, ids, TripletMarginMiner(margin=0.05))
    assert mined.isfinite() and mined.requires_grad


@pytest.mark.parametrize("name", ONE_BATCH)
def test_a_second_batch_is_refused(name: str) -> None:
    module, x, labels = batch(name)
    with pytest.raises(ValueError, match="ref_emb: expected None"):
        module(x, labels, None, x.detach().clone(), labels)
