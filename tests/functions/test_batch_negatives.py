"""UNPG: the authors' numbers, the materialised formula, exact quartiles of streamed pairs."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from batch_negative_cases import formula, pair_scores
from conftest import widest
from counted import COUNTER, told_by_child
from places import GOLDEN
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_losses import margins
from fused_losses.functions.unpg import UNPG, unpg_margin_softmax
from fused_losses.primitives.shared_negatives import bounded as shared_tiles
from fused_losses.primitives.shared_negatives import inputs as shared_negatives_inputs
from fused_losses.primitives.shared_negatives import op as batch_negatives
from fused_losses.primitives.shared_negatives.op import add_shared, shared_negatives

FOLDER = GOLDEN / "negatives"
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]
GOLDENS = sorted(name for name in INDEX if name.startswith("unpg"))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small batch passes several tiles, the last ones ragged."""
    monkeypatch.setattr(shared_tiles, "TILE_SIDE", 16)


@pytest.mark.float64
@pytest.mark.parametrize("name", GOLDENS)
def test_value_and_gradients_are_the_authors(name: str, backend: str) -> None:
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    params = INDEX[name]["params"]
    arc = "ArcFace" in name
    margin = margins.ArcFace(params["m"], "none") if arc else margins.CosFace(params["m"])
    x, w = data["x"].requires_grad_(), data["w"].requires_grad_()
    loss = unpg_margin_softmax(
        x,
        w,
        data["labels"],
        margin=margin,
        scale=params["s"],
        negatives=UNPG(params["wisk"]),
        backend=backend,
    )
    loss.backward()
    torch.testing.assert_close(loss, data["loss"], rtol=1e-11, atol=0)
    torch.testing.assert_close(x.grad, data["grad_x"], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(w.grad, data["grad_w"], rtol=1e-9, atol=1e-11)

    shared = shared_negatives(
        x, data["labels"], scale=params["s"], whisker=params["wisk"], backend=backend
    )
    wanted = torch.logsumexp(params["s"] * data["sn_kept"], 0)
    torch.testing.assert_close(shared, wanted, rtol=1e-13, atol=0)
    assert len(data["sn_kept"]) < len(data["sn"])  # the filter filters


class Case(NamedTuple):
    n: int
    classes: int
    scale: float = 16.0
    whisker: float = 1.5
    normalize: bool = True
    ignored: float = 0.0


CASES = {
    "two rows": Case(2, 50),
    "three rows": Case(3, 50),
    "a tile": Case(16, 5),
    "ragged tiles": Case(37, 5, 64.0, 0.5),
    "the box alone": Case(37, 5, whisker=0.0),
    "ignored": Case(40, 5, ignored=0.3, whisker=0.5),
    "products": Case(33, 6, 1.0, 0.7, normalize=False),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradients_are_the_formula(name: str, backend: str) -> None:
    case, dtype = CASES[name], widest(backend)
    x = torch.randn(case.n, 7, dtype=dtype, requires_grad=True)
    labels = torch.arange(case.n) % case.classes
    labels[torch.rand(case.n) < case.ignored] = -100
    scale = torch.tensor(case.scale, dtype=torch.float64, requires_grad=True)
    got = shared_negatives(
        x, labels, scale=scale, whisker=case.whisker, normalize=case.normalize, backend=backend
    )
    wide = x.detach().double().requires_grad_()
    wanted = formula(pair_scores(wide, labels, case.normalize), scale, case.whisker)
    tight = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=tight, atol=tight)
    found = torch.autograd.grad(3 * got, (x, scale))
    truth = torch.autograd.grad(3 * wanted, (wide, scale))
    for g, t in zip(found, truth, strict=True):
        torch.testing.assert_close(g.double(), t, rtol=100 * tight, atol=10 * tight)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["generic", "ties", "zero", "tiny", "mixed", "near"])
def test_quartiles_are_exact(kind: str, dtype: torch.dtype) -> None:
    # integers and powers of two: products without rounding, so any order of the sum has these bits
    n = 61
    labels = torch.randint(4, (n,))
    valid = torch.rand(n) < 0.9
    step = 2.0**-11 if dtype == torch.float32 else 2.0**-26
    x = {
        "generic": torch.randint(-2000, 2000, (n, 3)).double(),
        "ties": torch.randint(-1, 2, (n, 2)).double(),
        "zero": torch.zeros(n, 2).double(),
        "tiny": torch.randint(-9, 10, (n, 2)).double() * 2.0**-70,  # products are denormal
        "mixed": torch.randint(-9, 10, (n, 1)) * 2.0 ** torch.randint(-30, 30, (n, 1)).double(),
        # 1 + i j eps: all bits but the last few are alike, and zero below the first 16
        "near": torch.stack([torch.ones(n), torch.randint(1, 9, (n,)) * step], 1).double(),
    }[kind].to(dtype)
    pairs = shared_negatives_inputs.SharedInputs(x, labels, valid)
    got = shared_tiles._quartiles(pairs)
    scores = x @ x.T
    keep = ((labels[:, None] != labels) & valid[:, None] & valid).triu(1)
    ordered = scores[keep].sort().values
    assert got.dtype == dtype
    assert torch.equal(got, ordered[[len(ordered) // 4, 3 * len(ordered) // 4]])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_quartiles_of_rounded_scores_have_the_bits_that_later_sweeps_see(
    dtype: torch.dtype,
) -> None:
    x = F.normalize(torch.randn(53, 19, dtype=dtype))
    pairs = shared_negatives_inputs.SharedInputs(
        x, torch.arange(53) % 7, torch.ones(53, dtype=torch.bool)
    )
    seen = torch.cat([t.cosine[t.negative] for t in shared_tiles._tiles(pairs)])
    ordered = seen.sort().values
    assert torch.equal(
        shared_tiles._quartiles(pairs),
        ordered[[len(ordered) // 4, 3 * len(ordered) // 4]],
    )


def test_the_kept_interval_is_closed(backend: str) -> None:
    # w = 0 keeps [q1, q3] with its ends: of 1 2 2 3 3 6 those from rank 1 to rank 4
    x = torch.tensor([[1.0], [1.0], [2.0], [3.0]], dtype=widest(backend))
    labels = torch.tensor([0, 1, 2, 3])
    got = shared_negatives(x, labels, scale=1.0, whisker=0.0, normalize=False, backend=backend)
    wanted = torch.tensor([2.0, 2.0, 3.0, 3.0]).logsumexp(0)
    assert abs(got - wanted) < 1e-6


def test_edges(backend: str) -> None:
    x = torch.randn(6, 4, dtype=widest(backend), requires_grad=True)
    same = torch.zeros(6, dtype=torch.int64)
    for rows, labels in ((x, same), (x[:1], same[:1]), (x[:0], same[:0]), (x, same - 100)):
        none = shared_negatives(rows, labels, scale=8.0, backend=backend)
        assert none == -torch.inf
        assert not torch.autograd.grad(none, x)[0].any()
    w = torch.randn(1, 4, dtype=x.dtype, requires_grad=True)
    loss = unpg_margin_softmax(x, w, same, backend=backend)  # no pair and no other class
    assert loss == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (x, w)))
    labels = torch.tensor([0, 1, 2, 0, 1, -100])
    bad = x.detach().clone()
    bad[5, 1] = torch.nan
    assert shared_negatives(bad, labels, scale=8.0, backend=backend).isfinite()
    w = torch.randn(3, 4, dtype=x.dtype, requires_grad=True)
    loss = unpg_margin_softmax(bad.requires_grad_(), w, labels, backend=backend)
    assert all(g.isfinite().all() and g.any() for g in torch.autograd.grad(loss, (bad, w)))
    bad = bad.detach().clone()
    bad[2, 1] = torch.nan
    assert shared_negatives(bad, labels, scale=8.0, backend=backend).isnan()


def test_finite_where_the_exponential_overflows(streamed: str) -> None:
    x = (1 + 0.1 * torch.randn(40, 8)).requires_grad_()
    labels = torch.arange(40) % 9
    got = shared_negatives(x, labels, scale=300.0, backend=streamed)
    wide = x.detach().double()
    wanted = formula(pair_scores(wide, labels), 300.0, 1.5)
    assert abs(got - wanted) < 1e-3 and wanted > 100
    assert torch.autograd.grad(got, x)[0].isfinite().all()


def test_add_shared_is_logaddexp_and_keeps_gradients_finite() -> None:
    for a, b in ((1.0, 2.0), (-torch.inf, 2.0), (1.0, -torch.inf), (-torch.inf, -torch.inf)):
        lse = torch.tensor([a, 800.0], requires_grad=True)
        shared = torch.tensor(b, requires_grad=True)
        out = add_shared(lse, shared)
        torch.testing.assert_close(out[0], torch.logaddexp(torch.tensor(a), torch.tensor(b)))
        for grad in torch.autograd.grad(out.sum(), (lse, shared)):
            assert grad.isfinite().all()


@pytest.mark.parametrize("classes", [1, 3])
def test_a_curve_beside_an_ignored_row_of_nan(classes: int) -> None:
    x, w = torch.randn(3, 4), torch.randn(classes, 4, requires_grad=True)
    x[2] = torch.nan
    x.requires_grad_()
    labels = torch.tensor([0, 0, -100])
    loss = unpg_margin_softmax(x, w, labels, backend="reference")
    slopes = torch.autograd.grad(loss, [x, w], create_graph=True)
    curves = torch.autograd.grad(sum(g.sum() for g in slopes), [x, w])
    assert all(g.isfinite().all() for g in (*slopes, *curves))


def test_half_precision_and_compile(streamed: str) -> None:
    x = torch.randn(40, 16, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(40) % 11
    got = shared_negatives(x, labels, scale=16.0, backend=streamed)
    wanted = formula(pair_scores(x.detach().double(), labels), 16.0, 1.5)
    assert abs(got - wanted) < 1e-4  # the products are float32
    assert torch.autograd.grad(got, x)[0].dtype == torch.bfloat16

    x = torch.randn(40, 16, requires_grad=True)
    run = torch.compile(UNPG(), fullgraph=True, backend="aot_eager", dynamic=True)
    compiled = run(x, labels, 16.0, backend=streamed)
    eager = UNPG()(x, labels, 16.0, backend=streamed)
    assert torch.equal(compiled, eager)
    assert torch.equal(torch.autograd.grad(compiled, x)[0], torch.autograd.grad(eager, x)[0])


def test_op_is_registered_soundly(streamed: str) -> None:
    x = F.normalize(torch.randn(12, 4, dtype=torch.float32)).requires_grad_()
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    given = (x, torch.arange(12) % 3, torch.ones(12, dtype=torch.bool), scale, 1.5)
    torch.library.opcheck(batch_negatives.SHARED_NEGATIVES.op(streamed), given)


def test_derivatives_by_finite_differences_and_of_second_order() -> None:
    labels = torch.arange(9) % 4
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)

    def shared(x: Tensor, backend: str) -> Tensor:
        return shared_negatives(x, labels, scale=5.0, whisker=0.5, backend=backend)

    assert torch.autograd.gradcheck(lambda x: shared(x, "bounded"), x)
    assert torch.autograd.gradgradcheck(lambda x: shared(x, "reference"), x)
    (grad,) = torch.autograd.grad(shared(x, "bounded"), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


def test_same_bits_in_every_run(streamed: str) -> None:
    x = torch.randn(700, 9, requires_grad=True)
    labels = torch.arange(700) % 31
    runs = []
    for _ in range(2):
        out = shared_negatives(x, labels, scale=32.0, backend=streamed)
        runs.append((out, *torch.autograd.grad(out, x)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("dtype", "sweeps"), [(torch.float32, 4), (torch.float64, 6)])
def test_memory_is_a_tile_and_sweeps_are_few(
    dtype: torch.dtype, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_tiles, "TILE_SIDE", 64)
    begun = []
    tiles = shared_tiles._tiles
    monkeypatch.setattr(shared_tiles, "_tiles", lambda p: begun.append(p) or tiles(p))
    n, d = 512, 16
    x = torch.randn(n, d, dtype=dtype)
    pairs = shared_negatives_inputs.SharedInputs(
        x, torch.arange(n) % 7, torch.ones(n, dtype=torch.bool)
    )
    scale = torch.ones((), dtype=torch.float64)
    with Largest() as seen:
        found = shared_tiles.forward(pairs, scale, 1.5)
        shared_tiles.backward(torch.ones_like(scale), pairs, scale, *found)
    bins = 2 * (shared_tiles.BINS + 1)
    assert seen.elements <= max(n * d, 64 * 64, bins) < n * n
    assert len(begun) == sweeps


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, "embeddings: expected two dimensions", {"embeddings": torch.ones(4)}),
        (TypeError, "labels: expected an integer", {"labels": torch.ones(2)}),
        (ValueError, "labels: expected shape", {"labels": torch.ones(3).long()}),
        (ValueError, "scale: expected", {"scale": 0.0}),
        (TypeError, "scale: expected", {"scale": "64"}),
        (ValueError, "whisker: expected", {"whisker": -0.1}),
        (ValueError, "whisker: expected", {"whisker": float("nan")}),
    ],
)
def test_bad_input(error: type[Exception], message: str, change: dict) -> None:
    given = dict(embeddings=torch.ones(2, 4), labels=torch.ones(2).long(), scale=4.0)
    with pytest.raises(error, match=message):
        shared_negatives(**(given | change))


CHILD = (
    COUNTER
    + """
def run(n, backend):
    x = torch.randn(n, 64).requires_grad_()
    y = torch.randint(0, n // 4, (n,))
    shared = fused_losses.shared_negatives
    def step():
        shared(x, y, scale=16.0, backend=backend).backward()
    step()
    x.grad = None
    return extra(step) - x.grad.nbytes, fused_losses.explain(
        shared, x, y, scale=16.0, backend=backend).peak_extra_bytes

print(json.dumps({str(n): run(n, "bounded") for n in (700, 2100)}))
"""
)


@pytest.mark.slow
def test_peak_is_a_tiles_and_what_explain_says() -> None:
    told = told_by_child(CHILD, None, OMP_WAIT_POLICY="passive")
    for n, (peak, said) in told.items():
        assert peak <= said, n
    # 2,100 rows have 17 MB of pairs in float32
    assert told["2100"][0] < told["700"][0] + 8 * 1400 * 64 * 4 < 2100**2 * 16
