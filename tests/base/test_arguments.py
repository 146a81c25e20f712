"""What arguments say: one tensor twice, integers of any type, numbers of NumPy, nothing ignored."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STREAMED, require
from example_values import on_backend
from pair_rows import eye, nce_rows
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import metrics
from fused_losses.base.examples import TABLE, UNJUDGED, ExampleInputs
from fused_losses.base.sides import same_rows
from fused_losses.mining import mine_pairs, mine_triplets

# every loss that takes a second set of rows
AGAINST: dict[str, Callable[..., Tensor]] = {
    "contrastive": lambda *a, **o: fl.contrastive(*a, positive_margin=0.1, **o),
    "margin_loss": fl.margin_loss,
    "margin_loss, per triplet": lambda *a, **o: fl.margin_loss(*a, per="triplet", **o),
    "snr_contrastive": fl.snr_contrastive,
    "tuplet_margin": lambda *a, **o: fl.tuplet_margin(*a, scale=8.0, **o),
    "fast_ap": fl.fast_ap,
    "all_triplets": fl.all_triplets,
    "batch_hard_triplet": fl.batch_hard_triplet,
    "batch_easy_hard_triplet": fl.batch_easy_hard_triplet,
}
TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "a view": lambda x: x[:],
    "detached": lambda x: x.detach(),
}


def rows_and_labels() -> tuple[Tensor, Tensor]:
    x = torch.nn.functional.normalize(torch.randn(11, 6))
    return x.requires_grad_(), torch.arange(11) % 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("twice", TWICE)
@pytest.mark.parametrize("name", AGAINST)
def test_one_tensor_twice_is_one_batch(name: str, twice: str, reduction: str, backend: str) -> None:
    call, (x, labels) = AGAINST[name], rows_and_labels()
    alone = call(x, labels, reduction=reduction, backend=backend)
    # labels of their own, equal ones
    for others in (labels, labels.clone()):
        given = (x, labels, TWICE[twice](x), others)
        again = call(*given, reduction=reduction, backend=backend)
        torch.testing.assert_close(again, alone, rtol=1e-5, atol=1e-6)
        if twice != "detached":
            slopes = [torch.autograd.grad(loss.sum(), x)[0] for loss in (again, alone)]
            torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-5)
            alone = call(x, labels, reduction=reduction, backend=backend)


def test_fast_ap_of_one_tensor_twice_is_the_formula(backend: str) -> None:
    x, labels = rows_and_labels()
    d = (x[:, None] - x).square().sum(-1).detach().double()
    mine = (labels[:, None] == labels) & ~eye(11)
    bins = torch.arange(11) * 0.4
    weight = (1 - (d[..., None] - bins).abs() / 0.4).clamp_min(0)
    near = (weight * mine[..., None]).sum(1)
    every = (weight * ~eye(11)[..., None]).sum(1)
    ahead, total = near.cumsum(1), every.cumsum(1)
    precision = torch.where(total > 0, near * ahead / total.clamp_min(1e-300), 0)
    wanted = 1 - precision.sum(1) / mine.sum(1)
    got = fl.fast_ap(x, labels, x, labels, reduction="none", backend=backend)
    torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", AGAINST)
def test_other_labels_of_the_same_rows_leave_the_rows_themselves_out(
    name: str, backend: str
) -> None:
    """A label a side: what the columns' labels say counts, as with the rows in another memory."""
    call, (x, labels) = AGAINST[name], rows_and_labels()
    x = x.detach()
    others = torch.arange(11) % 3
    got = call(x, labels, x, others, reduction="none", backend=backend)
    # without row i in the second set, one row at a time
    for i in range(11):
        rest = torch.arange(11) != i
        wanted = call(
            x[i : i + 1], labels[i : i + 1], x[rest], others[rest],
            reduction="none", backend=backend,
        )[0]  # fmt: skip
        # of one batch each pair's terms are halved between its ends
        wanted = wanted / 2 if name == "contrastive" else wanted
        torch.testing.assert_close(got[i], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("twice", TWICE)
def test_mining_and_metrics_know_one_tensor_twice(twice: str, backend: str) -> None:
    x, labels = rows_and_labels()
    y = TWICE[twice](x)
    for mine in (mine_pairs, mine_triplets):
        alone, again = mine(x, labels, backend=backend), mine(x, labels, y, labels, backend=backend)
        for one, other in zip(alone, again, strict=True):
            assert torch.equal(one, other)
    recall = metrics.recall_at_k
    assert recall(x, labels, y, labels, backend=backend) == recall(x, labels, backend=backend)
    found = [metrics.knn_classify(x, z, labels, k=1, backend=backend).labels for z in (x, y)]
    assert torch.equal(*found)


def test_the_same_rows_are_told_by_their_memory() -> None:
    x = torch.randn(6, 4)
    assert same_rows(x, None) and same_rows(x, x) and same_rows(x, x.detach())
    assert same_rows(x, x[:]) and same_rows(x, x.view(6, 4))
    assert not same_rows(x, x.clone()) and not same_rows(x[:3], x[3:])
    assert not same_rows(x[:4, :4], x[:4, :4].T)
    meta = torch.empty(2, 2, device="meta")
    assert same_rows(meta, meta) and not same_rows(meta, torch.empty(2, 2, device="meta"))


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
def test_topk_of_rows_with_a_label_a_side(metric: str, backend: str) -> None:
    """Half of the products tell all only where i sees j and j sees i."""
    x, k = torch.randn(40, 8), 3
    of_rows, of_columns = torch.arange(40) % 3, torch.arange(40) % 5
    options: dict[str, Any] = dict(x_labels=of_rows, y_labels=of_columns, match="same")
    got = fl.pairwise_topk(x, None, k, metric, skip_self=True, backend=backend, **options)[1]
    d = fl.pairwise_distance(x.double(), None, metric, backend="reference")
    kept = (of_rows[:, None] == of_columns) & ~eye(40)
    wanted = torch.where(kept, d, torch.inf).sort(dim=1, stable=True).indices[:, :k]
    assert torch.equal(got, wanted)


# ---- integers -----------------------------------------------------------------------------------

NARROW, WIDE = torch.int8, torch.int64


@pytest.mark.parametrize("which", [(NARROW, WIDE), (WIDE, NARROW), (torch.uint8, torch.int8)])
def test_labels_of_unlike_types_do_not_wrap(
    which: tuple[torch.dtype, torch.dtype], backend: str
) -> None:
    """256 + c is no c of int8, nor is -1 the 255 of uint8."""
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    mine = torch.tensor([0, 1, 2, 3]) + (256 if which[0] == WIDE else 0)
    others = torch.tensor([0, 1, 2, 3, 7]) + (256 if which[1] == WIDE else 0)
    if which[0] == torch.uint8:
        mine, others = torch.tensor([255, 254, 0, 253]), torch.tensor([-1, -2, 5, -3, 9])
    mine, others = mine.to(which[0]), others.to(which[1])
    assert metrics.recall_at_k(x, mine, y, others, backend=backend).queries == 0
    loss = fl.all_triplets(x, mine, y, others, reduction="none", backend=backend)
    assert (loss == 0).all()
    rows = fl.info_nce(x, y, labels=mine, key_labels=others, reduction="none", backend=backend)
    assert (rows == 0).all()


@pytest.mark.parametrize("column", [2**32, 2**32 + 1, -(2**32), 5, -2, 2**63 - 1])
def test_a_column_out_of_range_is_refused(column: int, backend: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    exclude = torch.full((4, 1), -1)
    exclude[2] = column
    calls: tuple[Callable[[], object], ...] = (
        lambda: fl.info_nce(x, y, exclude=exclude, backend=backend),
        lambda: fl.pairwise_topk(x, y, 2, exclude=exclude, backend=backend),
        lambda: fl.logsumexp_similarity(x, y, exclude=exclude, backend=backend),
    )
    for call in calls:
        with pytest.raises(IndexError, match=r"exclude: expected columns in \[0, 5\), or -1, got"):
            call()


def test_a_column_that_nobody_reads_is_no_other(backend: str) -> None:
    """Compiled code does not read it: it leaves out nothing, and never column 0."""
    x, y = torch.randn(4, 3), torch.randn(5, 3)
    exclude = torch.tensor([[2**32], [-1], [2**32 + 1], [-1]])
    compiled = torch.compile(
        lambda e: fl.info_nce(x, y, exclude=e, backend="bounded"), backend="eager"
    )
    assert compiled(exclude) == fl.info_nce(x, y, backend="bounded")
    torch._dynamo.reset()


# ---- empty dimensions ---------------------------------------------------------------------------

EMPTY = {
    "no rows": (0, 8, 4),
    "nothing at all": (0, 0, 0),
    "no columns": (5, 0, 4),
    "no D": (6, 9, 0),
}
# examples that themselves divide by a number of classes
DIVIDE = ("several labels", "sub-centres", "pairwise_distance, weights")
EXAMPLES = [
    name
    for name, example in TABLE.items()
    if example.bound != UNJUDGED and not any(word in name for word in DIVIDE)
]


@pytest.mark.parametrize("shape", EMPTY)
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_empty_dimension_has_an_answer_or_a_named_error(name: str, shape: str) -> None:
    example = TABLE[name]
    found: dict[str, str | list[Tensor]] = {}
    for backend in ("reference", *STREAMED):
        if backend in example.not_on:
            continue
        inputs = ExampleInputs(*EMPTY[shape])
        leaves = [getattr(inputs, leaf).requires_grad_() for leaf in example.leaves]
        given = on_backend(example, require(backend))
        try:
            out = example(inputs, **given)
        except (ValueError, IndexError) as error:
            assert ": expected " in str(error), backend
            found[backend] = str(error)
            continue
        out = out if isinstance(out, tuple) else (out,)
        parts = [t for t in out if isinstance(t, Tensor)]
        ends = [t.sum() for t in parts if t.requires_grad]
        if ends:
            torch.stack(ends).sum().backward()
        assert all(t.grad is None or t.grad.shape == t.shape for t in leaves), backend
        found[backend] = parts
    wanted = found.pop("reference")
    for backend, got in found.items():
        assert type(got) is type(wanted), backend
        if not isinstance(got, str):
            named = partial("{}: {}".format, backend)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5, equal_nan=True, msg=named)


def test_batches_of_no_items_keep_their_gradient(backend: str) -> None:
    q, k, v = (torch.zeros(0, n, 4, requires_grad=True) for n in (3, 5, 5))
    out, lse = fl.similarity_attention(q, k, v, return_lse=True, backend=backend)
    assert out.shape == (0, 3, 4) and lse.shape == (0, 3)
    assert torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))[2].shape == v.shape
    flat = torch.zeros(2, 3, 0, requires_grad=True)
    d = fl.pairwise_distance(flat, torch.zeros(5, 0), "euclidean", backend=backend)
    assert d.shape == (2, 3, 5) and (d == 0).all()


# ---- InfoNCE ------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_an_excluded_positive_stays_out_with_ids(symmetric: bool, backend: str) -> None:
    x, y = torch.randn(5, 3), torch.randn(5, 3)
    ids = torch.tensor([0, 0, 1, 2, 3])
    exclude = torch.tensor([[0], [3], [-1], [3], [-1]])
    kept = (exclude[:, :, None] != torch.arange(5)).all(1)
    z = (x @ y.T).double()
    positive = eye(5) & kept
    negative = ~eye(5) & kept & (ids[:, None] != ids)
    rows, counted = nce_rows(z, positive, negative)
    if symmetric:
        columns, _ = nce_rows(z.T, positive.T, negative.T)
        rows = (rows + columns) / 2
    got = fl.info_nce(
        x, y, temperature=1.0, ids=ids, exclude=exclude, symmetric=symmetric,
        reduction="none", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), rows, rtol=1e-5, atol=1e-5)
    assert counted.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize("labelled", [False, True])
def test_a_negative_equal_to_the_limit_is_kept(labelled: bool, backend: str) -> None:
    """s > s_i + margin is left out: integers, whose products and sums are exact."""
    x, y = torch.randint(-2, 3, (9, 4)).float(), torch.randint(-2, 3, (9, 4)).float()
    y[5:] = y[:4]  # scores equal to the positives'
    labels = torch.arange(9) if labelled else None
    own = torch.einsum("nd,nkd->nk", x, y.expand(9, 9, 4))[:, :3]
    s = (x @ y.T).double()
    for margin in (0.0, 1.0):
        limit = s.diagonal()[:, None] + margin
        further = torch.cat([s, own.double()], 1)
        negative = torch.cat([~eye(9), torch.ones(9, 3, dtype=torch.bool)], 1)
        positive = torch.cat([eye(9), torch.zeros(9, 3, dtype=torch.bool)], 1)
        wanted, _ = nce_rows(further, positive, negative & (further <= limit))
        got = fl.info_nce(
            x, y, temperature=1.0, labels=labels, negatives=y[:3].expand(9, 3, 4),
            false_negative_margin=margin, reduction="none", backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_banks_positive_counts_for_the_margin(backend: str) -> None:
    x, y, bank = (torch.randint(-2, 3, (n, 4)).float() for n in (7, 7, 11))
    labels, told = torch.arange(7) % 3, torch.arange(11) % 4
    z = (x @ torch.cat([y, bank]).T).double()
    same = labels[:, None] == torch.cat([labels, told])
    best = torch.where(same, z, -torch.inf).amax(1, keepdim=True)
    wanted, _ = nce_rows(z, same, ~same & (z <= best))
    got = fl.info_nce(
        x, y, temperature=1.0, labels=labels, queue=bank, queue_labels=told,
        false_negative_margin=0.0, reduction="none", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_two_calls_over_gathered_rows_are_global_clip(backend: str) -> None:
    """Three ranks of four pairs: the mean over ranks and ways is the loss of all twelve."""
    image, text = torch.randn(12, 5), torch.randn(12, 5)
    z = (image @ text.T).double() / 0.5
    wanted = (z.logsumexp(1) + z.logsumexp(0)).mean() / 2 - z.diagonal().mean()
    options: dict[str, Any] = dict(temperature=0.5, backend=backend)
    found = []
    for offset in (0, 4, 8):
        mine = slice(offset, offset + 4)
        found.append(fl.info_nce(image[mine], text, offset=offset, **options))
        found.append(fl.info_nce(text[mine], image, offset=offset, **options))
    torch.testing.assert_close(torch.stack(found).mean().double(), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"symmetric: expected False with offset=4: the columns'"):
        fl.info_nce(image[4:8], text, offset=4, symmetric=True, **options)


def test_own_key_is_moco(backend: str) -> None:
    x, y, queue = torch.randn(6, 4), torch.randn(9, 4), torch.randn(13, 4)
    own = (x * y[2:8]).sum(1, keepdim=True)
    logits = torch.cat([own, x @ queue.T], 1).double() / 0.2
    wanted = torch.nn.functional.cross_entropy(logits, torch.zeros(6).long())
    got = fl.info_nce(x, y, offset=2, own_key=True, queue=queue, temperature=0.2, backend=backend)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    assert fl.info_nce(x, y, own_key=True, backend=backend) == 0
    for name, value in (("symmetric", True), ("ids", torch.arange(6)), ("labels", torch.arange(6))):
        given: dict[str, Any] = {name: value}
        if name != "symmetric":
            given[f"key_{name}"] = torch.arange(9)
        with pytest.raises(ValueError, match=f"{name}: expected none with own_key=True"):
            fl.info_nce(x, y, own_key=True, **given)


# ---- numbers, and arguments that a metric has no use for -----------------------------------------


def test_numbers_of_numpy_are_numbers(backend: str) -> None:
    x, y, labels = torch.randn(6, 4), torch.randn(6, 4), torch.arange(6) % 2
    half = np.float32(0.5)
    for number in (np.float32, np.float64, np.float16):
        calls: tuple[Callable[[Any], Tensor], ...] = (
            lambda v: fl.info_nce(x, y, temperature=v, backend=backend),
            lambda v: fl.multi_similarity(x, labels, beta=v, alpha=v, backend=backend),
            lambda v: fl.pairwise_similarity(x, y, "rbf", gamma=v, backend=backend),
            lambda v: fl.pairwise_distance(x, y, "minkowski", p=v, backend=backend),
            lambda v: fl.all_triplets(x, labels, margin=v, backend=backend),
            lambda v: fl.tuplet_margin(x, labels, scale=v, backend=backend),
            lambda v: metrics.knn_classify(x, y, labels, k=2, temperature=v).score,
        )
        for call in calls:
            assert torch.equal(call(number(0.5)), call(0.5))
    assert metrics.all_pairs_tar_at_far(x, labels, half) == metrics.all_pairs_tar_at_far(
        x, labels, 0.5
    )


IGNORED: dict[str, tuple[str, dict[str, Any], type[Exception], str]] = {
    "p": ("euclidean", dict(p=3.0), ValueError, "p: expected no value with metric='euclidean'"),
    "p of dot": ("dot", dict(p=3.0), ValueError, "p: expected no value with metric='dot'"),
    "no such": ("euclidean", dict(V=torch.ones(3)), TypeError, "V: expected one of w, VI"),
    "no such of mahalanobis": ("mahalanobis", dict(V=torch.ones(3)), TypeError, "V: expected one"),
    "VI": ("cosine", dict(VI=torch.eye(3)), ValueError, "VI: expected None with metric='cosine'"),
    "base": ("mahalanobis", dict(base=2.0), ValueError, "base: expected None with metric="),
    "w": ("dot", dict(w=torch.ones(3)), ValueError, "w: expected None, metric='dot' has no"),
    "both": (
        "mahalanobis",
        dict(VI=torch.eye(3), covariance=torch.eye(3)),
        ValueError,
        "covariance: expected one of VI, covariance and variance",
    ),
}


@pytest.mark.parametrize("row", IGNORED)
def test_topk_takes_no_argument_that_it_would_ignore(row: str) -> None:
    metric, options, error, message = IGNORED[row]
    for n in (4, 0):
        with pytest.raises(error, match=message):
            fl.pairwise_topk(torch.randn(n, 3), torch.randn(9, 3), 2, metric, **options)


def test_all_pairs_take_no_exponent_that_they_would_ignore() -> None:
    with pytest.raises(ValueError, match="p: expected no value with metric='cosine'"):
        metrics.all_pairs_tar_at_far(torch.randn(4, 3), torch.arange(4), 0.1, p=3.0)
