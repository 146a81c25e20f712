"""Every row of the table of losses over rows (`row_loss_cases`) on every backend, and the op."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import CUDA
from pair_cases import FLOORS, SMALL, Case, as_function, check_budget, check_formula
from pair_rows import Inputs, batch
from row_loss_cases import BACKENDS, BY_NAME, ROWS, require_rows, small_row_blocks
from torch import Tensor

from fused_losses.functions import chosen_triplets as ct
from fused_losses.functions import margin_pairs
from fused_losses.functions import ranking as rl
from fused_losses.functions import triplets as tl
from fused_losses.primitives.row_rules import triplets as row_rules_triplets
from fused_losses.primitives.row_rules.inputs import RowInputs
from fused_losses.primitives.row_rules.op import ROW_LOSSES, row_losses
from fused_losses.primitives.row_rules.rules import ROW_FOLDS

cases = partial(pytest.mark.parametrize, "case", ROWS, ids=lambda case: case.name)
ALONE = [case for case in ROWS if case.make is batch]
# one of each function; angular sweeps in a loop over the largest class, whose size the host reads
COMPILED = (
    "all_triplets_semihard",
    "all_triplets_smooth",
    "batch_hard",
    "batch_easy_semihard",
    "centroid_triplet",
    "contrastive",
    "snr_contrastive",
    "tuplet_margin",
    "ranked_list",
    "fast_ap",
    "histogram",
    "intra_pair_variance",
    "icnn",
)
# only the choice of pairs is streamed; the chosen pairs are ordinary autograd
TWICE = ("batch_hard", "batch_semihard_hard", "centroid_triplet", "prototype_triplet", "icnn")


@pytest.fixture(params=BACKENDS)
def exact(request: pytest.FixtureRequest) -> str:
    """Backends that take float64."""
    return require_rows(request.param)


@pytest.fixture(params=BACKENDS[1:])
def exact_streamed(request: pytest.FixtureRequest) -> str:
    return require_rows(request.param)


@pytest.fixture(params=(*BACKENDS, *CUDA))
def backend(request: pytest.FixtureRequest) -> str:
    return require_rows(request.param)


@pytest.fixture(params=(*BACKENDS[1:], *CUDA))
def streamed(request: pytest.FixtureRequest) -> str:
    return require_rows(request.param)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_row_blocks(monkeypatch):
        yield


# ---- the table ----------------------------------------------------------------------------------


# each on every backend: the formula is asked once
@cases()
@pytest.mark.parametrize("shape", SMALL)
def test_is_its_formula(case: Case, shape: str) -> None:
    check_formula(case, shape, map(require_rows, BACKENDS))


@pytest.mark.parametrize(
    "case",
    [BY_NAME[name] for name in ("all_triplets_semihard", "fast_ap_ref", "icnn", "tuplet_margin")],
    ids=lambda case: case.name,
)
def test_is_its_formula_over_whole_blocks(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check_formula(case, "tiles", map(require_rows, BACKENDS[1:]))


@pytest.mark.parametrize("shape", SMALL)
@pytest.mark.parametrize(
    "case",
    [case for case in ROWS if case.name.startswith("all_triplets") and "smooth" not in case.name],
    ids=lambda case: case.name,
)
def test_triplets_are_counted_by_sorting(
    case: Case, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_rules_triplets, "FEW", 0)
    check_formula(case, shape, map(require_rows, BACKENDS[1:]))


@cases()
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_errs_no_more_than_eager(case: Case, dtype: torch.dtype) -> None:
    check_budget(case, dtype, map(require_rows, (*BACKENDS, *CUDA)))


@cases()
def test_gradcheck(case: Case, exact_streamed: str) -> None:
    f, leaves = as_function(case, (5, 6, 3), exact_streamed)
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


# ---- shapes and values that are not everyday ----------------------------------------------------


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
@pytest.mark.parametrize(
    ("labels", "duplicates"),
    [([], False), ([1] * 6, False), ([1, 2, 3, 4, 5, 6], False), ([1, 1, 1, 2, 2, 3], True)],
    ids=["empty", "one_class", "classes_of_one", "duplicates"],
)
def test_odd_batches(case: Case, labels: list[int], duplicates: bool, backend: str) -> None:
    """Finite values and gradients, and without triplets or pairs a loss of 0."""
    n = len(labels)
    x = torch.ones(n, 4) if duplicates else torch.randn(n, 4)
    x = (x if backend == "cuda" else x.double()).requires_grad_()
    t = Inputs(x=x, labels=torch.tensor(labels, dtype=torch.int64))
    loss = case.call(t, backend=backend)
    assert bool(loss.isfinite().all())
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert grad.shape == x.shape and bool(grad.isfinite().all())
    pairs = ("contrastive", "threshold", "snr", "ranked", "intra", "icnn", "angular")
    alone = len(set(labels)) < 2 or len(set(labels)) == n
    if alone and not case.name.startswith((*pairs, "fast_ap")):
        assert bool((loss == 0).all()) and bool((grad == 0).all())


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.name)
def test_nan_reaches_what_depends_on_it(case: Case, backend: str) -> None:
    x = torch.randn(9, 4)
    x[2, 1] = torch.nan
    x.requires_grad_()
    t = Inputs(x=x, labels=torch.arange(9) % 3)
    # of the kinds of triplets, a NaN is in all of them
    loss = case.call(t, backend=backend)
    assert bool(loss.isnan().all())
    (grad,) = torch.autograd.grad(loss.sum(), x)
    assert bool(grad[2].isnan().any())


def test_no_columns_and_no_rows(backend: str) -> None:
    for n, m in ((3, 0), (0, 3), (0, 0)):
        x, y = torch.randn(n, 4, requires_grad=True), torch.randn(m, 4, requires_grad=True)
        sides = (x, torch.arange(n), y, torch.arange(m))
        for loss in (
            tl.all_triplets, ct.batch_hard_triplet, margin_pairs.contrastive,
            margin_pairs.margin_loss,
            margin_pairs.snr_contrastive, rl.tuplet_margin, rl.fast_ap,
        ):  # fmt: skip
            value = loss(*sides, backend=backend)
            grads = torch.autograd.grad(value, (x, y), allow_unused=True)
            assert value.item() == 0 and all(g is None or not g.any() for g in grads)
            assert loss(*sides, reduction="none", backend=backend).shape == (n,)


def test_no_coordinates(backend: str) -> None:
    x, labels = torch.randn(5, 0, requires_grad=True), torch.arange(5) % 2
    loss = tl.all_triplets(x, labels, margin=0.25, backend=backend)
    loss.backward()
    assert loss.item() == 0.25 and x.grad.shape == x.shape


def test_far_from_the_origin(backend: str) -> None:
    """Near rows keep the digits that float32 inputs have of their differences."""
    x = (torch.randn(20, 8) * 0.01 + 100).requires_grad_()
    labels = torch.arange(20) % 5
    loss = tl.all_triplets(x, labels, margin=0.01, backend=backend)
    wide = x.detach().double().requires_grad_()
    want = tl.all_triplets(wide, labels, margin=0.01, backend="reference")
    assert abs(loss - want).item() <= 1e-5 * float(want.detach())
    got, truth = (torch.autograd.grad(v, t)[0].double() for v, t in ((loss, x), (want, wide)))
    assert float((got - truth).norm()) <= 1e-4 * float(truth.norm())


def test_first_of_equal_rows_is_chosen(backend: str) -> None:
    x = torch.tensor([[0.0], [2], [-2], [1], [-1]], requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1])
    loss = ct.batch_hard_triplet(x, labels, margin=5.0, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss[0], x)
    assert grad[:, 0].tolist() == [0, 1, 0, -1, 0]


def test_counts_are_exact_past_float32(streamed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More violations in one row's neighbourhood than a float32 sum keeps."""
    monkeypatch.undo()
    n = 6000
    x = torch.zeros(2 * n, 2)
    x[n:, 1] = 1e-3
    labels = torch.arange(2 * n) // n
    p = RowInputs(x[:3], x, labels[:3].int(), labels.int(), params=(0.5, 0, 0), skip_self=True)
    total, count = row_losses(p, backend=streamed).unbind(1)
    assert count.tolist() == [n * (n - 1)] * 3
    assert torch.allclose(total, count * (0.5 - 1e-3), rtol=1e-6)


# ---- listed triplets ----------------------------------------------------------------------------


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_triplet_margin_is_torch(swap: bool, reduction: str) -> None:
    rows = [torch.randn(7, 5, requires_grad=True) for _ in range(3)]
    given = dict(margin=0.7, p=3.0, swap=swap, reduction=reduction)
    got, want = tl.triplet_margin(*rows, **given), F.triplet_margin_loss(*rows, **given)
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(got.sum(), rows), torch.autograd.grad(want.sum(), rows), strict=True
    ):
        assert torch.allclose(a, b)


def test_triplet_margin_by_indices() -> None:
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    index = torch.tensor([[0, 3, 3], [1, 0, 4], [2, 2, 0]])
    got = tl.triplet_margin(x, y, y, triplets=tuple(index), swap=True)
    assert torch.equal(got, tl.triplet_margin(x[index[0]], y[index[1]], y[index[2]], swap=True))
    none = torch.zeros(0, dtype=torch.int64)
    assert float(tl.triplet_margin(x, x, x, triplets=(none, none, none))) == 0


# ---- the op -------------------------------------------------------------------------------------

PARAMS: dict[str, tuple[float, ...]] = {
    "triplets": (0.5, 0, 0),
    "ranks": (3.0, 0, 0.0),
    "semihard": (0.5, 1),
    "chosen": (0, 2),
    "nearest": (3,),
    "histogram": (0.0, 1.0, 6),
    "hinges": (2,),
    "ranked_list": (1.0, 2.0, 0.5, 1.5),
    "tuplet": (0.1, 8.0),
    "hardest": (0.4,),
    "guided": (0.1, 0.2),
    "ratio": (),
    "tempered": (2, 0.1, 2.0),
    "weighted": (),
}
SCALED = ("hardest", "guided", "ratio", "weighted")  # by a number of each row


def small(rule: str, dtype: torch.dtype = torch.float32, n: int = 5, m: int = 7) -> RowInputs:
    width = 3 if rule == "hinges" else int(rule in SCALED)
    values = torch.rand(n, width, dtype=torch.float64).requires_grad_() if width else None
    second = [
        torch.rand(count, 2, dtype=dtype).requires_grad_() if ROW_FOLDS[rule].seconds else None
        for count in (n, m)
    ]
    return RowInputs(
        torch.randn(n, 3, dtype=dtype).requires_grad_(),
        torch.randn(m, 3, dtype=dtype).requires_grad_(),
        torch.randint(0, 2, (n,), dtype=torch.int32),
        torch.randint(0, 2, (m,), dtype=torch.int32),
        torch.randint(0, 2, (n,), dtype=torch.int32),
        torch.randint(0, 2, (m,), dtype=torch.int32),
        values,
        rule,
        list(PARAMS[rule]),
        "dot" if rule == "tuplet" else "euclidean",
        True,
        "fp32",
        *second,
    )


@pytest.mark.parametrize("rule", ROW_FOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(rule: str, dtype: torch.dtype, streamed: str) -> None:
    if streamed == "cuda" and (rule, dtype) != ("triplets", torch.float32):
        pytest.skip("registered by the same lines")
    p = small(rule, dtype)
    torch.library.opcheck(ROW_LOSSES.op(streamed), tuple(p))
    still = [t.detach() if isinstance(t, Tensor) else t for t in p]
    out = ROW_LOSSES.op(streamed)(*still)
    if ROW_FOLDS[rule].gradient is not None:
        needs = (True, True, p.values is not None, *(p.x_second is not None,) * 2)
        arguments = (torch.randn_like(out), *still, *needs)
        torch.library.opcheck(ROW_LOSSES.op(streamed, "_backward"), arguments)


@pytest.mark.parametrize("rule", [name for name, r in ROW_FOLDS.items() if r.gradient is not None])
@pytest.mark.parametrize("score", ["euclidean", "sqeuclidean", "dot", "minus_dot"])
def test_rule_on_blocks_is_the_rule_on_the_matrix(rule: str, score: str, streamed: str) -> None:
    p = small(rule, torch.float64, 11, 13)._replace(score=score)
    narrow = torch.float32 if streamed == "cuda" else torch.float64
    found = []
    for backend, dtype in (("reference", torch.float64), (streamed, narrow)):
        second = {k: getattr(p, k) for k in ("x_second", "y_second")}
        rows = dict(x=p.x, y=p.y, **{k: t for k, t in second.items() if t is not None})
        rows = {k: t.detach().to(dtype).requires_grad_() for k, t in rows.items()}
        leaves = [*rows.values()] + ([] if p.values is None else [p.values])
        out = row_losses(p._replace(**rows), backend=backend)
        weight = torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)
        # a row without pairs has a logsumexp of -inf
        total = torch.where(out.isinf(), 0, out * weight).sum()
        grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found.append([t.double() for t in (out, *grads)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-4 if streamed == "cuda" else 1e-10)


class Batch(NamedTuple):
    """Inputs that the compiler can trace."""

    x: Tensor
    labels: Tensor


# the op of every backend is registered by the same lines
@pytest.mark.parametrize(
    ("name", "streamed"),
    [*((name, "bounded") for name in COMPILED), ("all_triplets_semihard", "cpu")],
)
def test_transforms(name: str, streamed: str) -> None:
    case, streamed = BY_NAME[name], require_rows(streamed)
    x, labels = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3

    def f(x: Tensor, labels: Tensor) -> Tensor:
        return case.call(Batch(x, labels), backend=streamed).sum()

    def gradient(f: Callable[..., Tensor], x: Tensor, labels: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(f(leaf, labels), leaf)[0]

    want = gradient(f, x, labels)
    assert torch.allclose(torch.func.grad(f)(x, labels), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.reset()
        compiled = torch.compile(f, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.allclose(gradient(compiled, x, labels), want)
        more, others = torch.randn(11, 4, dtype=torch.float64), torch.arange(11) % 4
        assert torch.allclose(gradient(compiled, more, others), gradient(f, more, others))
        torch.compiler.reset()


def test_second_derivative_is_refused(streamed: str) -> None:
    x, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 3
    loss = tl.all_triplets(x, labels, smooth=True, backend=streamed)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["all_triplets_smooth", "tuplet_margin", "ranked_list"])
def test_reference_has_second_derivatives(name: str) -> None:
    f, leaves = as_function(BY_NAME[name], (6, 6, 3), "reference")
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("name", TWICE)
def test_chosen_pairs_have_second_derivatives(name: str, exact: str) -> None:
    f, leaves = as_function(BY_NAME[name], (7, 6, 3), exact)
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)


def test_under_autocast(streamed: str) -> None:
    x, labels = torch.randn(8, 4), torch.arange(8) % 3
    want = tl.all_triplets(x, labels, backend=streamed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tl.all_triplets(x, labels, backend=streamed), want)


def test_strides_do_not_matter(backend: str) -> None:
    x, labels = torch.randn(4, 9).T, (torch.arange(18) % 3)[::2]
    want = tl.all_triplets(x.contiguous(), labels.contiguous(), backend=backend)
    assert torch.equal(tl.all_triplets(x, labels, backend=backend), want)
