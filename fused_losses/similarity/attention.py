"""Similarity without its matrix: logsumexp over pairs, and attention by any similarity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, exact_center, merged, no_autocast
from fused_losses.base.sides import NEITHER, sides
from fused_losses.base.validation import check_integers, number
from fused_losses.functions.scored_pairs import SCORED_BY, scored, triangle
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, Rule
from fused_losses.primitives.pairs.op import PairStatistics, pair_attention, pair_statistics
from fused_losses.similarity.attention_options import AttentionOptions, LogsumexpOptions

SIMILARITIES = (*SCORED_BY, "power")
MATCHES = ("any", "same", "different", "both")
ZEROS = ("same", "different")


@overload
def logsumexp_similarity(
    x: Tensor,
    y: Tensor | None = None,
    *,
    rows: Literal[True] = True,
    cols: Literal[False] = False,
    **options: Unpack[LogsumexpOptions],
) -> Tensor: ...
@overload
def logsumexp_similarity(
    x: Tensor,
    y: Tensor | None = None,
    *,
    rows: Literal[False],
    cols: Literal[True],
    **options: Unpack[LogsumexpOptions],
) -> Tensor: ...
@overload
def logsumexp_similarity(
    x: Tensor,
    y: Tensor | None = None,
    *,
    rows: Literal[True] = True,
    cols: Literal[True],
    **options: Unpack[LogsumexpOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def logsumexp_similarity(
    x: Tensor,
    y: Tensor | None = None,
    *,
    rows: bool = True,
    cols: bool = False,
    **options: Unpack[LogsumexpOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def logsumexp_similarity(
    x: Tensor,  # [N, D]
    y: Tensor | None = None,  # [M, D]
    *,
    similarity: str = "dot",
    scale: float | Tensor = 1.0,
    x_labels: Tensor | None = None,  # [N]
    y_labels: Tensor | None = None,  # [M]
    match: str = "any",
    x_ids: Tensor | None = None,  # [N]
    y_ids: Tensor | None = None,  # [M]
    x_groups: Tensor | None = None,  # [N]
    y_groups: Tensor | None = None,  # [M]
    exclude: Tensor | None = None,  # [N, E]
    skip_self: bool = False,
    zero: str | None = None,
    rows: bool = True,
    cols: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """log sum_j exp(scale sim(x_i, y_j)) of each row, and of each column from the same sweep.

    Args:
        x, y: [N, D] and [M, D]; y None: x itself, whose labels, ids and groups then serve both
            sides (with skip_self and without `exclude` at half the work).
        similarity: "dot" <x, y>, "cosine", "rbf" -|x - y|^2, "euclidean" -|x - y|, "power"
            -log |x - y|: sums of 1 / |x - y|^scale, in pure PyTorch on every device. A row that
            equals a column has +inf, without a gradient.
        scale: > 0; a number or a scalar tensor, which may need a gradient.
        x_labels, y_labels: integers, for `match` and `zero`.
        match: the pairs that take part: "any", "same" label, "different" label, or "both": two
            sums, of the same and of different labels.
        x_ids, y_ids: pairs with equal ids are left out. x_groups, y_groups: with different groups.
        exclude: [N, E] columns left out of each row, -1 for none. skip_self: leaves out i == j.
        zero: "same" or "different": such pairs stay, with the score 0 (factor 0, not -inf).
        rows, cols: what is returned; both: a tuple.

    Returns [N] and/or [M] ("both": [2, .], same first) in float32, or float64 for float64 inputs;
    -inf, with gradient 0, where no pair takes part. Twice differentiable (the second time on the
    pure-PyTorch path). Raises ValueError, TypeError for bad arguments.
    Time O(N M D); memory O((N + M) D).
    """
    both = sides(
        x,
        y,
        precision,
        alone=y is None or y is x,  # one tensor twice is one batch
        names=("x", "y"),
        prefixes=("x_", "y_"),
        labels=(x_labels, y_labels),
        ids=(x_ids, y_ids),
        groups=(x_groups, y_groups),
        exclude=exclude,
    )
    x = both.x
    validation.check_choice("similarity", similarity, SIMILARITIES)
    validation.check_choice("match", match, MATCHES)
    if zero is not None:
        validation.check_choice("zero", zero, ZEROS)
        if similarity == "power":
            raise ValueError("zero: expected None with similarity='power', whose scores may be inf")
    factor = number("scale", scale, x)
    if x_labels is None and (match != "any" or zero is not None):
        raise ValueError(f"x_labels: expected labels for match={match!r}, zero={zero!r}, got None")
    if not (rows or cols):
        raise ValueError("rows, cols: expected at least one of them True, got neither")

    with no_autocast(x.device):
        labelled = match != "any" or zero is not None
        known = both.numbers
        own = all(a is b for a, b in zip(known[:6:2], known[1:6:2], strict=True))
        if not labelled:
            known = known._replace(x_labels=None, y_labels=None)
        inputs = scored(x, both.other, factor, similarity=similarity, precision=precision)
        inputs = inputs._replace(
            skip_self=skip_self,
            positive=Rule(0.0) if zero == "same" else Rule(),
            negative=Rule(0.0) if zero == "different" else Rule(),
            **known._asdict(),
        )
        # half the pairs tell all only where both ends see each other by the same integers
        half = both.alone and own and skip_self and exclude is None
        if half:
            inputs = triangle(inputs)
        seen, other = pair_statistics(inputs, cols=cols and not half, backend=backend)
        other = seen if half else other
        dtype = accumulate_dtype(x.dtype)

        def told(side: PairStatistics | None) -> Tensor:
            assert side is not None  # it is told where it was asked for
            if match == "both":
                return side.value.to(dtype)
            if match == "any" and labelled:
                return merged(*side.value).to(dtype)
            return side.value[POSITIVE if match == "same" else NEGATIVE].to(dtype)

        if rows and cols:
            return told(seen), told(other)
        return told(seen) if rows else told(other)


@overload
def similarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def similarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...
@overload
def similarity_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    return_lse: bool = False,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, Tensor]: ...
def similarity_attention(
    query: Tensor,  # [..., N, D]
    key: Tensor,  # [..., M, D]
    value: Tensor,  # [..., M, Dv]
    *,
    similarity: str = "dot",
    scale: float | Tensor | None = None,
    query_labels: Tensor | None = None,  # [..., N]
    key_labels: Tensor | None = None,  # [..., M]
    match: str = "any",
    return_lse: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """sum_j softmax_j(scale sim(q_i, k_j)) v_j, by any of the similarities, under label masks.

    Args:
        query, key, value: [..., N, D], [..., M, D], [..., M, Dv] of one dtype; leading dimensions
            alike, swept one by one.
        similarity: "dot", "cosine", "rbf" -|q - k|^2, "euclidean" -|q - k|, "power" -log |q - k|:
            weights 1 / |q - k|^scale, the singular kernel of interpolating smoothers, in pure
            PyTorch on every device. Keys at distance 0 (its square, in float32 at least) take all
            the weight, shared equally; then the values alone have a gradient, and the lse is +inf.
        scale: > 0; a number or a scalar tensor, which may need a gradient. None: 1 / sqrt(D) for
            "dot", else 1.
        query_labels, key_labels: integers; match: "any", "same", "different".
        return_lse: also return the logsumexp of the scores, [..., N], differentiable too.

    Returns [..., N, Dv] in value's dtype (a row without pairs: 0; its lse -inf). Twice
    differentiable. Raises ValueError, TypeError for bad arguments.
    Time O(N M (D + Dv)); memory O((N + M)(D + Dv)).
    """
    check_leading(("query", query), ("key", key), ("value", value))
    query, value = validation.in_one_dtype(key, query, value)
    validation.check_choice("similarity", similarity, SIMILARITIES)
    validation.check_choice("match", match, MATCHES[:3])
    lead = query.shape[:-2]
    if match != "any" and query_labels is None:
        raise ValueError(f"query_labels: expected labels for match={match!r}, got None")
    if (query_labels is None) != (key_labels is None):
        raise ValueError("query_labels, key_labels: expected both or neither")
    if query_labels is not None:
        check_integers("query_labels", query_labels, (*lead, query.shape[-2]), query)
        check_integers("key_labels", key_labels, (*lead, key.shape[-2]), query)
    if scale is None:
        scale = 1 / math.sqrt(max(query.shape[-1], 1)) if similarity == "dot" else 1.0
    factor = number("scale", scale, query)

    def attend(q: Tensor, k: Tensor, v: Tensor, *labels: Tensor) -> tuple[Tensor, Tensor]:
        both = sides(
            q,
            k,
            precision,
            names=("query", "key"),
            prefixes=("query_", "key_"),
            labels=(labels[0], labels[1]) if labels and match != "any" else NEITHER,
        )
        check_values("value", v, "key", k)
        inputs = scored(both.x, k, factor, similarity=similarity, precision=precision)
        inputs = inputs.known(both.numbers)
        # nearly equal values differ in their last digits: these are what a gradient is made of.
        # 16 bits have none that sums of float32 lose, and stay where they lie
        whole = v.dtype.itemsize == 2 and v.device.type == "cpu" and precision == "fp32"
        center = None if whole else exact_center(v)
        moved = v if center is None else v - center
        out, lse = pair_attention(
            moved.contiguous(), inputs, positives=match == "same", backend=backend
        )
        some = (lse != -torch.inf)[:, None]
        out = torch.where(some, out, 0)  # also where weights of 0 have met a NaN among the values
        if center is not None:
            out = torch.addcmul(out, some.to(out.dtype), center.to(out.dtype))
        return out.to(v.dtype), lse.to(accumulate_dtype(both.x.dtype))

    tensors: tuple[Tensor, ...] = (query, key, value)
    if query_labels is not None and key_labels is not None:
        tensors = (*tensors, query_labels, key_labels)
    with no_autocast(query.device):
        out, lse = one_by_one(attend, lead, tensors, value)
    return (out, lse) if return_lse else out


def check_leading(*named: tuple[str, Tensor]) -> None:
    first, query = named[0]
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: expected a tensor [..., rows, D], got {type(tensor).__name__}"
            )
        if tensor.dim() < 2 or tensor.shape[:-2] != query.shape[:-2]:
            raise ValueError(
                f"{name}: expected [..., rows, D] with the leading dimensions of {first} "
                f"{tuple(query.shape)}, got {validation.describe(tensor)}"
            )


def check_values(name: str, value: Tensor, key_name: str, key: Tensor) -> None:
    if value.shape[0] != key.shape[0]:
        raise ValueError(
            f"{name}: expected {key.shape[0]} rows to match {key_name}, got "
            f"{validation.describe(value)}"
        )
    validation.check_device(key_name, key, name, value)
    validation.check_same_dtype(key_name, key, name, value)


def one_by_one(
    f: Callable[..., tuple[Tensor, Tensor]],
    lead: tuple[int, ...],
    tensors: tuple[Tensor, ...],
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """f of each item of the leading dimensions, stacked; rows as tensors[0], columns as value."""
    if not lead:
        return f(*tensors)
    flat = [t.flatten(0, len(lead) - 1) for t in tensors]
    if flat[0].shape[0] == 0:
        # nothing, that is still a function of all
        zero = sum(t.sum().to(value.dtype) for t in tensors if t.is_floating_point())
        out = value.new_zeros(*tensors[0].shape[:-1], value.shape[-1]) + zero
        return out, out.new_zeros(out.shape[:-1], dtype=accumulate_dtype(value.dtype))
    found = [f(*items) for items in zip(*flat, strict=True)]
    out, lse = (torch.stack(parts) for parts in zip(*found, strict=True))
    return out.reshape(*lead, *out.shape[1:]), lse.reshape(*lead, *lse.shape[1:])


_groups = lambda t: dict(x_labels=t.labels, y_labels=t.y_labels)
_ids = lambda t: dict(x_ids=t.labels, y_ids=t.y_labels + 1)
_labels = lambda t: dict(query_labels=t.labels, key_labels=t.y_labels)
examples(
    logsumexp_similarity,
    lambda f, t: f(t.x, t.y, scale=t.scale, cols=True),
    {
        "": {},
        "cosine": dict(similarity="cosine"),
        "rbf": dict(similarity="rbf", rows=False),
        "both": lambda t: dict(similarity="cosine", match="both", **_groups(t), **_ids(t)),
        "zero": lambda t: dict(zero="same", **_groups(t)),
    },
)
examples(
    logsumexp_similarity,
    lambda f, t: f(t.x, similarity="euclidean", scale=t.scale),
    {
        "euclidean": dict(skip_self=True),
        "own group": lambda t: dict(x_groups=t.labels, skip_self=True),
    },
)
examples(
    similarity_attention,
    lambda f, t: f(t.x, t.y, t.v),
    {
        "": {},
        "cosine, same": lambda t: dict(
            similarity="cosine", scale=t.scale, match="same", **_labels(t)
        ),
        "rbf, different": lambda t: dict(similarity="rbf", match="different", **_labels(t)),
    },
)
examples(
    similarity_attention,
    lambda f, t: f(t.x, t.y, t.v, similarity="euclidean", scale=t.scale),
    {"euclidean": {}},
)
examples(
    similarity_attention,
    lambda f, t: f(t.x[None], t.y[None], t.v[None]),
    {"items": lambda t: dict(similarity="euclidean", scale=t.scale, return_lse=True)},
)
