"""One table of the functions over pairs: a call and its formula; and what tests do with it.

A new loss is one definition and one row here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from conftest import CUDA
from pair_formulas import (
    Inputs,
    attend,
    attention,
    batch,
    both_told,
    circle,
    cosine_attention,
    diagonal_nce,
    distance,
    divergence,
    equal,
    exclude_nce,
    eye,
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
    proxies,
    proxy_anchor,
    proxy_nca,
    qmi,
    samples,
    segments_nce,
    siglip,
    sigmoid,
    soft_nearest,
    square_distance,
    supcon_anchors,
    supcon_in,
    supcon_out,
    third_order,
    towers,
    towers_and_more,
    transport,
    trilinear,
    uniformity,
    zero_rows,
    zeroed,
)
from torch import Tensor

from fused_losses import backends
from fused_losses import functional as fl
from fused_losses.primitives.pairs import bounded as bounded_pairs


@dataclass(frozen=True)
class Case:
    """A function of the package, called on inputs, and its formula on the same."""

    name: str
    make: Callable[[int, int, int], Inputs]
    call: Callable[..., Tensor]  # (inputs, **options)
    formula: Callable[[Inputs], Tensor]
    leaves: tuple[str, ...] = ("x",)
    cancels: float = 1.0  # how much larger its terms are than what they leave of each other


TOWERS = ("x", "y")
NCE = {"temperature": 0.2}
LABELS = lambda t: {"labels": t.labels, "key_labels": t.y_labels}
BANKS = lambda t: {"queue": [t.first_bank, t.second_bank], "negatives": t.negatives}
BANK_LEAVES = ("x", "y", "first_bank", "second_bank", "negatives")
WIDTHS = {"x_bandwidth": 1.3, "y_bandwidth": 0.8}

LOSSES = [
    Case(
        "info_nce", towers, lambda t, **o: fl.info_nce(t.x, t.y, **NCE, **o), diagonal_nce, TOWERS
    ),
    Case(
        "info_nce_symmetric",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, symmetric=True, **NCE, **o),
        lambda t: diagonal_nce(t, True),
        TOWERS,
    ),
    Case(
        "info_nce_learned_temperature",
        towers,
        lambda t, **o: fl.info_nce(
            t.x, t.y, temperature=t.temperature, symmetric=True, normalize=True, **o
        ),
        learned_nce,
        ("x", "y", "temperature"),
    ),
    Case(
        "info_nce_gathered",
        towers,
        lambda t, **o: fl.info_nce(
            t.x, t.y, offset=len(t.y) - len(t.x), symmetric=True, **NCE, **o
        ),
        gathered_nce,
        TOWERS,
    ),
    Case(
        "info_nce_labels",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, **LABELS(t), **NCE, **o),
        labelled_nce,
        TOWERS,
    ),
    Case(
        "info_nce_labels_symmetric",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, symmetric=True, **LABELS(t), **NCE, **o),
        lambda t: labelled_nce(t, True),
        TOWERS,
    ),
    Case(
        "info_nce_banks_and_negatives",
        towers_and_more,
        lambda t, **o: fl.info_nce(t.x, t.y, **BANKS(t), **NCE, **o),
        segments_nce,
        BANK_LEAVES,
    ),
    Case(
        "info_nce_labelled_banks",
        towers_and_more,
        lambda t, **o: fl.info_nce(
            t.x,
            t.y,
            queue=[t.first_bank, t.second_bank],
            queue_labels=[t.first_labels, t.second_labels],
            **LABELS(t),
            **NCE,
            **o,
        ),
        labelled_bank_nce,
        BANK_LEAVES[:4],
    ),
    Case(
        "info_nce_hardness",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, hardness=0.7, symmetric=True, **NCE, **o),
        lambda t: diagonal_nce(t, True, beta=0.7),
        TOWERS,
    ),
    Case(
        "info_nce_hardness_banks",
        towers_and_more,
        lambda t, **o: fl.info_nce(t.x, t.y, hardness=0.7, **BANKS(t), **NCE, **o),
        lambda t: segments_nce(t, 0.7),
        BANK_LEAVES,
    ),
    Case(
        "info_nce_false_negatives",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, false_negative_margin=0.1, symmetric=True, **NCE, **o),
        lambda t: margin_nce(t, True),
        TOWERS,
    ),
    Case(
        "info_nce_false_negatives_banks",
        towers_and_more,
        lambda t, **o: fl.info_nce(t.x, t.y, false_negative_margin=0.1, **BANKS(t), **NCE, **o),
        margin_segments_nce,
        BANK_LEAVES,
    ),
    Case(
        "info_nce_false_negatives_labels",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, false_negative_margin=0.1, **LABELS(t), **NCE, **o),
        margin_labelled_nce,
        TOWERS,
    ),
    Case(
        "info_nce_ids",
        towers,
        lambda t, **o: fl.info_nce(
            t.x, t.y, ids=t.ids, key_ids=t.y_ids, symmetric=True, **NCE, **o
        ),
        ids_nce,
        TOWERS,
    ),
    Case(
        "info_nce_labels_ids",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, ids=t.ids, key_ids=t.y_ids, **LABELS(t), **NCE, **o),
        labelled_ids_nce,
        TOWERS,
    ),
    Case(
        "info_nce_exclude",
        towers,
        lambda t, **o: fl.info_nce(t.x, t.y, exclude=t.exclude, **NCE, **o),
        exclude_nce,
        TOWERS,
    ),
    Case(
        "supervised_contrastive_out",
        batch,
        lambda t, **o: fl.supervised_contrastive(
            t.x,
            t.labels,
            temperature=t.temperature,
            base_temperature=0.07,
            normalize=True,
            **o,
        ),
        supcon_out,
        ("x", "temperature"),
    ),
    Case(
        "supervised_contrastive_in",
        batch,
        lambda t, **o: fl.supervised_contrastive(
            t.x, t.labels, temperature=0.3, form="in", without_positive="skip", **o
        ),
        supcon_in,
    ),
    Case(
        "supervised_contrastive_anchors",
        batch,
        lambda t, **o: fl.supervised_contrastive(
            t.x,
            t.labels,
            temperature=0.3,
            anchor_count=(len(t.x) + 1) // 2,
            without_positive="skip",
            **o,
        ),
        supcon_anchors,
    ),
    Case(
        "nt_xent_simclr",
        batch,
        lambda t, **o: fl.nt_xent(t.x, t.labels, temperature=t.temperature, **o),
        nt_xent_simclr,
        ("x", "temperature"),
    ),
    Case(
        "nt_xent_pairs",
        batch,
        lambda t, **o: fl.nt_xent(t.x, t.labels, temperature=t.temperature, form="pairs", **o),
        nt_xent_pairs,
        ("x", "temperature"),
    ),
    Case(
        "nt_xent_views",
        batch,
        lambda t, **o: fl.nt_xent(
            torch.cat([t.x, t.x.flip(1) + 0.1]), temperature=0.3, form="pairs", **o
        ),
        nt_xent_views,
    ),
    Case(
        "sigmoid_contrastive",
        siglip,
        lambda t, **o: fl.sigmoid_contrastive(t.x, t.y, scale=t.scale, bias=t.bias, **o),
        lambda t: sigmoid(t, eye(len(t.x), len(t.y))),
        ("x", "y", "scale", "bias"),
    ),
    Case(
        "sigmoid_contrastive_labels",
        siglip,
        lambda t, **o: fl.sigmoid_contrastive(
            t.x, t.y, scale=t.scale, bias=t.bias, labels=t.labels, y_labels=t.y_labels, **o
        ),
        lambda t: sigmoid(t, equal(t.labels, t.y_labels)),
        ("x", "y", "scale", "bias"),
    ),
    Case(
        "soft_nearest_neighbor",
        batch,
        lambda t, **o: fl.soft_nearest_neighbor(t.x, t.labels, temperature=t.temperature, **o),
        soft_nearest,
        ("x", "temperature"),
    ),
    Case(
        "multi_similarity",
        batch,
        lambda t, **o: fl.multi_similarity(t.x, t.labels, beta=20.0, normalize=True, **o),
        multi_similarity,
    ),
    Case(
        "orthogonal_projection",
        batch,
        lambda t, **o: fl.orthogonal_projection(t.x, t.labels, **o),
        orthogonal_projection,
    ),
    Case(
        "orthogonal_projection_absolute",
        batch,
        lambda t, **o: fl.orthogonal_projection(t.x, t.labels, gamma=2.0, absolute=True, **o),
        lambda t: orthogonal_projection(t, gamma=2.0, absolute=True),
    ),
    Case(
        "multi_similarity_mined",
        batch,
        lambda t, **o: fl.multi_similarity(
            t.x, t.labels, beta=20.0, mining_margin=0.1, normalize=True, **o
        ),
        multi_similarity_mined,
    ),
    Case(
        "circle",
        batch,
        lambda t, **o: fl.circle(t.x, t.labels, m=0.25, gamma=40.0, normalize=True, **o),
        circle,
    ),
    Case(
        "lifted_structure",
        batch,
        lambda t, **o: fl.lifted_structure(t.x, t.labels, **o),
        lifted,
    ),
    Case(
        "generalized_lifted_structure",
        batch,
        lambda t, **o: fl.generalized_lifted_structure(t.x, t.labels, positive_margin=0.1, **o),
        generalized_lifted,
    ),
    Case(
        "n_pairs",
        towers,
        lambda t, **o: fl.n_pairs(t.x, t.y[: len(t.x)], l2_weight=0.1, **o),
        n_pairs,
        TOWERS,
    ),
    Case(
        "proxy_nca",
        proxies,
        lambda t, **o: fl.proxy_nca(t.x, t.w, t.labels, scale=t.scale, normalize=True, **o),
        lambda t: proxy_nca(t, True),
        ("x", "w", "scale"),
    ),
    Case(
        "proxy_nca_paper",
        proxies,
        lambda t, **o: fl.proxy_nca(
            t.x, t.w, t.labels, scale=t.scale, positive_in_denominator=False, normalize=True, **o
        ),
        lambda t: proxy_nca(t, False),
        ("x", "w", "scale"),
    ),
    Case(
        "proxy_anchor",
        proxies,
        lambda t, **o: fl.proxy_anchor(t.x, t.w, t.labels, alpha=8.0, normalize=True, **o),
        proxy_anchor,
        ("x", "w"),
    ),
]

SIMILARITIES = [
    Case(
        "logsumexp",
        attention,
        lambda t, **o: both_told(fl.logsumexp_similarity(t.x, t.y, scale=t.scale, cols=True, **o)),
        lambda t: torch.cat([(t.scale * t.x @ t.y.T).logsumexp(d) for d in (1, 0)]),
        ("x", "y", "scale"),
    ),
    Case(
        "logsumexp_rbf",
        attention,
        lambda t, **o: fl.logsumexp_similarity(
            t.x, t.y, scale=t.scale, similarity="rbf", rows=False, cols=True, **o
        ),
        lambda t: (-t.scale * square_distance(t.x, t.y)).logsumexp(0),
        ("x", "y", "scale"),
    ),
    Case(
        "logsumexp_own_group",
        attention,
        lambda t, **o: zero_rows(
            fl.logsumexp_similarity(
                t.x,
                similarity="euclidean",
                scale=t.scale,
                x_groups=t.labels,
                skip_self=True,
                **o,
            )
        ),
        group_rows,
        ("x", "scale"),
    ),
    Case(
        "logsumexp_both",
        attention,
        lambda t, **o: both_told(
            fl.logsumexp_similarity(
                t.x,
                t.y,
                similarity="cosine",
                scale=t.scale,
                x_labels=t.labels,
                y_labels=t.y_labels,
                x_ids=t.labels,
                y_ids=t.y_labels + 1,
                match="both",
                cols=True,
                **o,
            )
        ),
        masked_both,
        ("x", "y", "scale"),
    ),
    Case(
        "logsumexp_zero",
        attention,
        lambda t, **o: both_told(
            fl.logsumexp_similarity(
                t.x,
                t.y,
                scale=t.scale,
                x_labels=t.labels,
                y_labels=t.y_labels,
                zero="same",
                cols=True,
                **o,
            )
        ),
        zeroed,
        ("x", "y", "scale"),
    ),
    Case(
        "attention",
        attention,
        lambda t, **o: fl.similarity_attention(t.x, t.y, t.v, **o),
        lambda t: (t.x @ t.y.T / t.x.shape[1] ** 0.5).softmax(1) @ t.v,
        ("x", "y", "v"),
    ),
    Case(
        "attention_cosine_same",
        attention,
        lambda t, **o: fl.similarity_attention(
            t.x,
            t.y,
            t.v,
            similarity="cosine",
            scale=t.scale,
            query_labels=t.labels,
            key_labels=t.y_labels,
            match="same",
            **o,
        ),
        cosine_attention,
        ("x", "y", "v", "scale"),
    ),
    Case(
        "attention_rbf_different",
        attention,
        lambda t, **o: fl.similarity_attention(
            t.x,
            t.y,
            t.v,
            similarity="rbf",
            query_labels=t.labels,
            key_labels=t.y_labels,
            match="different",
            **o,
        ),
        lambda t: attend(-square_distance(t.x, t.y), t.v, ~equal(t.labels, t.y_labels)),
        ("x", "y", "v"),
    ),
    Case(
        "attention_euclidean",
        attention,
        lambda t, **o: fl.similarity_attention(
            t.x, t.y, t.v, similarity="euclidean", scale=t.scale, **o
        ),
        lambda t: (-t.scale * distance(t.x, t.y)).softmax(1) @ t.v,
        ("x", "y", "v", "scale"),
    ),
    Case(
        "trilinear_attention",
        trilinear,
        lambda t, **o: fl.trilinear_attention(t.x, t.y, t.z, t.v, t.w, **o),
        third_order,
        ("x", "y", "z", "v", "w"),
    ),
    Case(
        "kernel_mean",
        samples,
        lambda t, **o: fl.kernel_mean(t.x, t.other, bandwidth=t.width, reduction="none", **o),
        lambda t: gaussian(t.x, t.other, t.width).mean(1),
        ("x", "other", "width"),
    ),
    Case(
        "mmd", samples, lambda t, **o: fl.mmd(t.x, t.other, bandwidth=1.3, **o), mmd, ("x", "other")
    ),
    Case(
        "mmd_laplacian_unbiased",
        samples,
        lambda t, **o: fl.mmd(t.x, t.other, "laplacian", 1.3, unbiased=True, **o),
        mmd_unbiased,
        ("x", "other"),
    ),
    Case("hsic", samples, lambda t, **o: fl.hsic(t.x, t.y, **WIDTHS, **o), hsic, ("x", "y")),
    Case(
        "uniformity",
        samples,
        lambda t, **o: fl.uniformity(t.x, normalize=True, **o),
        uniformity,
    ),
    Case(
        "cauchy_schwarz_qmi",
        samples,
        lambda t, **o: fl.cauchy_schwarz_qmi(t.x, t.y, **WIDTHS, **o),
        qmi,
        ("x", "y"),
    ),
    Case(
        "cauchy_schwarz_divergence",
        samples,
        lambda t, **o: fl.cauchy_schwarz_divergence(
            t.x, t.y, t.z, bandwidth=1.3, target_bandwidth=0.8, **o
        ),
        divergence,
        ("x", "y", "z"),
        cancels=5.0,
    ),
    *(
        Case(
            f"sinkhorn_{cost}",
            towers,
            lambda t, cost=cost, **o: (
                fl.sinkhorn(t.x, t.y, eps=0.5, iterations=20, cost=cost, **o).cost
            ),
            lambda t, cost=cost: transport(t, cost),
            TOWERS,
        )
        for cost in ("cosine", "dot", "sqeuclidean")
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
    if why is None and name == "cpu":
        if not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"):
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
    monkeypatch.setattr(bounded_pairs, "BLOCK_ROWS", 8)
    monkeypatch.setattr(bounded_pairs, "BLOCK_BYTES", 8 * 16 * 4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_formula(case: Case, shape: str, backend: str) -> None:
    """In float64 the value and every gradient are the formula's."""
    t = inputs_of(case, SHAPES[shape], torch.float64)
    wanted = outcome(case, t, case.formula)
    got = outcome(case, t, lambda t: case.call(t, backend=backend))
    for name, g, w in zip(("value", *case.leaves), got, wanted, strict=True):
        assert error(g, w) <= 1e-9, name


def check_budget(case: Case, dtype: torch.dtype, backend: str, shape: str = "primes") -> None:
    """Against float64 on the same rounded inputs, about the error of the formula in this dtype."""
    if backend == "reference" and dtype != torch.float32:
        pytest.skip("the materialised path is eager")
    t = inputs_of(case, SHAPES[shape], dtype)
    wanted = outcome(case, in_dtype(case, t, torch.float64), case.formula)
    eager = outcome(case, t, case.formula)
    got = outcome(case, t, lambda t: case.call(t, backend=backend))
    for name, g, e, w in zip(("value", *case.leaves), got, eager, wanted, strict=True):
        # one number's eager error may be near 0 by luck, and a sum over all pairs cancels
        floor = FLOORS[dtype] * case.cancels * (1 if w.numel() > 1 else 8)
        assert error(g, w, 1e-2) <= 2 * error(e, w, 1e-2) + floor, name


def as_function(
    case: Case, shape: tuple[int, int, int], backend: str
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """The call as a function of its leaves, for gradcheck."""
    t = inputs_of(case, shape, torch.float64)

    def f(*values: Tensor) -> Tensor:
        fresh = vars(t) | dict(zip(case.leaves, values, strict=True))
        return case.call(Inputs(**fresh), backend=backend)

    return f, [getattr(t, name) for name in case.leaves]
