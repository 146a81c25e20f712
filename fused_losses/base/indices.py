"""A miner's result, checked: the pairs or triplets that a loss is to take."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import accumulate_dtype
from fused_losses.base.validation import assert_async, check_device, describe

Indices = tuple[Tensor, ...]  # a miner's: (a, p, n), or two lists of pairs (a, p, a, n)
EXPECTED = "(a, p, n) or (a, p, a, n) of a miner, three or four int64 tensors"


class WeightedPairs(NamedTuple):
    """A list of pairs for `indices`, each with what it counts for: soft positives.

    A pair that is lambda of a positive and the rest of a negative stands in both lists. Terms of a
    pair, and exponentials in a sum, are multiplied by its weight, >= 0, which may need a gradient;
    a pair of weight 0 is none. Where a loss divides by a number of pairs, that number is not
    weighted. Of a pair that is listed twice a loss that counts it once takes the first weight.
    """

    anchor: Tensor  # [P] int64, rows of embeddings
    positive: Tensor  # [P] int64, rows of ref_embeddings
    negative_anchor: Tensor  # [Q] int64
    negative: Tensor  # [Q] int64
    positive_weight: Tensor  # [P]
    negative_weight: Tensor  # [Q]


class PairList(NamedTuple):
    """Pairs of a row and a column, in any order."""

    rows: Tensor  # [P] int64
    columns: Tensor  # [P] int64
    kept: Tensor | None = None  # [P] bool: the others stand there for nothing; None: all count
    weight: Tensor | None = None  # [P] what a pair counts for; None: 1


class ListedPairs(NamedTuple):
    """The pairs that take part, of either class."""

    positive: PairList
    negative: PairList
    aligned: bool  # both lists have the same rows: line t is a triplet

    def once(self, columns: int) -> ListedPairs:
        """A pair that is listed more than once counts once; of so many columns."""
        return self._replace(
            positive=_once(self.positive, columns), negative=_once(self.negative, columns)
        )


def miner_pairs(
    indices: Any, n: int, m: int, like: Tensor, *, weighted: bool = False
) -> ListedPairs:
    """The pairs of a miner's result over n rows and m columns; of triplets (a, p) and (a, n).

    indices: (a, p, n) or (a, p, a, n), int64, or `Triplets` or `Pairs` of `mining`, or of a loss
    that weighs pairs `WeightedPairs`. Raises TypeError, ValueError, IndexError that name the list.
    """
    if weighted and isinstance(indices, WeightedPairs):
        a, p, b, k = checked_indices(indices[:4], n, m, like)
        near = _checked_weight("indices.positive_weight", indices.positive_weight, a, like)
        far = _checked_weight("indices.negative_weight", indices.negative_weight, b, like)
        return ListedPairs(PairList(a, p, None, near), PairList(b, k, None, far), a is b)
    given = checked_indices(indices, n, m, like)
    if len(given) == 3:
        a, p, k = given
        return ListedPairs(PairList(a, p), PairList(a, k), True)
    a, p, b, k = given
    return ListedPairs(PairList(a, p), PairList(b, k), a is b)


def _checked_weight(name: str, weight: Any, rows: Tensor, like: Tensor) -> Tensor:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        got = describe(weight) if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"{name}: expected a floating point tensor [{len(rows)}], got {got}")
    if weight.shape != rows.shape:
        raise ValueError(f"{name}: expected shape ({len(rows)},), got {describe(weight)}")
    check_device("embeddings", like, name, weight)
    return weight


def checked_indices(indices: Any, n: int, m: int, like: Tensor) -> tuple[Tensor, ...]:
    """The three or four lists of `indices`, which are as they should be (`miner_pairs`)."""
    if not isinstance(indices, tuple | list):
        raise TypeError(f"indices: expected {EXPECTED}, got {type(indices).__name__}")
    if isinstance(indices, WeightedPairs):
        told = "this loss weighs no pair, got WeightedPairs"
        raise TypeError(f"indices: expected {EXPECTED}: {told}")
    # what `mining` returns has distances, too
    names = getattr(indices, "_fields", None) or [""] * len(indices)
    given = [v for name, v in zip(names, indices, strict=True) if not name.endswith("_distance")]
    if len(given) not in (3, 4):
        raise ValueError(f"indices: expected {EXPECTED}, got {len(given)} of them")
    lengths: list[int] = []
    for i, index in enumerate(given):
        _check_vector(f"indices[{i}]", index, like)
        lengths.append(index.shape[0])
    last = len(given) - 2
    if len(set(lengths[:last] if last == 2 else lengths)) > 1 or len(set(lengths[last:])) > 1:
        raise ValueError(f"indices: expected lists of one length, got lengths {tuple(lengths)}")
    for i, index in enumerate(given):
        anchors = i == 0 or (len(given) == 4 and i == 2)
        side, count = ("embeddings", n) if anchors else ("the other side", m)
        _check_range(f"indices[{i}]", index, count, side)
    return tuple(given)


def occurrences(indices: Indices, embeddings: Tensor) -> Tensor:
    """How often each row is among a miner's indices, over the most that one is; 1 of none. [N]"""
    n, dtype = len(embeddings), accumulate_dtype(embeddings.dtype)
    listed = torch.cat(checked_indices(indices, n, n, embeddings))
    ones = torch.ones(n, dtype=dtype, device=embeddings.device)
    if not len(listed):
        return ones
    counts = torch.zeros_like(ones).index_add(0, listed, ones.new_ones(len(listed)))
    return counts / counts.max()


def check_index(name: str, index: Any, count: int, side: str, like: Tensor) -> None:
    """Rows in [0, count) of a side, int64 [P]."""
    _check_vector(name, index, like)
    _check_range(name, index, count, side)


def _check_vector(name: str, index: Any, like: Tensor) -> None:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor [P], got {type(index).__name__}")
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor [P], got {describe(index)}")
    if index.dim() != 1:
        raise ValueError(f"{name}: expected one dimension [P], got {describe(index)}")
    check_device("embeddings", like, name, index)


def _check_range(name: str, index: Tensor, count: int, side: str) -> None:
    """Rows in [0, count); on a GPU as in `validation.check_labels`."""
    if torch.compiler.is_compiling() or index.numel() == 0 or index.is_meta:
        return
    bad = (index < 0) | (index >= count)
    told = f"{name}: expected rows of {side} in [0, {count})"
    if index.is_cuda and os.environ.get("FUSED_LOSSES_VALIDATE") != "1":
        assert_async(~bad.any(), told)
    elif bool(bad.any()):
        raise IndexError(f"{told}, got values from {int(index.min())} to {int(index.max())}")


def _once(pairs: PairList, columns: int) -> PairList:
    """The first of equal pairs is kept; static shapes, no host sync."""
    key, order = (pairs.rows * columns + pairs.columns).sort(stable=True)
    first = torch.ones_like(key, dtype=torch.bool)
    first[1:] = key[1:] != key[:-1]
    return pairs._replace(kept=torch.empty_like(first).scatter(0, order, first))
