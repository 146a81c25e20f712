"""A screen by coordinates along principal axes: exact, its bounds, and what a bank of them is."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from conftest import require
from topk_oracle import HARD, check, inverse
from torch import Tensor

from fused_losses import PrincipalRows, pairwise_topk, principal_rows, quantize_rows
from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.topk.inputs import HEADS, STEP, TOPK_KINDS, TopkInputs
from fused_losses.primitives.topk.op import PAIR_TOPK, select


def decaying(n: int, d: int) -> Tensor:
    """Rows whose first entries hold most of their length, as embeddings have them."""
    return torch.randn(n, d) * torch.arange(1, d + 1) ** -0.7


def turned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1])).Q
    return x @ rotation, y @ rotation


def inputs(x: Tensor, y: Tensor, rows: PrincipalRows, **asked: object) -> TopkInputs:
    return TopkInputs(x, y, **dict(zip(HEADS, rows, strict=True)), **asked)


def capabilities() -> list[str]:
    names = ["default", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
    return names[: names.index(extension().capability()) + 1]


@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("data", HARD)
def test_the_k_best_of_hard_rows(data: str, kind: str) -> None:
    require("cpu")
    rows = HARD[data](70)
    d = rows.shape[1]
    for dtype in (torch.float64, torch.float32):
        x, y = rows[:4].to(dtype), rows.to(dtype)
        for coordinates in {None, (1, 1), (1, d), (d, d)}:
            heads = principal_rows(y, coordinates=coordinates, rows=33)
            for k, largest in ((4, False), (4, True), (70, True)):
                p = inputs(x, y, heads, kind=kind, k=k, largest=largest)
                check(select(p, "cpu")[1], x, y, kind, k, largest, own=False)


@pytest.mark.parametrize("metric", ["dot", "cosine", "euclidean", "angular"])
@pytest.mark.parametrize("d", [5, 48, 130])
def test_a_decaying_spectrum(d: int, metric: str, backend: str) -> None:
    """Turned or not, with copies, labels and exclusions; on every backend."""
    x, y = decaying(30, d), decaying(2_000, d)
    y[1_000:1_040] = y[:40]
    labels = dict(x_labels=torch.arange(30) % 3, y_labels=torch.arange(2_000) % 3)
    kept_out = dict(match="different", exclude=torch.randint(-1, 2_000, (30, 2)), **labels)
    for rows, bank in ((x, y), turned(x, y)):
        for given in ({}, kept_out, {"largest": False}, {"largest": True}):
            want = pairwise_topk(rows, bank, 9, metric, backend="reference", **given)
            for dtype in (torch.float32, torch.float64):
                heads = principal_rows(bank.to(dtype))
                asked = dict(screen=heads, backend=backend, **given)
                found = pairwise_topk(rows.to(dtype), bank.to(dtype), 9, metric, **asked)
                assert torch.equal(found[1], want[1])
                torch.testing.assert_close(found[0].float(), want[0])


@pytest.mark.parametrize("capability", capabilities())
@pytest.mark.parametrize("d", [1, 40, 64, 200])
def test_the_answer_is_one_on_any_threads(d: int, capability: str) -> None:
    require("cpu")
    x, y = decaying(700, d), decaying(3_000, d)
    first = max(1, d // 5)
    rows = principal_rows(y, coordinates=(first, min(d, first + 2 * STEP)))
    want = pairwise_topk(x, y, 12, backend="cpu")
    threads = torch.get_num_threads()
    extension().force_capability(capability)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = pairwise_topk(x, y, 12, screen=rows, backend="cpu")
            assert torch.equal(found[1], want[1])
        own = pairwise_topk(y, None, 3, screen=rows, skip_self=True, backend="cpu")
    finally:
        extension().force_capability(None)
        torch.set_num_threads(threads)
    assert torch.equal(own[1], pairwise_topk(y, None, 3, skip_self=True, backend="cpu")[1])


@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_rows_without_an_order_and_of_any_length(kind: str) -> None:
    """NaN, inf, zeros, and lengths that float32 does not hold, on both sides."""
    require("cpu")
    x, y = (decaying(n, 40).double() for n in (12, 300))
    for rows in (x, y):
        rows[1], rows[2], rows[3, 5], rows[4, 0] = 0, torch.nan, torch.inf, torch.nan
        rows[5], rows[6], rows[7] = rows[5] * 1e30, rows[6] * 1e-30, rows[7] * 1e-9
    for dtype in (torch.float32, torch.float64):
        a, b = x.to(dtype), y.to(dtype)
        heads = principal_rows(b, coordinates=(8, 40))
        for largest in (False, True):
            asked = dict(kind=kind, k=300, largest=largest)
            found = select(inputs(a, b, heads, **asked), "cpu")[1]
            want = select(TopkInputs(a, b, **asked), "cpu")[1]
            assert torch.equal(found, want)
        metric = "euclidean" if kind == "sqeuclidean" else kind
        found = pairwise_topk(a, b, 9, metric, screen=heads)
        assert torch.equal(found[1], pairwise_topk(a, b, 9, metric)[1])


# ---- the bounds ---------------------------------------------------------------------------------


def long(rows: Tensor) -> np.ndarray:
    return rows.double().numpy().astype(np.longdouble)


def real_scores(x: Tensor, y: Tensor, kind: str, largest: bool) -> np.ndarray:
    """What the screen ranks by, in long double, larger is better. [N, M]"""
    a, b = long(x), long(y)
    product = a @ b.T
    if kind == "cosine":
        product = product * inverse(b) * inverse(a)[:, None]
    if kind == "sqeuclidean":
        product = product - (b * b).sum(-1) / 2
        return -product if largest else product
    return product if largest else -product


def orthonormal(axes: Tensor) -> np.ndarray:
    """The nearest axes that are, in long double, by Newton's iteration."""
    a = long(axes)
    for _ in range(3):
        a = 1.5 * a - 0.5 * a @ (a.T @ a)
    return a


def adversaries(d: int) -> list[tuple[Tensor, Tensor]]:
    """Rows whose tails point one way or the other, so that a bound by lengths is met."""
    y = decaying(60, d).double()
    along = torch.cat([y[:20], -y[:20]])
    beside = y[:20] + 1e-5 * torch.randn(20, d)
    far = 1e4 * torch.randn(d) + y
    return [
        (along, y),
        (beside, y),
        (far[:20], far),
        (1e15 * along, 1e-12 * y),
        (1e-20 * along, 1e-15 * y),
        (torch.randn(20, d).double(), torch.randn(60, d).double()),
    ]


def upper(
    x: Tensor, y: Tensor, kind: str, largest: bool, rows: PrincipalRows, level: int
) -> np.ndarray:
    score, error = extension().topk_head_scores(x, y, kind, largest, *rows, level)
    return long(score) + long(error)


@pytest.mark.parametrize("capability", capabilities())
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_no_score_is_above_its_bound_and_some_meet_it(kind: str, capability: str) -> None:
    require("cpu")
    nearest, lost = 1.0, 0
    extension().force_capability(capability)
    try:
        for (x, y), largest in ((rows, o) for rows in adversaries(90) for o in (True, False)):
            for dtype in (torch.float64, torch.float32):
                a, b = x.to(dtype), y.to(dtype)
                heads = principal_rows(b, coordinates=(10, 74))
                real = real_scores(a, b, kind, largest)
                size = 1 if kind == "cosine" else long(a.double().norm(dim=1))[:, None]
                size = size * (1 if kind == "cosine" else long(b.double().norm(dim=1)))
                for level in range(heads.rest.shape[1] + 1):
                    bound = upper(a, b, kind, largest, heads, level)
                    assert not (bound < real).any(), (kind, largest, level, dtype)
                    nearest = min(nearest, float(((bound - real) / size).min()))
                # a tail that is told a thousandth too short is found out
                short = heads._replace(tails=heads.tails * 0.999)
                lost += int((upper(a, b, kind, largest, short, 0) < real).sum())
    finally:
        extension().force_capability(None)
    assert nearest < 1e-4
    assert lost > 0


@pytest.mark.parametrize("d", [1, 7, 64, 150])
def test_coordinates_are_within_what_is_told(d: int) -> None:
    y = torch.cat([decaying(90, d).double(), 1e12 + torch.randn(3, d), torch.zeros(2, d)])
    first = max(1, d // 4)
    rows = principal_rows(y, coordinates=(first, d), rows=40)
    axes = orthonormal(rows.axes)
    np.testing.assert_allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-17)
    exact, length = long(y) @ axes, long(y.norm(dim=1))
    stored = torch.cat([rows.first, rows.rest.flatten(1)], dim=1)[:, :d]
    apart = np.linalg.norm((long(stored) - exact).astype(np.float64), axis=1)
    assert (apart <= (rows.moved + 2.0**-24 + 1e-15) * length.astype(np.float64)).all()
    assert rows.moved < 1e-10
    np.testing.assert_allclose(long(rows.tails[0]), length, rtol=2.0**-24)
    for level, tail in enumerate(rows.tails[1:]):
        kept = exact[:, : first + level * STEP]
        left = np.sqrt(np.maximum(length**2 - (kept * kept).sum(1), 0))
        assert (long(tail) >= left).all()
        assert (long(tail) <= left * 1.00001 + 1e-5 * length + 1e-30).all()


def test_it_rules_out_most_pairs_of_a_decaying_spectrum() -> None:
    require("cpu")
    x, y = turned(decaying(20, 200), decaying(4_000, 200))
    rows = principal_rows(y)
    assert rows.first.shape[1] < 50 and rows.axes.shape[1] < 150
    key = long(pairwise_topk(x, y, 10, "dot")[0][:, -1:])
    open_pairs = [float((upper(x, y, "dot", True, rows, level) >= key).mean()) for level in (0, 2)]
    assert open_pairs[0] < 0.2 and open_pairs[1] < 0.05
    flat = principal_rows(torch.randn(4_000, 200))
    assert flat.first.shape[1] > 150


# ---- a bank of them -----------------------------------------------------------------------------


def test_it_is_kept_copied_and_moved() -> None:
    y = decaying(80, 48)
    rows = principal_rows(y)
    kept = io.BytesIO()
    torch.save(tuple(rows), kept)
    kept.seek(0)
    again = [principal_rows(y, rows=9), pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)]
    for other in (*again, rows.to("cpu"), PrincipalRows(*torch.load(kept))):
        assert isinstance(other, PrincipalRows) and other.moved == rows.moved
        for a, b in zip(rows[:4], other[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert rows.to("meta").first.device.type == "meta"
    state = torch.get_rng_state()
    principal_rows(y)
    assert torch.equal(state, torch.get_rng_state())


def test_banks_without_rows_width_or_spread() -> None:
    for shape in ((0, 6), (6, 0), (1, 1)):
        rows = principal_rows(torch.zeros(shape))
        assert rows.first.shape[0] == shape[0] and rows.tails.shape[1] == shape[0]
    for value in (0.0, torch.nan, torch.inf):
        y = torch.full((30, 20), value)
        x = torch.randn(3, 20).abs()
        index = pairwise_topk(x, y, 4, "dot", screen=principal_rows(y))[1]
        assert torch.equal(index, pairwise_topk(x, y, 4, "dot")[1])


def test_opcheck(streamed: str) -> None:
    x, y = decaying(5, 40), decaying(60, 40)
    p = inputs(x, y, principal_rows(y), kind="sqeuclidean", k=3, largest=False)
    torch.library.opcheck(
        PAIR_TOPK.op(streamed), tuple(p), test_utils=("test_schema", "test_faketensor")
    )


def test_gradients_are_those_of_another_screen() -> None:
    x, y = decaying(6, 40).requires_grad_(), decaying(90, 40).requires_grad_()
    slopes = []
    for screen in ("auto", principal_rows(y.detach())):
        values, _ = pairwise_topk(x, y, 5, screen=screen)
        slopes.append(torch.autograd.grad(values.sum(), (x, y)))
    for a, b in zip(*slopes, strict=True):
        assert torch.equal(a, b)


def bad(**change: object) -> PrincipalRows:
    return principal_rows(torch.randn(9, 4))._replace(**change)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(screen=principal_rows(torch.randn(8, 4))), ValueError, "the PrincipalRows of float"),
        (
            dict(screen=bad(), y=quantize_rows(torch.randn(9, 4))),
            ValueError,
            "the PrincipalRows of float rows y",
        ),
        (dict(screen=bad(axes=torch.eye(4))), TypeError, r"screen.axes: expected torch.float64"),
        (dict(screen=bad(axes=torch.eye(4).double()[:, :2])), ValueError, "screen.axes: expected"),
        (dict(screen=bad(tails=torch.ones(2, 8))), TypeError, r"screen.tails: expected .*\(2, 9\)"),
        (dict(screen=bad(rest=torch.ones(9, 1, 31))), TypeError, r"screen.rest: expected"),
        (dict(screen=bad(moved=-1.0)), ValueError, r"screen.moved: expected a value in \[0, 1\)"),
        (dict(screen=bad(), metric="correlation"), ValueError, "got PrincipalRows"),
        (
            dict(screen=bad(), x=torch.randn(2, 3, 4), y=torch.randn(2, 9, 4)),
            ValueError,
            "screen: expected no PrincipalRows beside x",
        ),
    ],
)
def test_bad_input(change: dict, error: type, words: str) -> None:
    given = dict(x=torch.randn(2, 4), y=torch.randn(9, 4), k=2) | change
    with pytest.raises(error, match=words):
        pairwise_topk(given.pop("x"), given.pop("y"), given.pop("k"), **given)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (dict(y=torch.ones(3, 3).long()), TypeError, "y: expected a floating point"),
        (dict(rows=0), ValueError, "rows: expected"),
        (dict(coordinates=3), TypeError, "coordinates: expected two integers"),
        (dict(coordinates=(1, True)), TypeError, "coordinates: expected two integers"),
        (dict(coordinates=(0, 2)), ValueError, "coordinates: expected 1 <= first"),
        (dict(coordinates=(3, 2)), ValueError, "coordinates: expected 1 <= first"),
        (dict(coordinates=(1, 4)), ValueError, "<= kept <= 3, got 1 and 4"),
    ],
)
def test_principal_rows_checks(given: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        principal_rows(**({"y": torch.ones(3, 3)} | given))
