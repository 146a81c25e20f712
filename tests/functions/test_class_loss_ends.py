"""Losses over classes that ask more of them than a softmax: the authors' numbers, edges, state.

Their literal formulas on hard data are drawn in tests/fuzz (`class_loss_draws`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from class_loss_draws import LOSSES
from head_goldens import FOLDER, INDEX, exactness, golden
from torch import Tensor

from fused_losses import ClassCenters, linear_cross_entropy, margin_softmax, margins
from fused_losses.class_losses import (
    AGCE,
    ALDR,
    GCE,
    LDR,
    MAE,
    MSE,
    NCE,
    SCE,
    ActivePassive,
    ClassLoss,
    CrammerSinger,
    MappedLDR,
    Softmax,
    WestonWatkins,
    class_loss,
)
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS

AUTHORS: dict[str, ClassLoss] = {
    "ldr_LDR": MappedLDR(2.0, 1.0),
    "ldr_MSE": MSE(),
    "ldr_CS": CrammerSinger(1.0),
    "ldr_WW": WestonWatkins(1.0),
    "ldr_CEmean": LDR(0.0, 1.0),
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_numbers(name: str, backend: str) -> None:
    dtype, within = exactness(backend)
    data = golden(name, dtype)
    x = data["logits"].requires_grad_()
    table = torch.eye(x.shape[1], dtype=dtype)
    got = class_loss(x, table, data["labels"], AUTHORS[name], normalize=False, backend=backend)
    (grad,) = torch.autograd.grad(got, x)
    assert float(got.detach()) == pytest.approx(INDEX[name]["loss"], rel=within)
    torch.testing.assert_close(grad.double(), data["grad_logits"], rtol=within, atol=within)


def test_the_authors_mean_absolute_error_is_always_zero() -> None:
    """They sum y - p without absolute values; `MAE` is the paper's."""
    assert abs(INDEX["ldr_MAE"]["loss"]) < 1e-15


def test_every_golden_of_heads_is_asked_for() -> None:
    robust = {f"ldr_{name}" for name in ("AGCE", "RCE", "SCE", "TruncGCE")}  # probability losses
    elsewhere = robust | {"ldr_ALDR", "biasloss_global", "biasloss_local"}
    elsewhere |= {"dsimplex_5", "spherical_z_loss"}
    stored = {path.stem for path in FOLDER.glob("*.npz")}
    assert set(AUTHORS) | {"ldr_MAE"} | elsewhere == stored == set(INDEX)


# ---- rules, derivatives, edges -------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASS_FOLDS)
def test_slopes_are_those_of_the_terms(name: str) -> None:
    rule = CLASS_FOLDS[name]
    c = torch.linspace(-0.99, 0.97, 40, dtype=torch.float64).view(2, 20).requires_grad_()
    params = {"sface": [8.0, 1.2], "sphereface2": [4.0, 0.4, 3.0, 0.0]}.get(
        name, [3.0, *([1e-5, 20.0] if rule.params == 3 else [2.0] * (rule.params - 1))]
    )
    for count in rule.values:
        # a logsumexp is at least any score
        given = 4.0 if name == "entropy" else 0.3
        values = None if count == 0 else torch.full((count, 2, 1), given, dtype=torch.float64)
        terms, slopes = rule.terms(c, values, params), rule.slopes(c, values, params)
        assert len(terms) == len(slopes) == len(rule.kinds)
        for term, slope in zip(terms, slopes, strict=True):
            got = torch.zeros_like(c) + slope
            summed = term.sum() + 0 * c.sum()
            (want,) = torch.autograd.grad(summed, c, retain_graph=True)
            torch.testing.assert_close(got.detach(), want, rtol=1e-9, atol=1e-12)
            assert got.isfinite().all()
        # what bounds a float16 head's gradient; the means of u alone are steeper, without one
        bound = rule.steepest(params) * torch.as_tensor(rule.times(values))
        bounded = [0, -1] if name.startswith("mapped") else range(len(slopes))
        if not name.startswith("divergence"):
            for at in bounded:
                assert (torch.as_tensor(slopes[at]).abs() <= bound * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_on_the_reference(name: str) -> None:
    loss, _ = LOSSES[name]
    x = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    call = lambda x, w: class_loss(x, w, torch.tensor([0, 3, 2]), loss, backend="reference")
    assert torch.autograd.gradcheck(call, (x, w))
    assert torch.autograd.gradgradcheck(call, (x, w))


PLAIN: dict[str, tuple[ClassLoss, Callable]] = {
    name: (type(loss)(**{**vars(loss), "scale": 0.5 if name == "LDR" else 1.0}), ends)
    for name, (loss, ends) in LOSSES.items()
}


@pytest.mark.float64
@pytest.mark.parametrize("name", PLAIN)
def test_scores_of_ten_thousand_and_equal_ones(name: str, backend: str) -> None:
    """Hard scores: +-1e4, all equal, all 0, one class; value and gradient are the formula's."""
    loss, ends = PLAIN[name]
    rows = torch.randn(4, 6, dtype=torch.float64)
    rows[:, 0] = rows[:, 0].abs()  # softplus of -1e4 is 0 in the formula
    rows = torch.cat([1e4 * rows, rows.sign() * 1e4, torch.full((1, 6), 3.0).double()])
    y = torch.arange(len(rows)) % 6
    hot = F.one_hot(y, 6).bool()
    for given, own in ((rows, hot), (rows[:, :1], hot[:, :1] | True)):
        labels = y if given.shape[1] > 1 else torch.zeros_like(y)
        x, z = given.clone().requires_grad_(), given.clone().requires_grad_()
        eye = torch.eye(given.shape[1], dtype=torch.float64)
        options: dict[str, Any] = dict(normalize=False, reduction="none", backend=backend)
        got, want = class_loss(x, eye, labels, loss, **options), ends(z, own)
        # scores of 1e4 are rounded by 2e-12, which MappedLDR multiplies by the number of classes
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
        (slope,) = torch.autograd.grad(got.sum(), x)
        (truth,) = torch.autograd.grad(want.sum(), z)
        if name not in ("CrammerSinger",):  # which of equal ones gets it is open
            torch.testing.assert_close(slope, truth, rtol=1e-9, atol=1e-10)


def test_maps_where_softplus_is_no_number(backend: str) -> None:
    """Scores of -1e4: softplus is below every float; the shares of a row's sum are not."""
    x = torch.tensor([[-1e4, -1e4 - 1, -1e4 - 2]], requires_grad=True)
    y = torch.tensor([0])
    options: dict[str, Any] = dict(normalize=False, backend=backend)
    got = class_loss(x, torch.eye(3), y, MappedLDR(2.0, 1.0), **options)
    z = torch.tensor([[0.0, -1, -2]], dtype=torch.float64, requires_grad=True)
    u = 3 * z.softmax(1)
    want = ((u + torch.tensor([[0.0, 2, 2]])).logsumexp(1) - math.log(3) - u[:, 0]).mean()
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    slopes = [torch.autograd.grad(got, x)[0].double(), torch.autograd.grad(want, z)[0]]
    # l near 1e4 is rounded by 5e-4 where u is made of it: to first order the value is freed of that
    torch.testing.assert_close(*slopes, rtol=2e-3, atol=1e-4)


def test_several_labels_and_sub_centres(backend: str) -> None:
    """Each label meets the negatives alone; NCE, MSE and LDR count a class given twice once."""
    dtype, within = exactness(backend)
    x, w = torch.randn(3, 4, dtype=dtype), torch.randn(6, 2, 4, dtype=dtype)
    labels = torch.tensor([[0, 3, 3], [5, -100, -100], [-100] * 3])
    cosine = torch.einsum("nd,ckd->nck", F.normalize(x), F.normalize(w, dim=2)).amax(2).double()
    for name in ("NCE", "MSE", "LDR", "ActivePassive", "Softmax_capped", "GCE_capped"):
        loss, ends = LOSSES[name]
        want = []
        for i, mine in enumerate(([0, 3, 3], [5])):
            others = [j for j in range(6) if j not in mine]
            z = torch.stack([16 * cosine[i, [own, *others]] for own in mine])
            want.append(
                ends(
                    z, F.one_hot(torch.zeros(len(mine), dtype=torch.int64), z.shape[1]).bool()
                ).mean()
            )
        got = class_loss(x, w, labels, loss, reduction="none", backend=backend)
        wide = torch.stack([*want, torch.zeros((), dtype=torch.float64)])
        torch.testing.assert_close(got.double(), wide, rtol=20 * within, atol=20 * within)
    one, other = CrammerSinger(0.3, 16.0), torch.tensor([[0, 3], [5, -100], [-100, -100]])
    got = class_loss(x, w, other, one, reduction="none", backend=backend)

    def hinges(i: int, mine: list[int]) -> Tensor:
        best = max(cosine[i, j] for j in range(6) if j not in mine)
        return (0.3 + 16 * (best - cosine[i, mine])).clamp_min(0).mean()

    wide = torch.stack([hinges(0, [0, 3]), hinges(1, [5]), torch.zeros((), dtype=torch.float64)])
    torch.testing.assert_close(got.double(), wide, rtol=20 * within, atol=20 * within)


# ---- the head ------------------------------------------------------------------------------------

SHARDED = [name for name in LOSSES if name != "CrammerSinger"]


def of_head(rank: int) -> dict[str, list[Tensor]]:
    """Loss and gradients of a head on this rank's part of one batch."""
    world = dist.get_world_size()
    found = {}
    for name in SHARDED:
        loss, _ = LOSSES[name]
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(8, 4, dtype=torch.float64, generator=generator)
        y = torch.randint(0, 11, (8,), generator=generator)
        head = ClassCenters(
            11, 4, margin=loss, dtype=torch.float64, gradient_scale="global_sum", seed=1
        )
        own = slice(8 // world * rank, 8 // world * (rank + 1))
        part = x[own].clone().requires_grad_()
        value = head(part, y[own])
        found[name] = [
            value.detach(),
            *torch.autograd.grad(value, (part, head.weight)),
            head.weight.detach(),
            x,
            y,
        ]
    return found


@pytest.mark.processes
def test_two_ranks_are_one_process() -> None:
    ranks = processes.run(2, of_head)
    for name in SHARDED:
        _, ends = LOSSES[name]
        table = torch.cat([rank[name][3] for rank in ranks]).requires_grad_()
        x, y = ranks[0][name][4].clone().requires_grad_(), ranks[0][name][5]
        z = 16 * F.normalize(x) @ F.normalize(table).T
        want = ends(z, F.one_hot(y, 11).bool()).mean()
        dx, dw = torch.autograd.grad(want, (x, table))
        for rank in ranks:
            torch.testing.assert_close(rank[name][0], want.detach(), rtol=1e-10, atol=1e-12)
        parts = [torch.cat([rank[name][at] for rank in ranks]) for at in (1, 2)]
        torch.testing.assert_close(parts, [dx, dw], rtol=1e-8, atol=1e-11)


def test_a_sampled_head_counts_the_sample() -> None:
    for loss in (LDR(1.0, 0.5, scale=8.0), NCE(scale=8.0), WestonWatkins(0.3, 8.0)):
        head = ClassCenters(40, 4, margin=loss, dtype=torch.float64, sample_rate=0.3, seed=2)
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 7, 7, 39, 20])
        ids = torch.cat([ids for ids, _ in head._groups(y[:, None])]).sort().values
        assert 5 < len(ids) < 40
        want = class_loss(x, head.weight, y, loss, classes=ids)
        torch.testing.assert_close(head(x, y), want, rtol=1e-10, atol=1e-12)


def test_a_head_refuses_what_goes_to_one_class() -> None:
    with pytest.raises(
        ValueError, match="margin: expected a loss whose gradient all classes share"
    ):
        ClassCenters(5, 3, margin=CrammerSinger())


# ---- bad numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: ALDR(0), ValueError, "num_samples: expected an integer >= 1, got 0"),
        (lambda: ALDR(4, alpha=1.0), ValueError, "alpha: expected a value > 1"),
        (lambda: ALDR(4, lam=0.0), ValueError, "lam: expected"),
        (lambda: ALDR(4, map="l2"), ValueError, "map: expected"),
        (lambda: _ask(samples=torch.tensor([0, 4])), IndexError, r"samples: .* \[0, 4\), got 4"),
        (lambda: _ask(samples=torch.tensor([0, -1])), IndexError, r"samples: .*got -1"),
        (lambda: _ask(samples=torch.tensor([0])), ValueError, r"samples: expected shape \(2,\)"),
        (lambda: _ask(samples=torch.ones(2)), TypeError, "samples: expected int64"),
        (
            lambda: _ask(labels=torch.tensor([[0, 1], [1, 2]])),
            ValueError,
            "labels: expected one a row with",
        ),
        (lambda: LDR(lam=0.0), ValueError, "lam: expected"),
        (lambda: LDR(softcap=2.0), ValueError, "softcap: expected none of LDR"),
        (lambda: NCE(softcap=2.0), ValueError, "softcap: expected None of NCE"),
        (lambda: Softmax(softcap=0.0), ValueError, "softcap: expected"),
        (lambda: Softmax(z_loss=-1.0), ValueError, "z_loss: expected"),
        (
            lambda: Softmax(margins.MVSoftmax("am"), softcap=2.0),
            ValueError,
            "softcap: expected None beside a margin that bends",
        ),
        (lambda: ActivePassive(NCE()), TypeError, "passive: expected a loss of the label's"),
        (lambda: ActivePassive(MAE(scale=4.0), scale=3.0), ValueError, "passive: expected a scale"),
        (lambda: ActivePassive(AGCE(), alpha=-1.0), ValueError, "alpha: expected"),
        (lambda: _capped(bias=torch.zeros(5)), ValueError, "bias: expected its default"),
        (lambda: _capped(label_smoothing=1.5), ValueError, "label_smoothing: expected a value in"),
        (
            lambda: margin_softmax(
                torch.ones(2, 3), torch.ones(5, 3), torch.zeros(2, 2).long(), label_smoothing=0.1
            ),
            ValueError,
            "labels: expected one a row with SmoothedSoftmax",
        ),
        (lambda: _capped(return_stats=True), ValueError, "return_stats: expected its default"),
        (lambda: _capped(margin=GCE()), ValueError, "softcap: expected its default"),
        (
            lambda: linear_cross_entropy(
                torch.ones(2, 3), torch.ones(5, 3), torch.ones(2, 5), softcap=2.0
            ),
            ValueError,
            "target: expected class ids beside a softcap",
        ),
    ],
)
def test_bad_numbers(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


def _ask(**changed: Tensor) -> Tensor:
    given = dict(labels=torch.tensor([0, 1]), samples=torch.tensor([0, 1])) | changed
    return ALDR(4)(torch.ones(2, 3), torch.ones(5, 3), given["labels"], given["samples"])


def _capped(**options: Any) -> Any:
    return margin_softmax(
        torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 1]),
        **{"margin": None, "softcap": 2.0, **options},
    )  # fmt: skip


def test_active_passive_pairs_are_their_sums() -> None:
    x, w, y = torch.randn(5, 4).double(), torch.randn(7, 4).double(), torch.arange(5)
    reverse = SCE(0.0, 1.0, math.log(1e4))
    for passive in (MAE(), reverse, AGCE(3.0, 1.5)):
        alone = type(passive)(**{**vars(passive), "scale": 4.0})
        pair = ActivePassive(passive, alpha=2.0, beta=3.0, scale=4.0)
        want = 2 * class_loss(x, w, y, NCE(scale=4.0)) + 3 * class_loss(x, w, y, alone)
        torch.testing.assert_close(class_loss(x, w, y, pair), want)
