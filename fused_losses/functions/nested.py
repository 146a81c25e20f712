"""InfoNCE at several widths of the same rows (Matryoshka), from one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.integers import count_up
from fused_losses.base.numerics import accumulate_dtype, no_autocast, power_of_two, reduced
from fused_losses.base.products import product
from fused_losses.base.sides import both_of, sides
from fused_losses.base.validation import check_count, number
from fused_losses.functions.pair_sums import PairSums
from fused_losses.primitives.nested.inputs import NestedInputs
from fused_losses.primitives.nested.op import nested_statistics
from fused_losses.primitives.pairs.inputs import NEGATIVE
from fused_losses.primitives.pairs.op import PairStatistics

KEPT = 2.0**20  # entries of a unit are at most so large; their squares are far from overflow


def nested_info_nce(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    widths: Sequence[int],  # [W]
    *,
    temperature: float | Tensor = 0.07,
    labels: Tensor | None = None,  # [N]
    key_labels: Tensor | None = None,  # [M]
    offset: int = 0,
    symmetric: bool = False,
    ids: Tensor | None = None,  # [N]
    key_ids: Tensor | None = None,  # [M]
    groups: Tensor | None = None,  # [N]
    key_groups: Tensor | None = None,  # [M]
    exclude: Tensor | None = None,  # [N, E]
    decoupled: bool = False,
    normalize: bool = False,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """`info_nce` of the first w coordinates, for every w of widths, from one product of the widest.

        loss_w = info_nce(query[:, :w], key[:, :w], ...)

    A wider score is the narrower one and the product of the further columns. With normalize each
    width's rows are divided by their own norms, a norm's parts kept in units of its own row and
    width: prefixes of zeros and of any length are as they are alone (docs/nested.md).

    Args:
        query, key: [N, D] and [M, D], float32, bfloat16, float16 or float64; may be one tensor.
        widths: each once, in any order, from 1 to D.
        normalize: divide rows by their norms (in float32, not rounded to the inputs' dtype).
        others: as in `info_nce`, the same for all widths.

    Returns [W] in the widths' order, float32 (float64 for float64 inputs); with reduction="none"
    [W, N]. Raises ValueError, TypeError for bad arguments.
    Time O(N M (D + W)), where one call a width takes O(N M sum(widths)); memory O((N + M) (D + W)).
    Every backend but "reference" runs the same blocks of PyTorch; second derivatives and forward
    mode are those of the sweep. The same bits in every run on one number of threads.
    Paper: Kusupati et al., Matryoshka Representation Learning, 2022.
    """
    both = sides(
        query,
        key,
        precision,
        names=("query", "key"),
        prefixes=("", "key_"),
        labels=both_of(labels, key_labels),
        ids=(ids, ids if key_ids is None else key_ids),
        groups=(groups, groups if key_groups is None else key_groups),
        exclude=exclude,
        offset=offset,
    )
    query, (n, m) = both.x, (query.shape[0], key.shape[0])
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    ordered = sorted(checked_widths(widths, query.shape[1]))
    scale = 1 / number("temperature", temperature, query)
    if symmetric and reduction == "none" and labels is not None and n != m:
        raise ValueError(
            f"reduction: expected 'mean' or 'sum' for symmetric=True with labels and N={n} != "
            f"M={m}, got 'none'"
        )
    if symmetric and offset:
        raise ValueError(
            f"symmetric: expected False with offset={offset}: the columns' half would miss the "
            "other ranks' queries"
        )
    with no_autocast(query.device):
        parts = sweeps(query, key, ordered, scale, normalize, **both.numbers._asdict())
        rows, columns = swept(parts, symmetric, precision, backend)
        sums = [_sums(rows)] + ([] if columns is None else [_sums(columns)])
        if labels is None and ids is not None:
            # the sweep leaves equal ids out, so the diagonal is put back beside it
            own = torch.cat([_diagonal(part, offset) for part in parts])
            sums[0] = sums[0].with_positive(own)
            if columns is not None:
                own = torch.nn.functional.pad(own, (0, m - n), value=-torch.inf)
                sums[1] = sums[1].with_positive(own)
        dtype = accumulate_dtype(query.dtype)
        found = []
        for of_side in sums:
            loss, counted = of_side.loss(decoupled)
            if reduction == "none" and labels is None:
                loss, counted = loss[:, :n], counted[:, :n]
            each = zip(loss, counted, strict=True)
            found.append(torch.stack([reduced(a, b, reduction, dtype) for a, b in each]))
        out = found[0] if len(found) == 1 else (found[0] + found[1]) / 2
        return in_order(out, widths)


def in_order(found: Tensor, widths: Sequence[int]) -> Tensor:
    """What was found by increasing widths, [W, ...], in the order of the caller's."""
    ordered = sorted(widths)
    at = [ordered.index(w) for w in widths]
    return found if at == list(range(len(at))) else torch.stack([found[i] for i in at])


def sweeps_widths(x: Tensor, precision: str, backend: str | None) -> bool:
    """Whether who runs pairs of such rows has a sweep over widths of its own.

    Others have kernels for one width, and PyTorch's blocks for several would not beat them.
    """
    name, _ = backends.choose(backend, x.device, x.dtype, precision, "pairs", x.shape[-1])
    return name in ("reference", "bounded")


def checked_widths(widths: Sequence[int], d: int) -> list[int]:
    """Widths of rows of d coordinates, each once."""
    if isinstance(widths, Tensor) or not isinstance(widths, Sequence):
        raise TypeError(f"widths: expected a sequence of integers, got {type(widths).__name__}")
    for width in widths:
        check_count("widths", width)
    if not widths or len(set(widths)) != len(widths) or max(widths) > d:
        raise ValueError(
            f"widths: expected at least one, each once and at most D={d}, got {list(widths)}"
        )
    return list(widths)


def sweeps(
    x: Tensor, y: Tensor, widths: list[int], scale: Tensor, normalize: bool, **numbers: Any
) -> list[NestedInputs]:
    """What takes all widths, increasing: one sweep, and one of width 1 where rows are normalised.

    There a direction is 1 or -1, whose slope is 0: in the common sweep it would be a rounding.
    """
    found = []
    if normalize and widths[0] == 1:
        first = _signs(x)
        other = first if y is x else _signs(y)
        found.append(nested(first, other, [1], scale))
        widths = widths[1:]
    if widths:
        found.append(nested(x, y, widths, scale, normalize=normalize))
    return [inputs._replace(**numbers) for inputs in found]


def _signs(x: Tensor) -> Tensor:
    """The directions of first coordinates. [N, 1]"""
    first = _marked(x[:, :1])
    return first.sign() + 0 * first  # a NaN has a NaN slope


def swept(
    parts: list[NestedInputs], cols: bool, precision: str, backend: str | None
) -> tuple[PairStatistics, PairStatistics | None]:
    """The statistics of all widths, [W, 2, N] and with cols [W, 2, M]."""
    options: dict[str, Any] = dict(cols=cols, precision=precision, backend=backend)
    found = [nested_statistics(part, **options) for part in parts]
    if len(found) == 1:
        return found[0]
    rows = PairStatistics(*(torch.cat(t) for t in zip(*(r for r, _ in found), strict=True)))
    columns = [c for _, c in found if c is not None]
    if not columns:
        return rows, None
    return rows, PairStatistics(*(torch.cat(t) for t in zip(*columns, strict=True)))


def nested(
    x: Tensor, y: Tensor, widths: list[int], scale: Tensor, *, normalize: bool = False
) -> NestedInputs:
    """Rows x [N, D] and y [M, D] with their scores at increasing widths."""
    one, widest = y is x, widths[-1]
    x = _marked(x[:, :widest])
    y = x if one else _marked(y[:, :widest])
    if not normalize:
        return NestedInputs(x, y, scale, None, None, None, None, widths)
    of_x = prefix_units(x, widths)
    of_y = of_x if one else prefix_units(y, widths)
    return NestedInputs(
        of_x.rows, of_y.rows, scale, of_x.factor, of_y.factor, of_x.shrink, of_y.shrink, widths
    )


class PrefixUnits(NamedTuple):
    """Rows whose prefixes are known with their norms.

    A width's columns stand in a unit of the width's own, a power of two by the prefix's largest
    entry: nothing of it overflows or underflows, and no bit of the rows is lost.
    """

    rows: Tensor  # [N, D] in the accumulation dtype, each width's columns in its unit
    shrink: Tensor  # [W, N] the unit of the width before in this width's, without gradient
    factor: Tensor  # [W, N] 1 / the prefix's norm in its unit; 0 of zeros


def prefix_units(x: Tensor, widths: list[int]) -> PrefixUnits:
    """Time and memory O(N (D + W)); differentiable, with gradient 0 of prefixes of zeros."""
    wide = x.to(accumulate_dtype(x.dtype))
    parts = wide.split([b - a for a, b in zip([0, *widths], widths, strict=False)], dim=1)
    units = _units(parts)
    rows, factors, shrinks = [], [], []
    square = before = None
    for part, own in zip(parts, units, strict=True):
        moved = part * own
        shrink = torch.ones_like(own) if before is None else own / before
        here = moved.square().sum(dim=1, keepdim=True)
        square = here if square is None else shrink.square() * square + here
        # `not <=`: a NaN must stay NaN
        alive = ~(square <= 0)
        factors.append(torch.where(alive, torch.where(alive, square, 1).rsqrt(), 0))
        rows.append(moved)
        shrinks.append(shrink)
        before = own
    return PrefixUnits(
        torch.cat(rows, dim=1),
        torch.cat(shrinks, dim=1).T.contiguous(),
        torch.cat(factors, dim=1).T.contiguous(),
    )


def _units(parts: Sequence[Tensor]) -> list[Tensor]:
    """What brings each prefix near 1, a power of two, [N, 1] each; zeros have the next one's or 1.

    A unit stays until the prefix has grown by KEPT: then most shrinks are 1.
    """
    tops: list[Tensor] = []
    units: list[Tensor] = []
    for part in parts:
        top = torch.linalg.vector_norm(part.detach(), torch.inf, dim=1, keepdim=True)
        top = torch.maximum(tops[-1], top) if tops else top
        own = power_of_two(top)
        if units:
            stays = (tops[-1] > 0) & (top * units[-1] <= KEPT)
            own = torch.where(stays, units[-1], own)
        tops.append(top)
        units.append(own)
    # a power of two for rows of zeros would make inf of their tangents
    units[-1] = torch.where(tops[-1] == 0, 1, units[-1])
    for w in reversed(range(len(parts) - 1)):
        units[w] = torch.where(tops[w] == 0, units[w + 1], units[w])
    return units


def _marked(x: Tensor) -> Tensor:
    """NaN for inf: what sums make of inf would be each form's own."""
    return torch.where(x.detach().isinf(), torch.nan, x).contiguous()


def _sums(statistics: PairStatistics) -> PairSums:
    return PairSums(statistics.value.transpose(0, 1), None, statistics.count[:, NEGATIVE])


def _diagonal(inputs: NestedInputs, offset: int) -> Tensor:
    """z of query i and key offset + i at each width, -inf where it is excluded. [W, N]"""
    n, narrow = inputs.x.shape[0], accumulate_dtype(inputs.x.dtype)
    x, y = inputs.x.to(narrow), inputs.y[offset : offset + n].to(narrow)
    found, total = [], None
    for w, part in enumerate(inputs.parts()):
        here = product(x[:, None, part], y[:, None, part])[:, 0, 0]
        if total is not None:
            here = here + _of_pairs(total, inputs.x_shrink, inputs.y_shrink, w, offset)
        total = here
        here = _of_pairs(total, inputs.x_factor, inputs.y_factor, w, offset)
        found.append(here.double() * inputs.scale)
    z = torch.stack(found)
    if inputs.exclude is None:
        return z
    out = (inputs.exclude == count_up(n, x, offset)[:, None]).any(dim=1)
    return torch.where(out, -torch.inf, z)


def _of_pairs(
    t: Tensor, of_rows: Tensor | None, of_columns: Tensor | None, w: int, offset: int
) -> Tensor:
    if of_rows is None or of_columns is None:
        return t
    return t * of_rows[w] * of_columns[w, offset : offset + t.shape[0]]


_both = lambda t: dict(labels=t.labels, key_labels=t.y_labels)
_with_ids = lambda t: dict(ids=t.ids, key_ids=t.y_ids)


def halves(t: Tensor) -> list[int]:
    """Of rows of any width: a half and all, the wider first."""
    d = t.shape[1]
    return [d] if d == 1 else [d, (d + 1) // 2]


examples(
    nested_info_nce,
    lambda f, t: f(t.x, t.y, halves(t.x), temperature=0.2),
    {
        "": {},
        "normalized": dict(normalize=True, symmetric=True),
        "gathered": lambda t: dict(offset=len(t.y) - len(t.x)),
        "labels, symmetric": lambda t: dict(symmetric=True, **_both(t)),
        "ids": lambda t: dict(symmetric=True, **_with_ids(t)),
        "labels, ids": lambda t: _both(t) | _with_ids(t),
        "exclude": lambda t: dict(exclude=t.exclude),
        "groups": lambda t: dict(groups=t.ids, key_groups=t.y_ids, **_both(t)),
        "decoupled": dict(symmetric=True, decoupled=True),
        "rows": dict(reduction="none"),
    },
)
examples(
    nested_info_nce,
    lambda f, t: f(t.x, t.y, halves(t.x), temperature=t.temperature),
    {"learned temperature": dict(symmetric=True, normalize=True)},
)
