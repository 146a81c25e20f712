"""A bank of 16-bit rows is read where it lies: what a call takes does not grow by a copy of it.

`explain` is asked of every example that has a large second side, for few queries: of a bank and of
one twice as long, the call and the gradients of what is not the bank. What copies is listed. A
child counts the allocations (counted.py) of one example a kernel.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import require
from counted import COUNTER, told_by_child
from example_values import floats
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import fused_losses
from fused_losses import functional as f
from fused_losses.base.examples import TABLE, ExampleInputs

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("banks_in_place")]

QUERIES, ROWS, WIDTH = 3, 8192, 512
COPY = 2 * ROWS * WIDTH  # bytes by which a 16-bit copy grows from one bank to the next

# 16-bit copies that `explain` tells of, at most: of functions, or of single examples. Rows are
# copied in their own dtype where they are made of norm 1, may have to be moved towards 0 or, of
# hardest pairs, may have a NaN; widened where PyTorch's own operators run: metrics made of
# products, rules of whole rows, guides, a class's means, nested widths.
COPIES = {
    "kernel_mean": 1,
    "contrastive": 1,
    "prototype_triplet": 1,
    "proxy_nca": 1,
    "batch_hard_triplet": 1,
    "batch_easy_hard_triplet": 1,
    "info_nce, learned temperature": 1,
    "logsumexp_similarity, cosine": 1,
    "logsumexp_similarity, both": 1,
    "logsumexp_similarity, rbf": 1,
    "similarity_attention, cosine, same": 1,
    "similarity_attention, euclidean": 1,
    "similarity_attention, items": 1,
    "similarity_attention, rbf, different": 1,
    "nested_info_nce": 1,
    "nested_margin_softmax, products": 1,
    "distances, scaled": 2,
    "pairwise_distance, lorentz": 2,
    "all_triplets, swap": 2,
    "fast_ap": 2,
    "histogram": 2,
    "pnp": 2,
    "ranked_list": 2,
    "smooth_ap": 2,
    "tuplet_margin": 2,
    "harmonic_triplet, listed": 3,
    "angular": 4,
    "guided_contrastive, relative": 4,
    "pairwise_distance, cosine": 4,
    "pairwise_distance, jensenshannon": 4,
    "pairwise_distance, weights": 4,
    "pairwise_similarity, cosine": 4,
    "harmonic_triplet": 5,
    "hard_contrastive": 5,
    "pairwise_distance, diagonal": 6,
    "gated_contrastive": 6,
    "nested_margin_softmax": 7,
    "nested_info_nce, learned temperature": 7,
    "nested_info_nce, normalized": 7,
    "centroid_triplet": 6,
    "guided_contrastive": 8,
    "masked_contrastive": 8,
    "pairwise_distance, poincare": 8,
    "info_nce, guide": 8,
    "info_nce, share": 8,
    "info_nce, share, labels": 8,
    "info_nce, weights": 8,
    "mmd": 9,
    "proxy_anchor": 9,
    "sinkhorn": 9,
    "snr_contrastive": 10,
    "sinkhorn_divergence, unbalanced": 11,
    "info_nce, guide, banks": 12,
    "pairwise_distance, angular": 12,
    "pairwise_distance, correlation": 12,
    "pairwise_distance, snr": 12,
    "snr_contrastive, ref": 12,
    "sinkhorn, sqeuclidean": 15,
    "pairwise_distance, mahalanobis": 20,
    "sinkhorn_divergence": 30,
}
# a covariance a class: D times the bank
LEFT_OUT = ("gaussian_scores", "gaussian_cross_entropy", "class_aware_alignment")
# queries of tokens, and what another backend alone can run
NOT_TOLD = ("maxsim", "trilinear_attention")


class Zeros(ExampleInputs):
    """Of which `explain` reads shapes alone."""

    def _rows(self, name: str, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype)


MADE = {m: Zeros(QUERIES, m, WIDTH, torch.bfloat16) for m in (ROWS, 2 * ROWS)}


def large(t: Tensor) -> bool:
    return t.is_floating_point() and t.numel() >= ROWS * WIDTH // 2


def told(name: str, rows: int) -> int | None:
    """What `explain` tells of an example; None: it has no large side."""
    banks = []

    def leaf(given: Tensor) -> Tensor:
        banks.extend([given] if large(given) else [])
        return given.detach().requires_grad_(given.is_floating_point() and not large(given))

    args, options = tree_map_only(Tensor, leaf, TABLE[name].arguments(MADE[rows]))
    options["backend"] = "cpu"
    if not banks:
        return None
    return fused_losses.explain(TABLE[name].function, *args, **options).peak_extra_bytes


def examples_with_banks() -> list[str]:
    few = ExampleInputs(QUERIES, 40, 8)
    names = []
    for name, example in TABLE.items():
        if not example.takes("backend") or "cpu" in example.not_on:
            continue
        if example.function.__name__ not in (*LEFT_OUT, *NOT_TOLD):
            given = tree_leaves(example.arguments(few))
            names += [name] * any(isinstance(t, Tensor) and 40 in t.shape[:-1] for t in given)
    return names


@pytest.mark.parametrize("name", examples_with_banks())
def test_a_call_grows_by_no_copy_of_a_bank(name: str) -> None:
    require("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        few, many = (told(name, rows) for rows in MADE)
    if few is None or many is None:
        return
    copies = COPIES.get(name, COPIES.get(TABLE[name].function.__name__, 0))
    # vectors of the columns are less than a copy
    assert many - few < (copies + 1) * COPY
    # what copies less has its line changed; variants of a function may differ by one
    assert many - few > (copies - 1) * COPY


# ---- one example a kernel, counted --------------------------------------------------------------

COUNTED = {
    "cpu": (
        "info_nce, labels, symmetric",
        "logsumexp_similarity",
        "logsumexp_similarity, rbf",  # no coordinate has one sign: nothing is moved, nor copied
        "similarity_attention",
        "maxsim",
        "distances, euclidean",
        "distances, cityblock",
        "topk, dot",
        "linear_cross_entropy",
        "distillation",
        "SFace",
    ),
    "bounded": ("info_nce, labels, symmetric", "logsumexp_similarity", "similarity_attention"),
}

CHILD = (
    COUNTER
    + """
from torch.utils._pytree import tree_leaves, tree_map_only
from fused_losses.base.examples import TABLE, ExampleInputs

backend, names, queries, rows, width = json.loads(sys.argv[1])
made = [ExampleInputs(queries, m, width, torch.bfloat16) for m in (rows, 2 * rows)]

def run(example, inputs):
    def leaf(given):
        few = given.is_floating_point() and given.numel() < rows * width // 2
        return given.detach().requires_grad_(few)

    args, options = tree_map_only(torch.Tensor, leaf, example.arguments(inputs))
    options["backend"] = backend

    def step():
        found = tree_leaves(example.function(*args, **options))
        moving = [t for t in found if isinstance(t, torch.Tensor) and t.requires_grad]
        torch.autograd.backward(moving, [torch.ones_like(t) for t in moving])

    step()  # threads, lazy imports and the buffers that MKL keeps are the process's
    return extra(step)

print(json.dumps({name: [run(TABLE[name], inputs) for inputs in made] for name in names}))
"""
)


@functools.cache
def measured(backend: str) -> dict[str, tuple[int, int]]:
    """By example: the peak of bytes of a bank, and of one twice as long."""
    return told_by_child(CHILD, [backend, COUNTED[backend], 16, ROWS, WIDTH])


@pytest.mark.processes
@pytest.mark.parametrize("backend, name", [(b, n) for b, names in COUNTED.items() for n in names])
def test_what_is_counted_grows_by_no_copy_of_a_bank(backend: str, name: str) -> None:
    few, many = measured(require(backend))[name]
    assert many - few < COPY


# ---- what is read is what lies there ------------------------------------------------------------

LONG = 57_000  # columns of 37 coordinates, beyond those that distances widen at once
DISTANCES = ("dot", "sqeuclidean", "euclidean", "cityblock", "chebyshev", "canberra", "braycurtis")


def tokens(rows: Tensor, each: int) -> Tensor:
    return rows[: len(rows) // each * each].view(-1, each, rows.shape[1])


CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dot": lambda x, y: f.logsumexp_similarity(x, y, cols=True, backend="cpu"),
    "rbf": lambda x, y: f.logsumexp_similarity(x, y, similarity="rbf", cols=True, backend="cpu"),
    "euclidean scores": lambda x, y: f.logsumexp_similarity(
        x, y, similarity="euclidean", backend="cpu"
    ),
    "attention": lambda x, y: f.similarity_attention(x, y, y, backend="cpu"),
    "attention, rbf": lambda x, y: f.similarity_attention(
        x, y, y, similarity="rbf", scale=0.1, backend="cpu"
    ),
    "maxsim": lambda x, y: f.maxsim(tokens(x, 7), tokens(y, 25), backend="cpu"),
    **{
        kind: lambda x, y, kind=kind: f.pairwise_distance(x, y, metric=kind, backend="cpu")
        for kind in DISTANCES[2:]
    },
    "sqeuclidean, long": lambda x, y: f.pairwise_distance(
        x[:3], y.repeat(LONG // len(y) + 1, 1), metric="sqeuclidean", backend="cpu"
    ),
    "cityblock, long": lambda x, y: f.pairwise_distance(
        x[:3], y.repeat(LONG // len(y) + 1, 1), metric="cityblock", backend="cpu"
    ),
}


def answers(name: str, x: Tensor, y: Tensor) -> list[Tensor]:
    """What a call gives, and its gradients in both sides."""
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    found = list(floats(CALLS[name](x, y)))
    # within float16 after a sum over all columns
    factor = 2.0**-10 if name.endswith("long") else 1.0
    slopes = [factor * torch.linspace(0.5, 1.5, t.numel()).view_as(t).to(t.dtype) for t in found]
    return [*(t.detach() for t in found), *torch.autograd.grad(found, (x, y), slopes)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_rows_of_16_bits_give_what_their_values_give(name: str, dtype: torch.dtype) -> None:
    require("cpu")
    # several blocks of columns, and rows that no vector ends
    x, y = (torch.randn(count, 37) for count in (70, 2_500))
    y[:70] = x + 0.01 * y[:70]  # near pairs
    x, y = x.to(dtype), y.to(dtype)
    narrow, wide = answers(name, x, y), answers(name, x.float(), y.float())
    eps = torch.finfo(dtype).eps
    for got, want in zip(narrow, wide, strict=True):
        # a rounding of what is stored; sums may be added up in other parts
        allowed = eps if got.dtype == dtype else 4e-6
        apart = (got.float() - want).norm()
        assert apart <= allowed * want.norm()
