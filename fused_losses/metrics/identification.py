"""Identification: who is it? By rank in a gallery that has everyone, or that may not have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack, overload

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast
from fused_losses.base.validation import check_count, check_integers, check_matrix, describe
from fused_losses.metrics.lists import QueryLists
from fused_losses.metrics.retrieval import hits
from fused_losses.metrics.search import (
    Search,
    checked,
    neighbours,
    relevant,
    relevant_rows,
)
from fused_losses.metrics.verification import check_far, threshold_at_far


class MatchCurve(NamedTuple):
    """The share of queries [K] float64 that have met a relevant row at rank 1, .. K; NaN of none.

    queries: how many count. left_out: how many have no relevant row in the gallery. per_query:
    where it was asked for, the rank of each query's nearest relevant row, [N] float64, inf beyond
    K, NaN for those that are left out.
    """

    value: Tensor
    queries: int
    left_out: int
    per_query: Tensor | None = None


class Identification(NamedTuple):
    """Detection and identification rate at a false alarm rate; NaN without a mated probe.

    threshold: accepted is a distance below it, a product above it. mated, unmated: how many probes
    have a row in the gallery, and how many have none. per_query: where it was asked for, 1 for a
    probe that is found and 0 for one that is not, [N] float64, NaN for the unmated.
    """

    rate: float
    threshold: float
    mated: int
    unmated: int
    per_query: Tensor | None = None


@torch.no_grad()
def cmc(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    k: int = 20,
    cameras: Tensor | None = None,  # [N]
    ref_cameras: Tensor | None = None,  # [M]
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> MatchCurve:
    """Cumulative matching characteristic: how many queries are matched at rank 1, 2, .. k.

        CMC(r) = (1 / N) #{queries whose nearest relevant row has a rank <= r}

    Args:
        k: >= 1, the last rank.
        cameras, ref_cameras: integers; as in person re-identification a query then passes over the
            rows of its label that its own camera took. Needs one label a row, and no ids, which
            pass over rows of whatever label. Junk of the gallery (Market-1501's label -1) is to be
            left out of ref_embeddings; a distractor has a label that no query has.
        others: as in `recall_at_k`, whose value at r this is.

    All rows of the gallery stay in (the single shot of CUHK03 draws one a label). Returns
    `MatchCurve`. Errors and cost as in `recall_at_k`; memory O(k) more. Gray et al., 2007; Zheng et
    al., Market-1501, 2015.
    """
    check_count("k", k)
    if cameras is not None or ref_cameras is not None:
        if ids is not None or ref_ids is not None:
            raise ValueError("ids: expected cameras or ids, got both")
        ids, ref_ids = _own_camera(
            embeddings, labels, ref_embeddings, ref_labels, cameras, ref_cameras
        )
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    with no_autocast(embeddings.device):
        count = relevant_rows(search)
        rank = torch.full((len(count),), torch.inf, dtype=torch.float64, device=count.device)
        for run, hit in hits(search, k):
            first = hit.int().argmax(dim=1) + 1
            rank[run] = torch.where(hit.any(dim=1), first.double(), torch.inf)
        counted = count > 0
        queries = int(counted.sum())
        met = rank[counted & rank.isfinite()].long() - 1
        value = met.bincount(minlength=k).cumsum(0).double() / queries if queries else None
        if value is None:
            value = torch.full((k,), torch.nan, dtype=torch.float64, device=count.device)
        own = torch.where(counted, rank, torch.nan) if per_query else None
        return MatchCurve(value, queries, len(count) - queries, own)


def _own_camera(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None,
    ref_labels: Tensor | None,
    cameras: Tensor | None,
    ref_cameras: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """One number for each label and camera."""
    check_matrix("embeddings", embeddings, "[N, D]")
    sides = [("labels", labels, "cameras", cameras, embeddings)]
    if ref_embeddings is not None and ref_labels is not None:
        check_matrix("ref_embeddings", ref_embeddings, "[M, D]")
        sides.append(("ref_labels", ref_labels, "ref_cameras", ref_cameras, ref_embeddings))
    elif ref_cameras is not None:
        raise ValueError(
            f"ref_cameras: expected ref_embeddings and ref_labels beside it, got "
            f"{describe(ref_cameras)} alone"
        )
    for name, told, other, camera, rows in sides:
        if isinstance(told, Tensor) and told.dim() == 2:
            raise ValueError(f"cameras: expected one label a row beside it, got {describe(told)}")
        check_integers(name, told, (len(rows),), rows)
        check_integers(other, camera, (len(rows),), rows)
    of_label = torch.cat([side[1].long() for side in sides]).unique(return_inverse=True)[1]
    of_camera = torch.cat([side[3].long() for side in sides if side[3] is not None])
    names, of_camera = of_camera.unique(return_inverse=True)
    both = of_label * len(names) + of_camera
    n = len(embeddings)
    return both[:n], both[n:] if len(sides) == 2 else None


class OpenSetOptions(TypedDict, total=False):
    """Keywords of `dir_at_far`, whose own signature has their defaults."""

    rank: int
    metric: str
    ids: Tensor | None
    ref_ids: Tensor | None
    galleries: QueryLists | None
    per_query: bool
    backend: str | None


@overload
def dir_at_far(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    far: float = 0.01,
    **options: Unpack[OpenSetOptions],
) -> Identification: ...
@overload
def dir_at_far(
    embeddings: Tensor,
    labels: Tensor,
    ref_embeddings: Tensor | None = None,
    ref_labels: Tensor | None = None,
    *,
    far: Sequence[float],
    **options: Unpack[OpenSetOptions],
) -> dict[float, Identification]: ...
@torch.no_grad()
def dir_at_far(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    ref_embeddings: Tensor | None = None,  # [M, D]; None: embeddings
    ref_labels: Tensor | None = None,  # [M]
    *,
    far: float | Sequence[float] = 0.01,
    rank: int = 1,
    metric: str = "cosine",
    ids: Tensor | None = None,  # [N]
    ref_ids: Tensor | None = None,  # [M]
    galleries: QueryLists | None = None,  # [N, G]
    per_query: bool = False,
    backend: str | None = None,
) -> Identification | dict[float, Identification]:
    """Open set: the share of mated probes that are found at a threshold that few unmated ones pass.

        DIR = #{mated: the nearest row of its label is nearer than t, at a rank <= rank} / #mated
        FAR = #{unmated: its nearest row is nearer than t} / #unmated

    Args:
        embeddings, labels: the probes; mated is one that has a relevant row in the gallery.
        far: the share of the unmated that may raise an alarm, in [0, 1]; t is the loosest
            threshold that keeps to it, as in `threshold_at_far`: rows as near as t are refused.
            Several, a list: a dict of them from one search.
        rank: >= 1.
        others: as in `recall_at_k`.

    1 - DIR is the false negative identification rate (FNIR) at that FPIR. Without an unmated probe
    all is accepted. A probe with NaN is near to nothing. Returns `Identification`. Errors and cost
    as in `recall_at_k`. Phillips et al., 2011; Klare et al., IJB-A, 2015.
    """
    check_count("rank", rank)
    several = isinstance(far, list | tuple)
    rates = [check_far(rate) for rate in (far if several else [far])]
    search = checked(
        embeddings, labels, ref_embeddings, ref_labels, metric, ids, ref_ids, backend, galleries
    )
    with no_autocast(embeddings.device):
        mated = relevant_rows(search) > 0
        nearest, own = _scores(search, rank)
        alarms, matches = nearest[~mated], own[mated]
        sign = 1 if metric == "dot" else -1
        out = []
        for rate in rates:
            t = threshold_at_far(alarms, torch.zeros_like(alarms, dtype=torch.bool), rate)
            found = (matches > t).double()
            each = None
            if per_query:
                each = torch.where(mated, (own > t).double(), torch.nan)
            mean = float(found.mean()) if len(found) else float("nan")
            out.append(Identification(mean, sign * t + 0.0, len(matches), len(alarms), each))
    return dict(zip(far, out, strict=True)) if several else out[0]


def _scores(search: Search, rank: int) -> tuple[Tensor, Tensor]:
    """Of each probe the nearest row's score and the first relevant one's; -inf for none. [N]"""
    out = torch.full((2, len(search.x)), -torch.inf, dtype=torch.float64, device=search.x.device)
    sign = 1 if search.metric == "dot" else -1
    for run, value, index in neighbours(search, rank) if len(search.y) else ():
        there = index >= 0
        score = torch.where(there, sign * value.double(), -torch.inf)
        hit = there & relevant(search, run, index.clamp_min(0))
        first = hit.int().argmax(dim=1, keepdim=True)
        out[0, run] = score[:, 0]
        out[1, run] = torch.where(hit.any(dim=1), score.gather(1, first)[:, 0], -torch.inf)
    return out[0], out[1]
