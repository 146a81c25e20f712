"""Normalised discounted cumulative gain: how much relevance stands how far in front."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.validation import check_choice, check_device, check_matrix, describe
from fused_losses.metrics.lists import QueryLists, check_lists, check_once
from fused_losses.metrics.retrieval import Retrieval, mean_of
from fused_losses.metrics.search import (
    Search,
    candidates,
    check_k,
    checked,
    neighbours,
    relevant,
    relevant_rows,
)

GAINS = ("linear", "exponential")


@torch.no_grad()
def ndcg(
    embeddings: Tensor,  # [N, D]
    labels: Tensor | None = None,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    k: int | Sequence[int] | None = 10,
    judged: QueryLists | None = None,  # [N, L]
    grades: Tensor | Sequence[Any] | None = None,  # [N, L]
    gain: str = "linear",
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Retrieval:
    """NDCG@k: the gains of the k nearest, discounted by rank, over those of the best order.

        DCG@k = sum_{i <= k} gain_i / log2(i + 1)        NDCG@k = DCG@k / DCG@k of the best order

    Args:
        labels, ref_labels: as in `recall_at_k`: a relevant row has the gain 1, others 0. None where
            judged is given.
        k: >= 1; several in one search: value is then a dict. None: the whole gallery.
        judged: instead of labels, each query's columns of the gallery that have a grade, as
            `galleries` are told; all others have the grade 0.
        grades: >= 0, one for each of judged (what stands beside -1 is not read); None: 1.
        gain: "linear", the grade, or "exponential", 2^grade - 1.
        others: as in `recall_at_k`.

    The best order is that of the rows that the query may find: not itself, nor a row of its id, nor
    one outside its gallery. Returns `Retrieval`: the mean over the queries that have a gain to
    find; the others are counted and are no 0. Raises ValueError, TypeError for arguments that do
    not fit, IndexError for a column that the gallery does not have. Time O(N M D + N L log L);
    memory O(N (1 + L) + M) and a few blocks. Other code averages over the orders of tied rows; here
    the lower index is first. Järvelin and Kekäläinen, 2002; Burges et al., 2005 (exponential).
    """
    several = [] if k is None else check_k("k", k)
    check_choice("gain", gain, GAINS)
    if judged is None and grades is not None:
        raise ValueError("grades: expected None without judged, got grades")
    told = None
    if judged is not None:
        told = _judged(embeddings, labels, ref_embeddings, ref_labels, judged, grades, gain)
        labels = torch.zeros(len(embeddings), dtype=torch.int64, device=embeddings.device)
        if ref_embeddings is not None:
            ref_labels = labels.new_zeros(len(ref_embeddings))
    elif labels is None:
        raise ValueError("labels: expected labels or judged columns, got neither")
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    width = len(search.y) if search.galleries is None else search.galleries.shape[1]
    ends = several or [max(1, width)]
    with no_autocast(embeddings.device):
        longest = max(1, min(max(ends), width))
        dtype = row_dtype(embeddings.device)
        ranks = torch.arange(1, longest + 1, device=embeddings.device)
        discount = 1 / (ranks + 1).to(dtype).log2()
        if told is None:
            best = _best_of_labels(relevant_rows(search), discount, ends)
        else:
            told = told[0], torch.where(_may_find(search, told[0]), told[1], 0)
            best = _best_of_grades(told[1], discount, ends)
        out = {one: torch.zeros_like(best[one]) for one in ends}
        for run, _, index in neighbours(search, longest) if width else ():
            if told is None:
                found = (relevant(search, run, index.clamp_min(0)) & (index >= 0)).to(dtype)
            else:
                found = _gained(told[0][run], told[1][run], index)
            total = (found * discount[: found.shape[1]]).cumsum(dim=1)
            for one in ends:
                out[one][run] = total[:, min(one, total.shape[1]) - 1]
        some = best[ends[0]] > 0
        # a sum in another order may round above the best
        shares = {one: (out[one] / torch.where(some, best[one], 1)).clamp_max(1) for one in ends}
        return mean_of(search, some, shares, k, per_query)


def _judged(
    embeddings: Tensor,
    labels: Tensor | None,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    judged: QueryLists,
    grades: Tensor | Sequence[Any] | None,
    gain: str,
) -> tuple[Tensor, Tensor]:
    """Columns [N, L], increasing, M where there is none, and their gains."""
    for name, given in (("labels", labels), ("ref_labels", ref_labels)):
        if given is not None:
            raise ValueError(f"{name}: expected None beside judged, got {describe(given)}")
    check_matrix("embeddings", embeddings, "[N, D]")
    if ref_embeddings is not None:
        check_matrix("ref_embeddings", ref_embeddings, "[M, D]")
    n = len(embeddings)
    m = n if ref_embeddings is None else len(ref_embeddings)
    columns = check_lists("judged", judged, n, m, embeddings)
    check_once("judged", columns)
    gains = _grades(judged, grades, columns, row_dtype(embeddings.device))
    gains = gains if gain == "linear" else gains.exp2() - 1
    if not bool(gains.isfinite().all()):
        raise ValueError("grades: expected grades whose gains are finite, got larger ones")
    columns, order = torch.where(columns < 0, m, columns).sort(dim=1)
    return columns, gains.gather(1, order)


def _grades(
    judged: QueryLists,
    grades: Tensor | Sequence[Any] | None,
    columns: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """As columns [N, L]; 0 where there is none."""
    there = columns >= 0
    if grades is None:
        return there.to(dtype)
    if isinstance(judged, Tensor):
        if not isinstance(grades, Tensor):
            raise TypeError(f"grades: expected a tensor as judged is, got {type(grades).__name__}")
        if grades.shape != columns.shape or grades.is_complex() or grades.dtype == torch.bool:
            raise ValueError(
                f"grades: expected numbers {list(columns.shape)} as judged, got {describe(grades)}"
            )
        check_device("judged", judged, "grades", grades)
        told = grades.detach().to(dtype)
    else:
        told = _padded(judged, grades, columns, dtype)
    told = torch.where(there, told, 0)
    if not bool((told >= 0).all()):
        raise ValueError("grades: expected values >= 0, got a negative one or NaN")
    return told


def _padded(judged: Sequence[Any], grades: object, columns: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(grades, list | tuple) or len(grades) != len(judged):
        got = len(grades) if isinstance(grades, list | tuple) else type(grades).__name__
        raise ValueError(f"grades: expected {len(judged)} lists as judged, got {got}")
    told = torch.zeros(columns.shape, dtype=dtype, device=columns.device)
    for i, (one, of) in enumerate(zip(grades, judged, strict=True)):
        try:
            row = torch.as_tensor(one, dtype=dtype, device=columns.device)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"grades[{i}]: expected numbers, got {one!r}") from None
        if row.dim() != 1 or len(row) != len(of):
            raise ValueError(
                f"grades[{i}]: expected {len(of)} numbers as judged[{i}], got {describe(row)}"
            )
        told[i, : len(row)] = row
    return told


def _may_find(search: Search, columns: Tensor) -> Tensor:
    """Whether each of the columns [N, L], M: none, may be among the query's neighbours."""
    m = len(search.y)
    columns = torch.where(columns == m, -1, columns)
    able = candidates(search, slice(0, len(columns)), columns)
    if search.galleries is None:
        return able
    own = torch.where(search.galleries < 0, m, search.galleries)
    return able & (_at(own, columns) < own.shape[1])


def _at(columns: Tensor, wanted: Tensor) -> Tensor:
    """Where wanted [B, k] stands in increasing columns [B, L]; L: nowhere."""
    width = columns.shape[1]
    if not width:
        return torch.zeros_like(wanted)
    at = torch.searchsorted(columns, wanted.contiguous())
    return torch.where(columns.gather(1, at.clamp_max(width - 1)) == wanted, at, width)


def _gained(columns: Tensor, gains: Tensor, index: Tensor) -> Tensor:
    """What each neighbour [B, k], -1: none, has in lists [B, L]."""
    none = gains.new_zeros(len(gains), 1)
    return torch.cat([gains, none], dim=1).gather(1, _at(columns, index))


def _best_of_labels(count: Tensor, discount: Tensor, ends: list[int]) -> dict[int, Tensor]:
    most = torch.cat([discount.new_zeros(1), discount.cumsum(0)])
    return {one: most[count.clamp_max(min(one, len(discount)))] for one in ends}


def _best_of_grades(gains: Tensor, discount: Tensor, ends: list[int]) -> dict[int, Tensor]:
    most = min(gains.shape[1], len(discount))
    ordered = gains.sort(dim=1, descending=True).values[:, :most]
    total = (ordered * discount[:most]).cumsum(dim=1)
    total = torch.cat([gains.new_zeros(len(gains), 1), total], dim=1)
    return {one: total[:, min(one, most)] for one in ends}
