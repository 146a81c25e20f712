"""Pairs of the batch among margin softmax's negatives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batch_negative_cases import formula, pair_scores
from conftest import widest

from fused_losses import margins
from fused_losses.functions.margin_softmax import margin_softmax
from fused_losses.functions.unpg import UNPG, unpg_margin_softmax


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_margin_softmax_options_against_the_formula(reduction: str, backend: str) -> None:
    dtype = widest(backend)
    x = (9 * torch.randn(30, 6, dtype=dtype)).requires_grad_()
    w = torch.randn(40, 6, dtype=dtype, requires_grad=True)
    labels = torch.randint(40, (30,))
    labels[::7] = -100
    classes = torch.cat([labels[labels >= 0].unique(), torch.tensor([0, 5, 39])]).unique()
    margin = margins.MagFace(l_a=1.0)  # it needs the norms, and adds a penalty
    options = dict(margin=margin, scale=20.0, negatives=UNPG(0.8), classes=classes)
    got = unpg_margin_softmax(x, w, labels, reduction=reduction, backend=backend, **options)

    valid = labels >= 0
    kept, ids = x[valid], labels[valid]
    cosine = F.normalize(kept) @ F.normalize(w[classes]).T
    is_target = ids[:, None] == classes
    norm = kept.norm(dim=1)
    moved = margin(cosine[is_target], norm)
    z = 20.0 * cosine.masked_scatter(is_target, moved)
    shared = formula(pair_scores(x, labels), 20.0, 0.8).expand(len(z), 1)
    losses = torch.cat([z, shared], 1).logsumexp(1) - 20.0 * moved + margin.penalty(norm)
    wanted = torch.zeros(30, dtype=dtype).masked_scatter(valid, losses)
    wanted = {"mean": losses.mean(), "sum": losses.sum(), "none": wanted}[reduction]
    tight = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, wanted, rtol=tight, atol=tight)
    up = torch.rand_like(got)
    found = torch.autograd.grad((got * up).sum(), (x, w))
    truth = torch.autograd.grad((wanted * up).sum(), (x, w))
    for g, t in zip(found, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=tight, atol=tight)


def test_margins_that_bend_the_other_classes(backend: str) -> None:
    dtype = widest(backend)
    x, w = (torch.randn(n, 5, dtype=dtype, requires_grad=True) for n in (20, 30))
    labels = torch.randint(30, (20,))
    margin = margins.CurricularFace(0.5).eval()
    margin.t.fill_(0.25)  # exact in its float32
    loss = unpg_margin_softmax(x, w, labels, margin=margin, scale=16.0, backend=backend)
    cosine = F.normalize(x) @ F.normalize(w).T
    target = cosine.gather(1, labels[:, None])
    hard = cosine > torch.cos(torch.acos(target.detach()) + 0.5)
    assert hard.sum() > 30  # the others beside the targets
    z = torch.where(hard, cosine * (0.25 + cosine), cosine)
    z = 16.0 * z.scatter(1, labels[:, None], margin(target[:, 0])[:, None])
    shared = formula(pair_scores(x, labels), 16.0, 1.5).expand(20, 1)
    wanted = F.cross_entropy(torch.cat([z, shared], 1), labels)
    tight = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(loss, wanted, rtol=tight, atol=tight)
    found, truth = (torch.autograd.grad(value, (x, w)) for value in (loss, wanted))
    for g, t in zip(found, truth, strict=True):
        torch.testing.assert_close(g, t, rtol=100 * tight, atol=tight)
    scale = torch.tensor(16.0, requires_grad=True)
    if backend == "reference":
        loss = unpg_margin_softmax(x, w, labels, margin=margin, scale=scale, backend=backend)
        assert torch.autograd.grad(loss, scale)[0] != 0
    else:
        with pytest.raises(NotImplementedError, match="scale: its gradient"):
            unpg_margin_softmax(x, w, labels, margin=margin, scale=scale, backend=backend)


def test_without_pairs_it_is_margin_softmax(backend: str) -> None:
    dtype = widest(backend)
    x, w = torch.randn(5, 6, dtype=dtype), torch.randn(9, 6, dtype=dtype)
    labels = torch.full((5,), 3)
    margin = margins.ArcFace(0.3)
    got = unpg_margin_softmax(x, w, labels, margin=margin, backend=backend)
    wanted = margin_softmax(x, w, labels, margin=margin, backend=backend)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "negatives: expected a UNPG", {"negatives": 1.5}),
        (ValueError, "gradient: expected", {"gradient": "none"}),
        (ValueError, "scale: expected", {"scale": -1.0}),
        (IndexError, "labels: expected class ids", {"labels": torch.full((2,), 3)}),
    ],
)
def test_bad_input_of_the_softmax(error: type[Exception], message: str, change: dict) -> None:
    given = dict(embeddings=torch.ones(2, 4), weight=torch.ones(3, 4), labels=torch.ones(2).long())
    with pytest.raises(error, match=message):
        unpg_margin_softmax(**(given | change))


def test_bad_whisker() -> None:
    with pytest.raises(ValueError, match="whisker: expected"):
        UNPG(-1.0)
