"""One table of the functions over pairs: an example and its formula; and what tests do with it.

A new loss is one definition with its examples, and one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import nce_formulas as nce
import pytest
import torch
from conftest import CUDA
from nested_formulas import NESTED
from pair_formulas import (
    attend,
    both_told,
    circle,
    compatibility,
    cosine_attention,
    diagonal_nce,
    divergence,
    exclude_nce,
    gathered_nce,
    gaussian,
    generalized_lifted,
    group_rows,
    hsic,
    ids_nce,
    labelled_bank_nce,
    labelled_ids_nce,
    labelled_nce,
    learned_nce,
    lifted,
    margin_labelled_nce,
    margin_nce,
    margin_segments_nce,
    masked_both,
    mmd,
    mmd_unbiased,
    multi_similarity,
    multi_similarity_mined,
    n_pairs,
    nt_xent_pairs,
    nt_xent_simclr,
    nt_xent_views,
    orthogonal_projection,
    own_key_nce,
    proxy_anchor,
    proxy_nca,
    qmi,
    segments_nce,
    sigmoid,
    soft_nearest,
    supcon_anchors,
    supcon_in,
    supcon_out,
    third_order,
    transport,
    uniformity,
    zero_rows,
    zeroed,
)
from pair_rows import (
    Inputs,
    attention,
    batch,
    distance,
    equal,
    eye,
    proxies,
    samples,
    siglip,
    square_distance,
    towers,
    towers_and_more,
    trilinear,
)
from torch import Tensor
from transport_formulas import debiased, unbalanced

from fused_losses import backends
from fused_losses.base.examples import TABLE
from fused_losses.primitives.pairs import blocks as pair_blocks


@dataclass(frozen=True)
class Case:
    """A function of the package, called on inputs, and its formula on the same."""

    name: str
    make: Callable[[int, int, int], Inputs]
    call: Callable[..., Tensor]  # (inputs, **options)
    formula: Callable[[Inputs], Tensor]
    leaves: tuple[str, ...] = ("x",)
    cancels: float = 1.0  # how much larger its terms are than what they leave of each other
    function: Callable[..., Any] | None = None  # of the package


TOWERS = ("x", "y")
BANK_LEAVES = ("x", "y", "first_bank", "second_bank", "negatives")
SCALED = ("x", "y", "scale")
LEARNT = ("x", "y", "scale", "bias")


def case(
    example: str,
    make: Callable[[int, int, int], Inputs],
    formula: Callable[[Inputs], Tensor],
    leaves: tuple[str, ...] = ("x",),
    *,
    name: str = "",
    told: Callable[[Any], Tensor] = lambda result: result,
    cancels: float = 1.0,
) -> Case:
    """A row of the table of examples, and its formula."""
    name = name or example.replace(", ", "_").replace(" ", "_")
    call = lambda t, **o: told(TABLE[example](t, **o))
    return Case(name, make, call, formula, leaves, cancels, TABLE[example].function)


LOSSES = [
    case("info_nce", towers, diagonal_nce, TOWERS),
    case("info_nce, symmetric", towers, lambda t: diagonal_nce(t, True), TOWERS),
    case("info_nce, learned temperature", towers, learned_nce, ("x", "y", "temperature")),
    case("info_nce, gathered", towers, gathered_nce, TOWERS),
    case("info_nce, labels", towers, labelled_nce, TOWERS),
    case("info_nce, labels, symmetric", towers, lambda t: labelled_nce(t, True), TOWERS),
    case("info_nce, banks and negatives", towers_and_more, segments_nce, BANK_LEAVES),
    case("info_nce, own key", towers_and_more, own_key_nce, BANK_LEAVES),
    case("info_nce, labelled banks", towers_and_more, labelled_bank_nce, BANK_LEAVES[:4]),
    case("info_nce, hardness", towers, lambda t: diagonal_nce(t, True, beta=0.7), TOWERS),
    case("info_nce, hardness, banks", towers_and_more, lambda t: segments_nce(t, 0.7), BANK_LEAVES),
    case("info_nce, false negatives", towers, lambda t: margin_nce(t, True), TOWERS),
    case("info_nce, false negatives, banks", towers_and_more, margin_segments_nce, BANK_LEAVES),
    case("info_nce, false negatives, labels", towers, margin_labelled_nce, TOWERS),
    case("info_nce, ids", towers, ids_nce, TOWERS),
    case("info_nce, labels, ids", towers, labelled_ids_nce, TOWERS),
    case("info_nce, exclude", towers, exclude_nce, TOWERS),
    case("info_nce, groups", towers, nce.groups_nce, TOWERS),
    case("info_nce, told banks", towers_and_more, nce.told_banks_nce, BANK_LEAVES[:4]),
    case("info_nce, decoupled", towers, nce.decoupled_nce, TOWERS),
    case("info_nce, guide", towers, nce.guided_nce, TOWERS),
    case("info_nce, guide, banks", towers_and_more, nce.guided_banks_nce, BANK_LEAVES[:4]),
    case("info_nce, share", towers_and_more, nce.share_nce, BANK_LEAVES[:3]),
    case("info_nce, share, labels", towers_and_more, nce.labelled_share_nce, BANK_LEAVES[:3]),
    case("info_nce, weights", towers, nce.weighted_nce, TOWERS),
    case("info_nce, targets", towers_and_more, nce.targets_nce, BANK_LEAVES[:3]),
    *(case(example, *row) for example, row in NESTED.items()),
    case("supervised_contrastive, out", batch, supcon_out, ("x", "temperature")),
    case("supervised_contrastive, in", batch, supcon_in),
    case("supervised_contrastive, anchors", batch, supcon_anchors),
    case("nt_xent, simclr", batch, nt_xent_simclr, ("x", "temperature")),
    case("nt_xent, pairs", batch, nt_xent_pairs, ("x", "temperature")),
    case("nt_xent, views", batch, nt_xent_views),
    case("sigmoid_contrastive", siglip, lambda t: sigmoid(t, eye(len(t.x), len(t.y))), LEARNT),
    case("sigmoid_contrastive, labels", siglip, nce.labelled_sigmoid, LEARNT),
    case("soft_nearest_neighbor", batch, soft_nearest, ("x", "temperature")),
    case("multi_similarity", batch, multi_similarity),
    case("orthogonal_projection", batch, orthogonal_projection),
    case(
        "orthogonal_projection, absolute",
        batch,
        lambda t: orthogonal_projection(t, gamma=2.0, absolute=True),
    ),
    case("multi_similarity, mined", batch, multi_similarity_mined),
    case("circle", batch, circle),
    case("lifted_structure", batch, lifted),
    case("generalized_lifted_structure", batch, generalized_lifted),
    case("n_pairs", towers, n_pairs, TOWERS),
    case("proxy_nca", proxies, lambda t: proxy_nca(t, True), ("x", "w", "scale")),
    case("proxy_nca, paper", proxies, lambda t: proxy_nca(t, False), ("x", "w", "scale")),
    case("proxy_anchor", proxies, proxy_anchor, ("x", "w")),
]

SIMILARITIES = [
    case(
        "logsumexp_similarity",
        attention,
        lambda t: torch.cat([(t.scale * t.x @ t.y.T).logsumexp(d) for d in (1, 0)]),
        SCALED,
        name="logsumexp",
        told=both_told,
    ),
    case(
        "logsumexp_similarity, rbf",
        attention,
        lambda t: (-t.scale * square_distance(t.x, t.y)).logsumexp(0),
        SCALED,
        name="logsumexp_rbf",
    ),
    case(
        "logsumexp_similarity, own group",
        attention,
        group_rows,
        ("x", "scale"),
        name="logsumexp_own_group",
        told=zero_rows,
    ),
    case(
        "logsumexp_similarity, both",
        attention,
        masked_both,
        SCALED,
        name="logsumexp_both",
        told=both_told,
    ),
    case(
        "logsumexp_similarity, zero",
        attention,
        zeroed,
        SCALED,
        name="logsumexp_zero",
        told=both_told,
    ),
    case("higher_order_compatibility", siglip, compatibility, SCALED),
    case(
        "similarity_attention",
        attention,
        lambda t: (t.x @ t.y.T / t.x.shape[1] ** 0.5).softmax(1) @ t.v,
        ("x", "y", "v"),
        name="attention",
    ),
    case(
        "similarity_attention, cosine, same",
        attention,
        cosine_attention,
        ("x", "y", "v", "scale"),
        name="attention_cosine_same",
    ),
    case(
        "similarity_attention, rbf, different",
        attention,
        lambda t: attend(-square_distance(t.x, t.y), t.v, ~equal(t.labels, t.y_labels)),
        ("x", "y", "v"),
        name="attention_rbf_different",
    ),
    case(
        "similarity_attention, euclidean",
        attention,
        lambda t: (-t.scale * distance(t.x, t.y)).softmax(1) @ t.v,
        ("x", "y", "v", "scale"),
        name="attention_euclidean",
    ),
    case("trilinear_attention", trilinear, third_order, ("x", "few", "z", "few_values", "w")),
    case(
        "kernel_mean, none",
        samples,
        lambda t: gaussian(t.x, t.other, t.width).mean(1),
        ("x", "other", "width"),
        name="kernel_mean",
    ),
    case("mmd", samples, mmd, ("x", "other")),
    case("mmd, laplacian unbiased", samples, mmd_unbiased, ("x", "other")),
    case("hsic", samples, hsic, ("x", "y")),
    case("uniformity", samples, uniformity),
    case("cauchy_schwarz_qmi", samples, qmi, ("x", "y")),
    case("cauchy_schwarz_divergence", samples, divergence, ("x", "y", "z"), cancels=5.0),
    *(
        case(
            f"sinkhorn, {cost}",
            towers,
            lambda t, cost=cost: transport(t, cost),
            TOWERS,
            told=lambda plan: plan.cost,
        )
        for cost in ("cosine", "dot", "sqeuclidean")
    ),
    case("sinkhorn, unbalanced", towers, unbalanced, TOWERS, told=lambda plan: plan.cost),
    case("sinkhorn_divergence", towers, lambda t: debiased(t, "sqeuclidean"), TOWERS, cancels=10.0),
    case(
        "sinkhorn_divergence, unbalanced",
        towers,
        lambda t: debiased(t, "cosine", rho=1.0),
        TOWERS,
        cancels=10.0,
    ),
]
BY_NAME = {case.name: case for case in LOSSES + SIMILARITIES}


# ---- what the tests do with it ------------------------------------------------------------------

EXACT = ("reference", "bounded", "cpu")  # those that take float64
BACKENDS = (*EXACT, *CUDA)
SHAPES = {
    "primes": (23, 29, 7),
    "one": (1, 1, 1),
    "one_row": (1, 5, 3),
    "thin": (13, 13, 1),
    "tiles": (131, 157, 37),
}
SMALL = ("primes", "one", "one_row", "thin")
# how near two ways to the same numbers come in a dtype
NEAR = {
    torch.float64: dict(rtol=1e-10, atol=1e-12),
    torch.float32: dict(rtol=2e-5, atol=2e-6),
}
# what rounding alone may cost beyond twice the eager formula's error
FLOORS = {torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def require_pairs(name: str) -> str:
    """The backend's name; skips where it has no kernel for pairs."""
    why = backends.unavailable(name)
    op = f"fused_losses::pair_statistics_{name}"
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    if why is None and name == "cpu" and not has_kernel(op, "CPU"):
        why = "this build has no C++ kernels for pairs"
    if why is not None:
        pytest.skip(why)
    return name


def inputs_of(case: Case, shape: tuple[int, int, int], dtype: torch.dtype) -> Inputs:
    """The case's inputs rounded to a dtype; leaves need gradients."""
    made = vars(case.make(*shape))
    out = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}
    for name in case.leaves:
        out[name] = out[name].requires_grad_()
    return Inputs(**out)


def in_dtype(case: Case, t: Inputs, dtype: torch.dtype) -> Inputs:
    """The same values in another dtype, as new leaves."""
    out = {k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in vars(t).items()}
    for name in case.leaves:
        out[name] = out[name].clone().requires_grad_()
    return Inputs(**out)


def outcome(case: Case, t: Inputs, f: Callable[[Inputs], Tensor]) -> list[Tensor]:
    """Value, and gradients of a fixed weighting of it, in float64."""
    value = f(t)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    weight = weight.to(value.dtype) if value.dim() else torch.ones_like(value)
    leaves = [getattr(t, name) for name in case.leaves]
    grads = torch.autograd.grad((value * weight).sum(), leaves, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return [o.detach().double() for o in (value, *found)]


def error(got: Tensor, wanted: Tensor, floor: float = 1e-3) -> float:
    """|got - wanted| / max(|wanted|, floor) in norm; the truth's floor guards vanishing ones."""
    assert torch.isfinite(got).all()
    return float((got - wanted).norm() / wanted.norm().clamp_min(floor))


@contextmanager
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several ragged blocks each way also at these sizes, where threads would only wait."""
    monkeypatch.setattr(pair_blocks, "BLOCK_ROWS", 8)
    monkeypatch.setattr(pair_blocks, "BLOCK_BYTES", 8 * 16 * 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_formula(case: Case, shape: str, backends: Iterable[str]) -> None:
    """In float64 the value and every gradient are the formula's, on each backend."""
    t = inputs_of(case, SHAPES[shape], torch.float64)
    wanted = outcome(case, t, case.formula)
    for backend in backends:
        got = outcome(case, t, lambda t, b=backend: case.call(t, backend=b))
        for name, g, w in zip(("value", *case.leaves), got, wanted, strict=True):
            assert error(g, w) <= 1e-9, (backend, name)


def check_budget(
    case: Case, dtype: torch.dtype, backends: Iterable[str], shape: str = "primes"
) -> None:
    """Against float64 on the same rounded inputs, about the error of the formula in this dtype."""
    t = inputs_of(case, SHAPES[shape], dtype)
    wanted = outcome(case, in_dtype(case, t, torch.float64), case.formula)
    eager = outcome(case, t, case.formula)
    for backend in backends:
        if backend == "reference" and dtype != torch.float32:
            continue  # the materialised path is eager
        got = outcome(case, t, lambda t, b=backend: case.call(t, backend=b))
        for name, g, e, w in zip(("value", *case.leaves), got, eager, wanted, strict=True):
            # one number's eager error may be near 0 by luck, and a sum over all pairs cancels
            floor = FLOORS[dtype] * case.cancels * (1 if w.numel() > 1 else 8)
            assert error(g, w, 1e-2) <= 2 * error(e, w, 1e-2) + floor, (backend, name)


def as_function(
    case: Case, shape: tuple[int, int, int], backend: str
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The call as a function of its leaves, for gradcheck."""
    t = inputs_of(case, shape, torch.float64)

    def f(*values: Tensor) -> Tensor:
        fresh = vars(t) | dict(zip(case.leaves, values, strict=True))
        return case.call(Inputs(**fresh), backend=backend)

    return f, [getattr(t, name) for name in case.leaves]
