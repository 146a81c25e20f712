"""MUVERA: a set of vectors as one long vector, whose products tell of Chamfer similarity."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import EXACT, UNJUDGED, examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    nan_where_infinite,
    no_autocast,
    row_dtype,
)
from fused_losses.base.products import product
from fused_losses.base.validation import check_choice, check_count, check_plain, describe
from fused_losses.functions.segments import counted, summed

MOST_BITS = 16  # 65,536 partitions a repetition


class CountSketch(NamedTuple):
    """A projection that adds each coordinate, with its sign, to one of `width` places.

    index: integers in [0, width), sign: floats, of one shape: [R, D] for `projection`, a
    repetition's line each; [R 2^k d] for `final_projection`.
    """

    index: Tensor
    sign: Tensor
    width: int

    @classmethod
    def drawn(cls, shape: tuple[int, ...], width: int, *, seed: int = 0) -> CountSketch:
        """Places and signs +-1 from a seed, the same on every machine with this PyTorch."""
        check_count("width", width)
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(width, shape, generator=generator)
        sign = torch.randint(2, shape, generator=generator) * 2.0 - 1
        return cls(index, sign, width)


def muvera_planes(
    repetitions: int, width: int, bits: int, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Gaussian planes [repetitions, width, bits] for `muvera_encode`, on the CPU, from a seed.

    bits in [0, 16]. The authors' C++ has other streams of random numbers: to have their codes,
    give their matrices. Raises ValueError, TypeError for bad arguments.
    """
    for name, value in (("repetitions", repetitions), ("width", width)):
        check_count(name, value)
    if isinstance(bits, bool) or not isinstance(bits, int):
        raise TypeError(f"bits: expected an integer, got {bits!r}")
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"bits: expected a value in [0, {MOST_BITS}], got {bits}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(repetitions, width, bits, generator=generator, dtype=torch.float64)
    return drawn.to(dtype)


def muvera_encode(
    points: Tensor,  # [..., L, D]
    planes: Tensor,  # [R, D, k]
    *,
    side: str,
    projection: Tensor | CountSketch | None = None,  # [R, D, d]
    final_projection: Tensor | CountSketch | None = None,  # [R 2^k d, F]
    mask: Tensor | None = None,  # [..., L] bool
    lengths: Tensor | None = None,  # [...] integers
    fill_empty: bool = False,
) -> Tensor:
    """A set of vectors as one vector: <query's, document's> is about their Chamfer similarity.

        F = concat_r concat_p  sum (a query) or mean (a document) of P_r x over {x: part_r(x) = p}

    part_r(x) is the place of the signs <x, g> > 0 of repetition r's k planes in the Gray code, so
    that neighbouring partitions differ in one sign. The product over R estimates
    sum over q of max over x of <q, x>, which is `maxsim`, R times over.

    Args:
        points: [..., L, D]. planes: [R, D, k], 0 <= k <= 16, see `muvera_planes`; they have no
            gradient.
        side: "query", sums, or "document", means.
        projection: P_r, to d coordinates each: [R, D, d] or a `CountSketch`; None: as they are.
        final_projection: of the whole: [R 2^k d, F] or a `CountSketch`.
        mask: [..., L] bool, False: no point. Or lengths: [...] integers, how many are points.
        fill_empty: documents only: a partition without a point has the point with the fewest other
            signs, the first of equals. A document without points stays 0.

    The partition is that of products in float64. Returns [..., R 2^k d] or [..., F] in float32
    (float64 for float64 points), NaN where a point has NaN or inf; differentiable in points and in
    projections that are matrices, the choice of a partition is not.
    Raises ValueError, TypeError, IndexError for bad arguments. Time O(R L D (k + d)) a set, and
    2^k k R to fill; memory O(L (D + d)) beyond what is returned, nothing L x 2^k.
    Paper: Dhulipala et al., MUVERA, 2024.
    """
    _check(points, planes, side, mask, lengths, fill_empty)
    lead, (length, width) = points.shape[:-2], points.shape[-2:]
    repetitions, parts = planes.shape[0], 1 << planes.shape[2]
    of_points = _checked_projection(
        "projection", projection, (repetitions, width), points, "[R, D, d]"
    )
    d = width if projection is None else _width(of_points)
    sets = math.prod(lead)
    final = _checked_projection(
        "final_projection", final_projection, (repetitions * parts * d,), points, "[R 2^k d, F]"
    )
    with no_autocast(points.device):
        dtype = row_dtype(points.device)
        x = points.reshape(sets, length, width)
        real = _real(mask, lengths, length, points)
        x = x if real is None else torch.where(real.reshape(sets, length, 1), x, 0)
        real = None if real is None else real.reshape(sets, length)
        faults = nan_where_infinite(x).to(dtype).sum(dim=1)
        x = x.to(dtype)
        blocks = [
            _of_repetition(
                x,
                planes[r].detach().to(dtype),
                None if of_points is None else _line(of_points, r),
                real,
                side,
                fill_empty,
            )
            for r in range(repetitions)
        ]
        out = torch.stack(blocks, dim=1).reshape(sets, -1)
        out = out if final is None else _projected(out, final)
        # a point with NaN has no side of a plane
        out = out + faults[:, None]
        return out.reshape(*lead, out.shape[1]).to(accumulate_dtype(points.dtype))


def _of_repetition(
    x: Tensor,  # [B, L, D], 0 where there is no point
    planes: Tensor,  # [D, k]
    projection: Tensor | CountSketch | None,
    real: Tensor | None,
    side: str,
    fill_empty: bool,
) -> Tensor:
    """The partitions' sums or means, in the order of the Gray code. [B, 2^k, d]"""
    sets, length, _ = x.shape
    k = planes.shape[1]
    parts = 1 << k
    with torch.no_grad():
        signs = (x @ planes > 0).long()
        powers = 1 << torch.arange(k - 1, -1, -1, device=x.device)
        code = (signs * powers).sum(dim=2)  # [B, L], the first plane highest
        first = torch.arange(sets, device=x.device)[:, None] * parts
        place = (first + code).flatten()
    rows = x if projection is None else _projected(x, projection)
    d = rows.shape[2]
    sums = summed(rows.reshape(sets * length, d), place, sets * parts)
    sums = sums.unflatten(0, (sets, parts))
    if side == "document":
        # a place more, for what is no point
        owner = place if real is None else torch.where(real.flatten(), place, sets * parts)
        counts = counted(owner, sets * parts + 1)[:-1].unflatten(0, (sets, parts))
        sums = sums / counts.clamp_min(1)[:, :, None]
        if fill_empty and length:
            nearest, some = _nearest(place, real, (sets, length, k))
            filled = rows.gather(1, nearest[:, :, None].expand(-1, -1, d))
            empty = (counts == 0) & some
            sums = torch.where(empty[:, :, None], filled, sums)
    order = torch.arange(parts, device=x.device)
    return sums[:, order ^ (order >> 1)]


@torch.no_grad()
def _nearest(
    place: Tensor, real: Tensor | None, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor]:
    """Of each code the first point with the fewest other signs, [B, 2^k]; whether there is one.

    A number of signs and a position are one integer, which a sweep over each sign makes smallest.
    """
    sets, length, k = shape
    parts, none = 1 << k, (k + 1) * length
    at = torch.arange(length, device=place.device).expand(sets, length)
    at = at if real is None else torch.where(real, at, none)
    key = torch.full((sets * parts,), none, dtype=torch.int64, device=place.device)
    key = key.scatter_reduce(0, place, at.flatten(), "amin").unflatten(0, (sets, parts))
    codes = torch.arange(parts, device=place.device)
    for sign in range(k):
        key = torch.minimum(key, key[:, codes ^ (1 << sign)] + length)
    return key % length, key < none


def _real(
    mask: Tensor | None, lengths: Tensor | None, length: int, points: Tensor
) -> Tensor | None:
    if lengths is not None:
        at = torch.arange(length, device=points.device)
        return at < lengths.to(points.device)[..., None]
    return mask


def _line(projection: Tensor | CountSketch, r: int) -> Tensor | CountSketch:
    if isinstance(projection, CountSketch):
        return CountSketch(projection.index[r], projection.sign[r], projection.width)
    return projection[r]


def _width(projection: Tensor | CountSketch | None) -> int:
    assert projection is not None
    return projection.width if isinstance(projection, CountSketch) else projection.shape[-1]


def _projected(x: Tensor, projection: Tensor | CountSketch) -> Tensor:
    """[..., D] -> [..., d] in x's dtype."""
    if isinstance(projection, CountSketch):
        signed = (x * projection.sign.to(x)).flatten(0, -2)
        out = summed(signed.mT, projection.index, projection.width).mT
        return out.reshape(*x.shape[:-1], projection.width)
    return product(x, projection.to(x.dtype).mT)


def _check(
    points: Tensor,
    planes: Tensor,
    side: str,
    mask: Tensor | None,
    lengths: Tensor | None,
    fill_empty: bool,
) -> None:
    given = (("points", points, "[..., L, D]"), ("planes", planes, "[R, D, k]"))
    for name, tensor, shape in given:
        if not isinstance(tensor, Tensor) or tensor.dtype not in validation.FLOATS:
            got = describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name}: expected a floating point tensor {shape}, got {got}")
    check_plain(planes=planes)
    if points.dim() < 2:
        raise ValueError(f"points: expected [..., L, D], got {describe(points)}")
    if planes.dim() != 3 or planes.shape[1] != points.shape[-1] or planes.shape[0] < 1:
        raise ValueError(
            f"planes: expected [R, {points.shape[-1]}, k] to match points, R >= 1, got "
            f"{describe(planes)}"
        )
    if planes.shape[2] > MOST_BITS:
        raise ValueError(
            f"planes: expected at most {MOST_BITS} a repetition, got {describe(planes)}"
        )
    validation.check_device("points", points, "planes", planes)
    check_choice("side", side, ("query", "document"))
    if fill_empty and side == "query":
        raise ValueError("fill_empty: expected False for side='query', got True")
    if mask is not None and lengths is not None:
        raise ValueError("lengths: expected mask or lengths, got both")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"mask: expected a bool tensor {tuple(points.shape[:-1])}, got {got}")
        if mask.shape != points.shape[:-1]:
            raise ValueError(f"mask: expected {tuple(points.shape[:-1])}, got {describe(mask)}")
        validation.check_device("points", points, "mask", mask)
    if lengths is not None:
        validation.check_integers("lengths", lengths, tuple(points.shape[:-2]), points)
        unread = torch.compiler.is_compiling() or lengths.is_meta or not lengths.numel()
        if not unread and not lengths.is_cuda:
            low, high = int(lengths.min()), int(lengths.max())
            if low < 0 or high > points.shape[-2]:
                raise ValueError(
                    f"lengths: expected values in [0, {points.shape[-2]}], got values from {low} "
                    f"to {high}"
                )


def _checked_projection(
    name: str,
    given: Tensor | CountSketch | None,
    shape: tuple[int, ...],
    points: Tensor,
    told: str,
) -> Tensor | CountSketch | None:
    """shape: of the coordinates that are projected."""
    if given is None:
        return None
    if isinstance(given, CountSketch):
        check_plain(**{f"{name}.sign": given.sign})
        check_count(f"{name}.width", given.width)
        validation.check_integers(f"{name}.index", given.index, shape, points)
        validation.check_class_ids(f"{name}.index", given.index, given.width)
        if given.sign.shape != shape or not given.sign.is_floating_point():
            raise ValueError(f"{name}.sign: expected floats {shape}, got {describe(given.sign)}")
        validation.check_device("points", points, f"{name}.sign", given.sign)
        return given
    if not isinstance(given, Tensor) or given.dtype not in validation.FLOATS:
        got = describe(given) if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(
            f"{name}: expected a floating point tensor {told} or a CountSketch, got {got}"
        )
    if given.dim() != len(shape) + 1 or tuple(given.shape[:-1]) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name}: expected [{wanted}, any] as {told}, got {describe(given)}")
    validation.check_device("points", points, name, given)
    return given


examples(
    muvera_encode,
    lambda f, t: f(t.x[None], muvera_planes(3, t.x.shape[1], 2).to(t.x.device)),
    {
        "query": dict(side="query"),
        "document": dict(side="document", fill_empty=True),
    },
    bound=UNJUDGED,
)
examples(muvera_planes, lambda f, t: f(3, t.x.shape[1], 2), bound=EXACT)
