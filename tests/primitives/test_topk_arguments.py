"""`pairwise_topk`'s op keeps its contract, and what does not fit is refused."""

from __future__ import annotations

import warnings

import pytest
import torch

from fused_losses.pairwise.topk import pairwise_topk
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.listed import LISTED
from fused_losses.primitives.topk.op import quantize_rows


def test_opcheck(streamed: str) -> None:
    x, y = torch.randn(6, 4), torch.randn(20, 4)
    labels = torch.arange(6, dtype=torch.int32), torch.arange(20, dtype=torch.int32) % 7
    p = TopkInputs(x, y, x_labels=labels[0], y_labels=labels[1], k=3, match="same")
    torch.library.opcheck(
        getattr(torch.ops.fused_losses, f"pair_topk_{streamed}").default, tuple(p)
    )


def test_opcheck_of_listed_pairs() -> None:
    x, y = torch.randn(6, 4), torch.randn(20, 4)
    index = torch.randint(-1, 20, (6, 3))
    leaves = x.clone().requires_grad_(), y.clone().requires_grad_()
    torch.library.opcheck(LISTED.op("bounded"), (*leaves, None, index.clamp_min(0), "cosine"))
    grad = torch.randn(6, 3, dtype=torch.float64)
    torch.library.opcheck(
        LISTED.op("bounded", "_backward"), (grad, x, y, None, index, "cosine", True, True)
    )


def test_transforms(streamed: str) -> None:
    y = torch.randn(30, 4)
    x = torch.randn(5, 4)
    f = lambda x: pairwise_topk(x, y, 3, "euclidean", backend=streamed)[0].square().sum()
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(f(leaf), leaf)
    assert torch.equal(torch.func.grad(f)(x), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        leaf = x.clone().requires_grad_()
        assert torch.equal(torch.autograd.grad(compiled(leaf), leaf)[0], want)
    first = torch.autograd.grad(f(leaf), leaf, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="second derivative.*values taken again"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(x=[1.0]), TypeError, "x: expected a tensor"),
        (dict(x=torch.randn(3)), ValueError, "x: expected two dimensions"),
        (dict(x=torch.ones(2, 4).long()), TypeError, "x: expected a floating point"),
        (dict(x=torch.ones(2, 4).bool()), TypeError, "x: expected a floating point"),
        (dict(y=torch.randn(3, 5)), ValueError, r"y: expected \[M, 4\]"),
        (dict(k=0), ValueError, r"k: expected a value in \[1, 2048\]"),
        (dict(k=2_049), ValueError, "k: expected a value"),
        (dict(k=2.0), TypeError, "k: expected an integer"),
        (dict(metric="euclid"), ValueError, "metric: expected one of"),
        (dict(match="equal"), ValueError, "match: expected one of"),
        (dict(match="same"), ValueError, "x_labels: expected labels"),
        (dict(x_labels=torch.arange(2), match="same"), ValueError, "y_labels: expected a tensor"),
        (
            dict(x_labels=torch.arange(3), y_labels=torch.arange(9), match="same"),
            ValueError,
            "x_labels: expected shape",
        ),
        (dict(exclude=torch.zeros(2)), TypeError, "exclude: expected an integer"),
        (dict(exclude=torch.zeros(3, 1).long()), ValueError, "exclude: expected shape"),
        (dict(screen="int4"), ValueError, "screen: expected one of"),
        (dict(screen=quantize_rows(torch.randn(8, 4))), ValueError, "screen: expected the Quant"),
        (dict(VI=torch.eye(4)), ValueError, "VI: expected None with metric='euclidean'"),
        (
            dict(y=quantize_rows(torch.randn(9, 4)), metric="cityblock"),
            ValueError,
            "y: expected float rows",
        ),
        (
            dict(y=quantize_rows(torch.randn(9, 4))._replace(scale=torch.ones(8))),
            TypeError,
            r"y.scale: expected float32 \[9\]",
        ),
        (
            dict(y=quantize_rows(torch.randn(9, 4))._replace(signs=torch.ones(1, 5))),
            TypeError,
            r"y.signs: expected int8 \[rounds, 4\]",
        ),
        *(
            (
                dict(screen=quantize_rows(torch.randn(9, 4)), metric=metric),
                ValueError,
                f"screen: expected one of .* with metric='{metric}'",
            )
            for metric in ("correlation", "hellinger", "mahalanobis")
        ),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    given = dict(x=torch.randn(2, 4), y=torch.randn(9, 4), k=2) | change
    with pytest.raises(error, match=words):
        pairwise_topk(given.pop("x"), given.pop("y"), given.pop("k"), **given)


def test_quantize_rows_checks() -> None:
    with pytest.raises(TypeError, match="y: expected a floating point"):
        quantize_rows(torch.ones(3, 3).long())
    for wrong, error in ((dict(rows=0), ValueError), (dict(rows=1.5), TypeError)):
        with pytest.raises(error, match="rows: expected"):
            quantize_rows(torch.ones(3, 3), **wrong)
    with pytest.raises(TypeError, match="rotate: expected True, False or None, got 1"):
        quantize_rows(torch.ones(3, 3), rotate=1)
    with pytest.raises(TypeError, match="seed: expected an integer"):
        quantize_rows(torch.ones(3, 3), seed=0.5)
