"""MUVERA's encodings: against loops, and their products against Chamfer similarity."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from muvera_draws import literal
from torch import Tensor

import fused_losses.functional as fl

torch.manual_seed(0)
X = torch.randn(3, 7, 5, dtype=torch.float64)
PLANES = fl.muvera_planes(2, 5, 3, seed=1, dtype=torch.float64)
SKETCH = fl.CountSketch.drawn((2, 5), 4, seed=2)


def dense(sketch: fl.CountSketch) -> Tensor:
    """[..., D] places and signs as matrices [..., D, d]."""
    return torch.nn.functional.one_hot(sketch.index, sketch.width) * sketch.sign[..., None]


@pytest.mark.parametrize("fill", [False, True])
@pytest.mark.parametrize("bits", [0, 1, 2, 4])
@pytest.mark.parametrize("side", ["query", "document"])
@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_against_loops(side: str, bits: int, length: int, fill: bool) -> None:
    if side == "query" and fill:
        pytest.skip("queries are not filled")
    planes = fl.muvera_planes(3, 5, bits, seed=3, dtype=torch.float64)
    x = X[:, :length]
    got = fl.muvera_encode(x, planes, side=side, fill_empty=fill)
    want = torch.stack([literal(row, planes, side, fill) for row in x])
    assert got.shape == (3, 3 * 2**bits * 5)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("way", ["mask", "lengths"])
@pytest.mark.parametrize("side", ["query", "document"])
def test_what_is_left_out_has_no_say(side: str, way: str) -> None:
    lengths = torch.tensor([4, 0, 7])
    kept = torch.arange(7) < lengths[:, None]
    x = torch.where(kept[:, :, None], X, torch.nan).requires_grad_()
    given: dict[str, Any] = {way: kept if way == "mask" else lengths}
    fill = side == "document"
    got = fl.muvera_encode(x, PLANES, side=side, fill_empty=fill, **given)
    rows = [row[:n] for row, n in zip(X, lengths.tolist(), strict=True)]
    torch.testing.assert_close(got, torch.stack([literal(r, PLANES, side, fill) for r in rows]))
    (slope,) = torch.autograd.grad(got.sum(), x)
    assert slope.isfinite().all()
    assert (slope[~kept] == 0).all()


@pytest.mark.parametrize("kind", ["matrix", "sketch"])
def test_projections(kind: str) -> None:
    final = fl.CountSketch.drawn((2 * 8 * 4,), 6, seed=4)
    both = [SKETCH, final] if kind == "sketch" else [dense(SKETCH), dense(final)]
    given: dict[str, Any] = dict(projection=both[0], final_projection=both[1])
    got = fl.muvera_encode(X, PLANES, side="document", fill_empty=True, **given)
    inner = [literal(row, PLANES, "document", True, dense(SKETCH)) for row in X]
    torch.testing.assert_close(got, torch.stack(inner) @ dense(final).double())


def test_leading_dimensions() -> None:
    x = torch.randn(2, 3, 4, 5)
    got = fl.muvera_encode(x, PLANES, side="query")
    each = [[fl.muvera_encode(set_, PLANES, side="query") for set_ in row] for row in x]
    assert torch.equal(got, torch.stack([torch.stack(row) for row in each]))


def test_neighbours_in_the_gray_code_differ_in_one_sign() -> None:
    # along a half circle the partitions of two orthogonal planes come one after another
    turn = torch.linspace(0.1, 6.2, 50)
    x = torch.stack([turn.cos(), turn.sin()], 1)
    planes = torch.eye(2)[None]
    places = [
        int(fl.muvera_encode(row[None], planes, side="query").view(4, 2).abs().sum(1).argmax())
        for row in x
    ]
    runs = [p for i, p in enumerate(places) if i == 0 or p != places[i - 1]]
    steps = {(b - a) % 4 for a, b in pairwise(runs)}
    assert len(runs) >= 4 and steps in ({1}, {3})


def test_products_are_near_chamfer_and_nearer_with_repetitions() -> None:
    generator = torch.Generator().manual_seed(7)
    unit = lambda *shape: torch.nn.functional.normalize(
        torch.randn(*shape, generator=generator), dim=-1
    )
    documents = unit(20, 30, 16)
    # a query is of points near those of one document
    near = documents[:, :8] + 0.3 * unit(20, 8, 16)
    queries = torch.nn.functional.normalize(near, dim=-1)
    chamfer = fl.maxsim(queries, documents)
    errors = []
    for repetitions in (1, 64):
        planes = fl.muvera_planes(repetitions, 16, 4, seed=8)
        q = fl.muvera_encode(queries, planes, side="query")
        d = fl.muvera_encode(documents, planes, side="document", fill_empty=True)
        found = q @ d.T / repetitions
        # no partition's mean has a larger product than its largest
        assert (found <= chamfer + 1e-4).all()
        assert (found.argmax(dim=1) == torch.arange(20)).float().mean() >= 0.9
        errors.append(found.diagonal().sub(chamfer.diagonal()).std())
    assert errors[1] < errors[0]


@pytest.mark.parametrize("side", ["query", "document"])
def test_gradients(side: str) -> None:
    matrix = dense(SKETCH).double().requires_grad_()
    x = X[:2, :4].clone().requires_grad_()

    def encoded(x: Tensor, matrix: Tensor) -> Tensor:
        fill = side == "document"
        return fl.muvera_encode(x, PLANES, side=side, projection=matrix, fill_empty=fill)

    assert torch.autograd.gradcheck(encoded, (x, matrix))
    assert torch.autograd.gradgradcheck(encoded, (x, matrix))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_point_without_a_side_shows(value: float) -> None:
    x = X.clone()
    x[1, 2, 3] = value
    got = fl.muvera_encode(x, PLANES, side="document", fill_empty=True)
    assert got.isnan().all(dim=1).tolist() == [False, True, False]
    assert got[::2].isfinite().all()


def test_compiled_and_transformed() -> None:
    x = X.float().requires_grad_()
    call = lambda x: fl.muvera_encode(
        x, PLANES, side="document", projection=SKETCH, fill_empty=True
    )
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), call(x))
    slope = torch.func.grad(lambda x: call(x).square().sum())(x.detach())
    (want,) = torch.autograd.grad(call(x).square().sum(), x)
    torch.testing.assert_close(slope, want)


def test_planes_are_those_of_their_seed() -> None:
    assert torch.equal(fl.muvera_planes(2, 5, 3, seed=1, dtype=torch.float64), PLANES)
    assert not torch.equal(fl.muvera_planes(2, 5, 3, seed=2, dtype=torch.float64), PLANES)


SIDE: dict[str, Any] = dict(side="query")
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a vector": (
        lambda: fl.muvera_encode(X[0, 0], PLANES, **SIDE),
        ValueError,
        "points: expected [",
    ),
    "integers": (
        lambda: fl.muvera_encode(X.long(), PLANES, **SIDE),
        TypeError,
        "points: expected a",
    ),
    "planes": (
        lambda: fl.muvera_encode(X, PLANES[:, :4], **SIDE),
        ValueError,
        "planes: expected [R, 5",
    ),
    "learnt planes": (
        lambda: fl.muvera_encode(X, PLANES.clone().requires_grad_(), **SIDE),
        TypeError,
        "planes: expected",
    ),
    "a side": (
        lambda: fl.muvera_encode(X, PLANES, side="key"),
        ValueError,
        "side: expected one of",
    ),
    "a filled query": (
        lambda: fl.muvera_encode(X, PLANES, fill_empty=True, **SIDE),
        ValueError,
        "fill_empty: expected False",
    ),
    "mask": (
        lambda: fl.muvera_encode(X, PLANES, mask=torch.ones(3, 6).bool(), **SIDE),
        ValueError,
        "mask: expected (3, 7)",
    ),
    "lengths": (
        lambda: fl.muvera_encode(X, PLANES, lengths=torch.tensor([1, 8, 2]), **SIDE),
        ValueError,
        "lengths: expected values in [0, 7]",
    ),
    "both": (
        lambda: fl.muvera_encode(
            X, PLANES, lengths=torch.tensor([1, 2, 2]), mask=torch.ones(3, 7).bool(), **SIDE
        ),
        ValueError,
        "lengths: expected mask or lengths",
    ),
    "projection": (
        lambda: fl.muvera_encode(X, PLANES, projection=torch.ones(1, 5, 2), **SIDE),
        ValueError,
        "projection: expected [2, 5, any]",
    ),
    "a place": (
        lambda: fl.muvera_encode(X, PLANES, projection=SKETCH._replace(width=2), **SIDE),
        IndexError,
        "projection.index: expected class ids in [0, 2)",
    ),
    "bits": (lambda: fl.muvera_planes(1, 2, 17), ValueError, "bits: expected a value in [0, 16]"),
    "repetitions": (lambda: fl.muvera_planes(0, 2, 1), ValueError, "repetitions: expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    call, kind, told = BAD[name]
    with pytest.raises(kind, match=re.escape(told)):
        call()
