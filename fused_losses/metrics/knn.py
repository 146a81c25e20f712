"""kNN classification: what do the nearest rows of a labelled set say?"""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, no_autocast, row_dtype
from fused_losses.base.sides import same_rows
from fused_losses.base.validation import check_integers
from fused_losses.metrics.search import LISTED, check_k, checked, neighbours
from fused_losses.pairwise.radius import radius_search

WEIGHTS = ("uniform", "exp", "softmax")


class KnnClasses(NamedTuple):
    """What the neighbours say: the winning label [N] int64 and its score [N].

    scores: [N, num_classes] of every class where num_classes was given, else None. A query without
    a neighbour has label -1 and score 0.
    """

    labels: Tensor
    score: Tensor
    scores: Tensor | None


@torch.no_grad()
def knn_classify(
    embeddings: Tensor,  # [N, D]
    ref_embeddings: Tensor,  # [M, D]
    ref_labels: Tensor,  # [M]
    *,
    k: int = 10,
    weights: str = "softmax",
    temperature: float = 0.1,
    num_classes: int | None = None,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    backend: str | None = None,
) -> KnnClasses:
    """The class of the most weight among the k nearest rows of a labelled set.

    Args:
        embeddings, ref_embeddings: [N, D], [M, D]; one tensor twice: each row without itself.
        ref_labels: integers >= 0, [M].
        weights: "uniform" 1, "exp" e^(s / temperature), or "softmax", the same divided by its sum
            over the k; s the cosine, the product, or the negative distance.
        num_classes: also return the scores of every class, [N, num_classes].
        metric, ids, ref_ids: as in `recall_at_k`.

    Of equal classes the lowest wins. Returns `KnnClasses`. Raises ValueError, TypeError for
    arguments that do not fit, IndexError for labels outside [0, num_classes).
    Time O(N M D + N k^2); memory O(N + M) and a few blocks, and the scores if wanted.
    Papers: Wu et al., 2018 (exp); Zhang et al., AdaNPC, 2023 (softmax).
    """
    if isinstance(k, list | tuple):
        raise TypeError(f"k: expected an integer, got {type(k).__name__}")
    check_k("k", k)
    _check(embeddings, ref_embeddings, ref_labels, weights, temperature, num_classes)
    unused = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
    if same_rows(embeddings, ref_embeddings):
        unused = ref_labels
    search = checked(
        *(embeddings, unused, ref_embeddings, ref_labels, metric, ids, ref_ids, backend)
    )
    n, dtype = len(embeddings), accumulate_dtype(embeddings.dtype)
    winner = torch.full((n,), -1, dtype=torch.int64, device=embeddings.device)
    score = torch.zeros(n, dtype=dtype, device=embeddings.device)
    dense = None if num_classes is None else score.new_zeros((n, num_classes))
    k = max(1, min(k, len(ref_embeddings)))
    with no_autocast(embeddings.device):
        for run, value, index in neighbours(search, k) if len(ref_embeddings) else ():
            label = ref_labels.long()[index.clamp_min(0)]
            weight, shift = _weights(value, index, weights, temperature, metric)
            for i in range(0, len(index), step := max(1, LISTED // (k * k))):
                part = slice(i, i + step)
                at = slice(run.start + i, min(run.start + i + step, run.stop))
                # a class's sum has one order, so equal ones are equal to the bit
                same = label[part, :, None] == label[part, None, :]
                total = torch.where(same, weight[part, None, :], 0).sum(dim=2)
                told = total if shift is None else (total.log() + shift[part]).exp()
                taken = index[part] >= 0
                best = torch.where(taken, total, -torch.inf).amax(dim=1, keepdim=True)
                first = taken & (total == best)
                lowest = torch.where(first, label[part], torch.iinfo(torch.int64).max).amin(dim=1)
                some = taken.any(dim=1)
                winner[at] = torch.where(some, lowest, -1)
                largest = torch.where(first, told, -torch.inf).amax(dim=1)
                score[at] = torch.where(some, largest, 0).to(dtype)
                if dense is not None and num_classes is not None:
                    # a place that is no neighbour writes to a column of its own
                    place = torch.where(taken, label[part], num_classes)
                    wide = dense.new_zeros((len(place), num_classes + 1))
                    dense[at] = wide.scatter(1, place, told.to(dtype))[:, :num_classes]
    return KnnClasses(winner, score, dense)


def _check(
    embeddings: Tensor,
    ref_embeddings: Tensor,
    ref_labels: Tensor,
    weights: str,
    temperature: float,
    num_classes: int | None,
) -> None:
    validation.check_choice("weights", weights, WEIGHTS)
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature: expected a number > 0, got {type(temperature).__name__}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature: expected a number > 0, got {temperature}")
    if num_classes is not None:
        validation.check_count("num_classes", num_classes)
    validation.check_matrix("embeddings", embeddings, "[N, D]")
    validation.check_matrix("ref_embeddings", ref_embeddings, "[M, D]")
    check_integers("ref_labels", ref_labels, (ref_embeddings.shape[0],), ref_embeddings)
    if len(ref_labels) and int(ref_labels.min()) < 0:
        raise IndexError(f"ref_labels: expected values >= 0, got {int(ref_labels.min())}")
    if num_classes is not None:
        validation.check_labels(ref_labels, num_classes, name="ref_labels")


@torch.no_grad()
def radius_classify(
    embeddings: Tensor,  # [N, D]
    ref_embeddings: Tensor,  # [M, D]
    ref_labels: Tensor,  # [M]
    radius: float,
    *,
    weights: str = "softmax",
    temperature: float = 0.1,
    num_classes: int | None = None,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    backend: str | None = None,
) -> KnnClasses:
    """The class of the most weight among all rows of a labelled set within a radius.

    radius: as in `radius_search`; AdaNPC's ball of similarities s >= eps is a radius of 1 - eps
    with "cosine". The others, what is returned and raised as in `knn_classify`; a query without a
    row within has label -1 and score 0. Time O(N M D + P log P) for P pairs within; memory O(P) and
    a few blocks, and the scores if wanted. Paper: Zhang et al., AdaNPC, 2023.
    """
    _check(embeddings, ref_embeddings, ref_labels, weights, temperature, num_classes)
    own = same_rows(embeddings, ref_embeddings)
    given: dict[str, Any] = dict(metric=metric, skip_self=own, backend=backend)
    if ids is not None or ref_ids is not None:
        given |= dict(x_ids=ids, y_ids=ids if own and ref_ids is None else ref_ids)
    found = radius_search(embeddings, ref_embeddings, radius, **given)
    n, dtype = len(embeddings), accumulate_dtype(embeddings.dtype)
    rows, label = found.rows(), ref_labels.long()[found.indices]
    with no_autocast(embeddings.device):
        z = found.values.to(row_dtype(found.values.device))
        top = z.new_full((n,), -torch.inf)
        if weights == "uniform":
            weight = torch.ones_like(z)
        else:
            z = (z if metric == "dot" else 1 - z if metric == "cosine" else -z) / temperature
            top = top.scatter_reduce(0, rows, z, "amax")
            weight = (z - top[rows]).exp()
        # a class of a row a line: in the order of rows and classes
        most = int(label.max()) + 1 if len(label) else 1
        key, line = (rows * most + label).unique(return_inverse=True)
        total = z.new_zeros(len(key)).index_add(0, line, weight)
        row, kind = key // most, key % most
        if weights == "softmax":
            total = total / z.new_zeros(n).index_add(0, row, total)[row]
        told = (total.log() + top[row]).exp() if weights == "exp" else total
        best = z.new_full((n,), -torch.inf).scatter_reduce(0, row, total, "amax")
        first = total == best[row]
        none = torch.iinfo(torch.int64).max
        winner = torch.full((n,), none, dtype=torch.int64, device=z.device)
        winner = winner.scatter_reduce(0, row[first], kind[first], "amin")
        score = z.new_zeros(n).scatter_reduce(0, row[first], told[first], "amax")
        dense = None
        if num_classes is not None:
            dense = torch.zeros((n, num_classes), dtype=dtype, device=z.device)
            dense[row, kind] = told.to(dtype)
    return KnnClasses(torch.where(winner == none, -1, winner), score.to(dtype), dense)


def _weights(
    value: Tensor, index: Tensor, weights: str, temperature: float, metric: str
) -> tuple[Tensor, Tensor | None]:
    """Each neighbour's weight, 0 where there is none [B, k], and what its log was moved by [B, 1].

    float64 where there is that.
    """
    taken = index >= 0
    value = value.to(row_dtype(value.device))
    if weights == "uniform":
        return taken.to(value.dtype), None
    similarity = value if metric == "dot" else 1 - value if metric == "cosine" else -value
    z = torch.where(taken, similarity / temperature, -torch.inf)
    top = z.amax(dim=1, keepdim=True)
    mass = torch.where(taken, z - top, -torch.inf).exp()
    if weights == "softmax":
        return mass / mass.sum(dim=1, keepdim=True).clamp_min(1), None
    return mass, top
