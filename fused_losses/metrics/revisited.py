"""Mean average precision as Revisited Oxford and Paris take it: with rows that do not count."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.base.sides import sides
from fused_losses.metrics.lists import QueryLists, check_lists, check_once
from fused_losses.metrics.search import Search, check_k, check_metric, neighbours

EASY, HARD, JUNK = 1, 2, 3
# what is right and what is left out
PROTOCOLS = {
    "easy": ((EASY,), (HARD, JUNK)),
    "medium": ((EASY, HARD), (JUNK,)),
    "hard": ((HARD,), (EASY, JUNK)),
}


class RevisitedProtocol(NamedTuple):
    """Means over the queries that have a right row, NaN without one; and of each query.

    precision: {k: mP@k}. average_precision: [N], precision_at: {k: [N]}, NaN where a query has no
    right row. queries: how many count. left_out: how many do not.
    """

    map: float
    precision: dict[int, float]
    queries: int
    left_out: int
    average_precision: Tensor
    precision_at: dict[int, Tensor]


class RevisitedMap(NamedTuple):
    """The three protocols of one search."""

    easy: RevisitedProtocol
    medium: RevisitedProtocol
    hard: RevisitedProtocol


@torch.no_grad()
def revisited_map(
    queries: Tensor,  # [N, D]
    gallery: Tensor,  # [M, D]
    *,
    easy: QueryLists | None = None,  # [N, L] columns, or N lists
    hard: QueryLists | None = None,
    junk: QueryLists | None = None,
    k: int | Sequence[int] = (1, 5, 10),
    metric: str = "cosine",
    backend: str | None = None,
) -> RevisitedMap:
    """mAP and mP@k of ROxford and RParis, under the protocols easy, medium and hard.

        AP = (1 / R) sum_{j = 1..R} (P_j^- + P_j) / 2
        P_j = j / r_j,   P_j^- = (j - 1) / (r_j - 1)

    r_j: the rank of the j-th right row among the rows that count, P_j^- = 1 where r_j = 1: the area
    under precision over recall by trapezoids. mP@k has the divisor min(k, r_R).

    Args:
        queries, gallery: [N, D], [M, D], of one dtype.
        easy, hard, junk: each query's columns of the gallery, a list a query or integers [N, L]
            padded with -1; None: none. A column stands in one list at most. Right are the easy
            rows (easy), both (medium), the hard ones (hard). Junk is passed over, as if it were not
            in the gallery, and so are hard rows under easy and easy ones under hard.
        k: of mP@k, one or several.
        metric: as in `recall_at_k`. A query that is in the gallery itself belongs in its junk.

    Nearest first, equal ones by the lowest index; a row with NaN is never found. Returns
    `RevisitedMap`. Raises ValueError, TypeError for arguments that do not fit, IndexError for a
    column that the gallery does not have. Time O(N M (D + log M)); memory O(N L + M) and a few
    blocks. Radenovic et al., Revisiting Oxford and Paris, 2018.
    """
    several = check_k("k", k)
    check_metric(metric)
    both = sides(queries, gallery, "fp32", names=("queries", "gallery"))
    x, y = both.x, both.y
    n, m = len(x), len(y)
    named = {"easy": easy, "hard": hard, "junk": junk}
    told = [check_lists(name, lists, n, m, x) for name, lists in named.items()]
    columns = torch.cat(told, dim=1)
    check_once("easy, hard, junk", columns)
    of_column = torch.cat(
        [torch.full_like(c, kind) for c, kind in zip(told, (EASY, HARD, JUNK), strict=True)], dim=1
    ).to(torch.int8)
    unused = torch.zeros(max(n, m), dtype=torch.int32, device=x.device)
    search = Search(x, y, False, unused[:n], unused[:m], None, None, metric, backend)
    dtype = row_dtype(x.device)
    empty = torch.full((3, n), torch.nan, dtype=dtype, device=x.device)
    areas = empty.clone()
    precisions = {one: empty.clone() for one in several}
    with no_autocast(x.device):
        for run, _, index in neighbours(search, m) if n else ():
            # one column more, for the ends of lists and for ranks that nobody has
            marks = torch.zeros((len(index), m + 1), dtype=torch.int8, device=x.device)
            listed = columns[run]
            marks.scatter_(1, torch.where(listed < 0, m, listed), of_column[run])
            marks[:, m] = 0
            marks = marks.gather(1, torch.where(index < 0, m, index))
            for at, (right, ignored) in enumerate(PROTOCOLS.values()):
                wanted = _any_of(of_column[run], right) & (listed >= 0)
                count = wanted.sum(dim=1)
                found = _averaged(marks, index >= 0, right, ignored, count, several)
                areas[at, run] = found[0].to(dtype)
                for one, value in found[1].items():
                    precisions[one][at, run] = value.to(dtype)
    return RevisitedMap(
        *(_means(areas[at], {one: p[at] for one, p in precisions.items()}) for at in range(3))
    )


def _averaged(
    marks: Tensor,  # [B, M], what stands at each rank
    there: Tensor,  # [B, M], whether anything does
    right: tuple[int, ...],
    ignored: tuple[int, ...],
    count: Tensor,  # [B], right rows
    several: list[int],
) -> tuple[Tensor, dict[int, Tensor]]:
    """Average precision and precision at each k of a run of queries; NaN without a right row."""
    counts, hit = there & ~_any_of(marks, ignored), _any_of(marks, right)
    dtype = row_dtype(marks.device)
    rank = counts.long().cumsum(dim=1)
    hits = hit.long().cumsum(dim=1)
    after = hits / rank.clamp_min(1).to(dtype)
    before = torch.where(rank == 1, 1, (hits - 1) / (rank - 1).clamp_min(1).to(dtype))
    some = torch.where(count > 0, count.to(dtype), torch.nan)
    area = torch.where(hit, (before + after) / 2, 0).sum(dim=1) / some
    last = torch.where(hit, rank, 0).amax(dim=1)
    at_k = {}
    for k in several:
        # a right row that is never found stands behind all
        end = torch.where(hits[:, -1] == count, last.clamp_max(k), k)
        within = (hit & (rank <= end[:, None])).sum(dim=1)
        at_k[k] = torch.where(count > 0, within / end.clamp_min(1).to(dtype), torch.nan)
    return area, at_k


def _any_of(marks: Tensor, kinds: tuple[int, ...]) -> Tensor:
    return torch.stack([marks == kind for kind in kinds]).any(dim=0)


def _means(area: Tensor, precision: dict[int, Tensor]) -> RevisitedProtocol:
    counted = ~area.isnan()
    queries = int(counted.sum())
    nothing = float("nan")
    return RevisitedProtocol(
        float(area[counted].mean()) if queries else nothing,
        {k: float(p[counted].mean()) if queries else nothing for k, p in precision.items()},
        queries,
        len(area) - queries,
        area,
        precision,
    )
