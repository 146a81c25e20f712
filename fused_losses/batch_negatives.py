"""UNPG: pairs of different classes in the batch, as negatives that every row's softmax shares.

    c_ab = cos(x_a, x_b)         over the n pairs a < b of different labels
    kept: q1 - w (q3 - q1) <= c_ab <= q3 + w (q3 - q1), q1 and q3 the sorted c at [n / 4], [3 n / 4]
    lambda = log sum_kept exp(scale c_ab)
    loss_i = log(sum_j exp z_ij + exp lambda) - z_iy        z: any margin softmax's logits

The quartiles are exact, without the pairs in memory: a radix selection on the floats' bits, 16 bits
a sweep, counts the pairs tile by tile. Every sweep computes a pair from the same tile, to the same
bits. (Jung et al., Unified Negative Pair Generation toward Well-discriminative Feature Space for
Face Recognition, 2022.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, no_autocast, row_dtype, unit_rows
from fused_losses.base.validation import GRADIENTS, check_integers, check_rows, number
from fused_losses.class_rows import class_rows
from fused_losses.margins import CosFace, Margin, apply_margin
from fused_losses.primitives.op import PYTHON_BACKENDS, StreamedOp

TILE_SIDE = 512  # rows and columns of a tile of pairs
GPU_TILE_SIDE = 2048
LIVE_BYTES = 96  # a pair of a tile at the peak (tests/test_batch_negatives.py)
DIGIT = 16  # bits of a float that a sweep of the selection settles
BINS = 1 << DIGIT

INPUTS = "Tensor x, Tensor labels, Tensor valid, Tensor scale, float whisker"
FORWARD = f"({INPUTS}) -> (Tensor lse, Tensor low, Tensor high)"
BACKWARD = (
    "(Tensor grad, Tensor x, Tensor labels, Tensor valid, Tensor scale, Tensor lse, Tensor low, "
    "Tensor high, bool need_x, bool need_scale) -> (Tensor dx, Tensor dscale)"
)


class Pairs(NamedTuple):
    """A batch whose pairs of different labels are meant."""

    x: Tensor  # [N, D] in the accumulation dtype
    labels: Tensor  # [N] integers
    valid: Tensor  # [N] bool: the others are in no pair


def _check_whisker(whisker: float) -> None:
    if not whisker >= 0:
        raise ValueError(f"whisker: expected a value >= 0, got {whisker}")


def shared_negatives(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    scale: float | Tensor,
    whisker: float = 1.5,
    normalize: bool = True,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """lambda of the module docstring, [] in float64 (float32 where the device lacks it).

    Differentiable in embeddings and scale; the quartiles only choose and have no gradient.
    -inf without a pair. A NaN row makes it NaN; rows labelled `ignore_index` take no part.
    scale > 0, whisker >= 0 (w). normalize=False: products instead of cosines.
    Raises TypeError or ValueError for bad arguments; NotImplementedError for a second derivative,
    but on "reference". Time O(N^2 D) for each of 4 sweeps (6 in float64), one of them backward's;
    memory O(N D) plus a tile, on "reference" O(N^2).
    """
    check_rows("embeddings", embeddings, "fp32")
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    scale = number("scale", scale, embeddings)
    _check_whisker(whisker)
    name, _ = backends.choose(
        backend, embeddings.device, embeddings.dtype, "fp32", "pairs", embeddings.shape[1]
    )
    with no_autocast(embeddings.device):
        valid = labels != ignore_index
        # an ignored row must not reach the gradients, not even with NaN
        x = embeddings.to(accumulate_dtype(embeddings.dtype))
        x = torch.where(valid[:, None], x, 0)
        pairs = Pairs(unit_rows(x) if normalize else x, labels, valid)
        if name == "reference":
            return _reference(pairs, scale, whisker)
        return SHARED_NEGATIVES(name, *pairs, scale, float(whisker))[0]


def add_shared(lse: Tensor, shared: Tensor) -> Tensor:
    """log(exp lse_i + exp lambda): the shared negatives among each row's. [N], [] -> [N]

    Differentiable, also where neither has a term (-inf).
    """
    none = (lse == -torch.inf) & (shared == -torch.inf)
    some = torch.logaddexp(torch.where(none, 0, lse), shared)
    return torch.where(none, -torch.inf, some)


@dataclass(frozen=True)
class UNPG:
    """The shared negatives of a batch as an object that a head holds; see `shared_negatives`."""

    whisker: float = 1.5

    def __post_init__(self) -> None:
        _check_whisker(self.whisker)

    def __call__(
        self, embeddings: Tensor, labels: Tensor, scale: float | Tensor, **options: Any
    ) -> Tensor:
        return shared_negatives(embeddings, labels, scale=scale, whisker=self.whisker, **options)


def unpg_margin_softmax(
    embeddings: Tensor,  # [N, D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N]
    *,
    margin: Margin | None = CosFace(0.5),  # noqa: B008 (a frozen value)
    scale: float | Tensor = 64.0,
    negatives: UNPG = UNPG(),  # noqa: B008
    normalize: bool = True,
    ignore_index: int = -100,
    classes: Tensor | None = None,  # [K]
    precision: str = "fp32",
    gradient: str = "exact",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Margin softmax with the batch's pairs as negatives of every row (module docstring).

    Arguments, dtypes and errors are those of `margin_softmax`, scale a number or a scalar tensor.
    Time and memory: those of one sweep over the classes and of `shared_negatives`.
    """
    validation.check_choice("gradient", gradient, GRADIENTS)
    if not isinstance(negatives, UNPG):
        raise TypeError(f"negatives: expected a UNPG, got {type(negatives).__name__}")
    rows = class_rows(
        embeddings,
        weight,
        labels,
        normalize=normalize,
        ignore_index=ignore_index,
        classes=classes,
        precision=precision,
        reduction=reduction,
        backend=backend,
    )
    scale = number("scale", scale, embeddings)
    with no_autocast(embeddings.device):
        lse, target = rows.statistics(scale, margin)
        norm = rows.norm.to(target.dtype)
        moved = apply_margin(margin, target / scale, norm, gradient)
        shared = negatives(
            rows.x,
            rows.labels,
            scale,
            normalize=False,
            ignore_index=validation.NO_TARGET,
            backend=rows.backend,
        )
        penalty = margin.penalty(norm) if hasattr(margin, "penalty") else 0.0
        return rows.cross_entropy(scale * moved, add_shared(lse, shared), reduction, penalty)


def _reference(p: Pairs, scale: Tensor, whisker: float) -> Tensor:
    """The formula on the whole matrix, by sorting it."""
    cosine = p.x @ p.x.T
    different = (p.labels[:, None] != p.labels) & p.valid[:, None] & p.valid
    negatives = cosine[different.triu(1)]
    ordered = negatives.detach().sort().values
    if len(ordered):
        low, high = _whiskers(ordered[[len(ordered) // 4, 3 * len(ordered) // 4]], whisker)
        negatives = negatives[~((negatives < low) | (negatives > high))]
    return torch.logsumexp(scale * negatives, 0).to(row_dtype(p.x.device))


def _whiskers(quartiles: Tensor, whisker: float) -> tuple[Tensor, Tensor]:
    """The closed interval that is kept."""
    q1, q3 = quartiles
    reach = whisker * (q3 - q1)
    return q1 - reach, q3 + reach


# ---- tiles of pairs -----------------------------------------------------------------------------


def tile_side(device: torch.device) -> int:
    return GPU_TILE_SIDE if device.type == "cuda" else TILE_SIDE


class Tile(NamedTuple):
    rows: slice
    cols: slice
    cosine: Tensor  # [R, T]
    negative: Tensor  # [R, T] bool: a pair a < b of different labels


def _tiles(p: Pairs) -> Iterator[Tile]:
    """The upper triangle, cut alike in every sweep: a pair's bits depend on its tile alone."""
    n = p.x.shape[0]
    side = tile_side(p.x.device)
    for i in range(0, n, side):
        for j in range(i, n, side):
            rows, cols = slice(i, min(i + side, n)), slice(j, min(j + side, n))
            negative = p.labels[rows, None] != p.labels[cols]
            negative &= p.valid[rows, None] & p.valid[cols]
            if i == j:
                negative = negative.triu(1)
            yield Tile(rows, cols, p.x[rows] @ p.x[cols].T, negative)


def _keys(cosine: Tensor) -> Tensor:
    """Integers in the order of the floats: int32 of float32, int64 of float64."""
    kind = torch.int32 if cosine.dtype == torch.float32 else torch.int64
    return _mirrored(cosine.view(kind))


def _mirrored(bits: Tensor) -> Tensor:
    """Negative floats order backwards as integers; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def _histogram(p: Pairs, prefix: Tensor | None, shift: int) -> Tensor:
    """How many pairs have each value of the digit at `shift`, above it `prefix`. [P, BINS]"""
    parts = 1 if prefix is None else len(prefix)
    counts = torch.zeros(parts, BINS + 1, dtype=torch.int64, device=p.x.device)
    one = counts.new_ones(())
    for tile in _tiles(p):
        key = _keys(tile.cosine)
        digit = ((key >> shift) & (BINS - 1)).to(torch.int64)
        for i in range(parts):
            here = tile.negative
            if prefix is not None:
                here = here & ((key >> (shift + DIGIT)) == prefix[i])
            at = torch.where(here, digit, BINS).view(-1)
            counts[i].scatter_add_(0, at, one.expand_as(at))
    counts = counts[:, :BINS]
    # the topmost digit has the sign: negative values first
    return counts.roll(BINS // 2, 1) if prefix is None else counts


def _quartiles(p: Pairs) -> Tensor:
    """The pairs' c at [n / 4] and [3 n / 4] of their order, exact; any value without pairs. [2]"""
    bits = 8 * p.x.element_size()
    prefix, rank = None, None
    for shift in range(bits - DIGIT, -1, -DIGIT):
        below = _histogram(p, prefix, shift).cumsum(1)  # [P, BINS]
        if prefix is None:
            n = below[0, -1]
            rank = torch.stack([n // 4, 3 * n // 4])
            below = below.expand(2, -1).contiguous()
        digit = torch.searchsorted(below, rank[:, None], right=True).clamp_max(BINS - 1)
        before = below.gather(1, (digit - 1).clamp_min(0))[:, 0]
        digit = digit[:, 0]
        rank = rank - torch.where(digit > 0, before, 0)
        prefix = digit - BINS // 2 if prefix is None else (prefix << DIGIT) | digit
    kind = torch.int32 if bits == 32 else torch.int64
    return _mirrored(prefix.to(kind)).view(p.x.dtype)


def _kept(tile: Tile, low: Tensor, high: Tensor) -> Tensor:
    # written so that a NaN is kept
    return tile.negative & ~((tile.cosine < low) | (tile.cosine > high))


def _forward(p: Pairs, scale: Tensor, whisker: float) -> tuple[Tensor, Tensor, Tensor]:
    low, high = _whiskers(_quartiles(p), whisker)
    wide = row_dtype(p.x.device)
    lse = torch.full((), -torch.inf, dtype=wide, device=p.x.device)
    factor = scale.to(p.x.dtype)
    for tile in _tiles(p):
        z = (tile.cosine * factor).masked_fill(~_kept(tile, low, high), -torch.inf)
        lse = torch.logaddexp(lse, z.view(-1).logsumexp(0).to(wide))
    return lse, low.clone(), high.clone()


def _backward(
    grad: Tensor, p: Pairs, scale: Tensor, lse: Tensor, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor]:
    dx, dscale = torch.zeros_like(p.x), torch.zeros_like(scale)
    factor, safe = scale.to(p.x.dtype), torch.where(lse == -torch.inf, 0, lse).to(p.x.dtype)
    for tile in _tiles(p):
        share = (tile.cosine * factor - safe).exp_()
        share = torch.where(_kept(tile, low, high), share, 0)
        dx[tile.rows] += share @ p.x[tile.cols]
        dx[tile.cols] += share.T @ p.x[tile.rows]
        dscale += (share * tile.cosine).sum(dtype=scale.dtype)
    return dx * (grad * scale).to(dx.dtype), dscale * grad.to(scale.dtype)


# ---- the op: autograd and registration ----------------------------------------------------------


def _python(direction: str, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
    with torch.autocast(arguments[1].device.type, enabled=False):
        if not direction:
            *pairs, scale, whisker = arguments
            return _forward(Pairs(*pairs), scale, whisker)
        grad, x, labels, valid, *rest, need_x, need_scale = arguments
        dx, dscale = _backward(grad, Pairs(x, labels, valid), *rest)
        return dx if need_x else x.new_empty(0), dscale if need_scale else dscale.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.set_materialize_grads(False)


def _gradients(backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
    if grads[0] is None:
        return (None,) * 5
    dx, dscale = backward_op(grads[0], *ctx.saved_tensors, needed[0], needed[3])
    return dx if needed[0] else None, None, None, dscale if needed[3] else None, None


def _fake_forward(x: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=row_dtype(x.device)), x.new_empty(()), x.new_empty(())


def _fake_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    scale, need_x, need_scale = rest[2], *rest[-2:]
    return x.new_empty(x.shape if need_x else 0), scale.new_empty(() if need_scale else 0)


SHARED_NEGATIVES = StreamedOp(
    name="shared_negatives",
    forward=FORWARD,
    backward=BACKWARD,
    setup_context=_setup_context,
    gradients=_gradients,
    fake_forward=_fake_forward,
    fake_backward=_fake_backward,
    python=_python,
    # products of the library and comparisons: nothing here is compiled
    python_backends=(*PYTHON_BACKENDS, "cpu"),
)
SHARED_NEGATIVES.define()
