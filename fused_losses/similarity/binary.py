"""Binary codes: signs with a straight-through gradient, packed, and products by popcount."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.blocks import runs
from fused_losses.base.examples import EXACT, UNJUDGED, examples
from fused_losses.base.numerics import no_autocast
from fused_losses.base.validation import check_choice, check_count, check_range, describe

BITS = 64  # of a word
BLOCK_BYTES = 1 << 22  # of words that are alive at once, more where one row has more
FORMS = ("signs", "bits")
RANGES = {"signs": (-1.0, 1.0), "bits": (0.0, 1.0)}


class PackedCodes(NamedTuple):
    """Codes of `width` bits a row, in words of 64: bit b of word w is coordinate 64 w + b."""

    words: Tensor  # [N, ceil(width / 64)] int64; the bits beyond width are 0
    width: int


def binary_codes(
    x: Tensor,
    *,
    form: str = "signs",
    window: tuple[float, float] | None = None,
) -> Tensor:
    """1 where x > 0, else -1 ("signs") or 0 ("bits"), with a straight-through gradient.

    The gradient is that of x itself where window[0] < x < window[1], and 0 elsewhere.

    Args:
        x: floats of any shape. window: None: (-1, 1) for signs; (0, 1) for bits, ShiftAddViT's.

    Returns x's shape and dtype; NaN stays NaN. Differentiable to any order (the second derivative
    is 0) and in forward mode. Raises ValueError, TypeError for bad arguments. Time and memory O(x).
    Papers: Bengio et al., 2013; You et al., ShiftAddViT, 2023.
    """
    _check_floats("x", x)
    check_choice("form", form, FORMS)
    check_range("window", window)
    low, high = RANGES[form] if window is None else window
    with no_autocast(x.device):
        off = -1.0 if form == "signs" else 0.0
        code = torch.where(x > 0, 1.0, off).to(x.dtype)
        code = torch.where(x.isnan(), torch.nan, code)
        passed = torch.where((x > low) & (x < high), x, 0)
        return code + (passed - passed.detach())


def pack_codes(codes: Tensor) -> PackedCodes:
    """Which entries of a matrix are above 0, a bit each.

    codes: [N, D] floats, integers or bool, D >= 1; NaN is not above 0. No gradient flows through
    it. Raises ValueError, TypeError for bad arguments. Time O(N D); memory O(N D).
    """
    if not isinstance(codes, Tensor) or codes.is_complex():
        got = describe(codes) if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"codes: expected a real tensor [N, D], got {got}")
    if codes.dim() != 2 or codes.shape[1] == 0:
        raise ValueError(f"codes: expected [N, D] with D >= 1, got {describe(codes)}")
    width = codes.shape[1]
    count = -(-width // BITS)
    bits = torch.nn.functional.pad((codes.detach() > 0).long(), (0, count * BITS - width))
    places = torch.arange(BITS, device=codes.device)
    return PackedCodes((bits.unflatten(1, (count, BITS)) << places).sum(dim=2), width)


def hamming(x: PackedCodes, y: PackedCodes | None = None) -> Tensor:
    """How many bits differ, of each row of x and each of y. [N, M] int32; y None: x itself.

    By exclusive or and popcount, in integers. Raises ValueError, TypeError for codes that do not
    fit. Time O(N M D / 64); memory that of the result and a few blocks.
    """
    return _over_pairs(x, x if y is None else y, "signs")


def packed_product(x: PackedCodes, y: PackedCodes | None = None, *, form: str = "signs") -> Tensor:
    """<x_i, y_j> of codes +-1 ("signs") or 0 and 1 ("bits"). [N, M] int32; y None: x itself.

        signs: D - 2 popcount(x xor y)        bits: popcount(x and y)

    Exact. Errors and cost as in `hamming`.
    """
    check_choice("form", form, FORMS)
    found = _over_pairs(x, x if y is None else y, form)
    return x.width - 2 * found if form == "signs" else found


def hamming_topk(x: PackedCodes, y: PackedCodes | None, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of y with the fewest bits that differ, streamed: never an N x M matrix.

    Of equal ones the lowest index is first. y None: x itself, each row its own first. k in [1, M].
    Returns (distances [N, k] int32, indices [N, k] int64). Raises ValueError, TypeError for bad
    arguments. Time O(N M (D / 64 + log k)); memory O(N k) and a few blocks.
    """
    y = x if y is None else y
    n, m = _check_codes(x, y)
    check_count("k", k)
    if k > m:
        raise ValueError(f"k: expected at most the {m} rows of y, got {k}")
    width = max(k, 1 << 12)
    lists = []
    for rows in runs(n, max(1, BLOCK_BYTES // (8 * width))):
        best = x.words.new_empty((rows.stop - rows.start, 0))
        for columns in runs(m, width):
            apart = _differing(x.words[rows], y.words[columns], "signs").long()
            at = torch.arange(columns.start, columns.stop, device=apart.device)
            # a distance and an index are one integer, whose order is theirs
            keys = torch.cat([best, apart * m + at], dim=1)
            best = keys.topk(min(k, keys.shape[1]), dim=1, largest=False, sorted=True).values
        lists.append(best)
    best = torch.cat(lists) if lists else x.words.new_empty((0, k))
    return (best // m).int(), best % m


def _over_pairs(x: PackedCodes, y: PackedCodes, form: str) -> Tensor:
    n, m = _check_codes(x, y)
    out = torch.empty((n, m), dtype=torch.int32, device=x.words.device)
    for rows in runs(n, max(1, BLOCK_BYTES // (8 * max(m, 1)))):
        out[rows] = _differing(x.words[rows], y.words, form)
    return out


def _differing(x: Tensor, y: Tensor, form: str) -> Tensor:
    """popcount(x xor y), or of x and y ("bits"), word by word. [n, m] int32"""
    total = torch.zeros((len(x), len(y)), dtype=torch.int32, device=x.device)
    for a, b in zip(x.unbind(dim=1), y.unbind(dim=1), strict=True):
        total += _popcount(a[:, None] & b if form == "bits" else a[:, None] ^ b)
    return total


def _popcount(v: Tensor) -> Tensor:
    """Of int64 words: sums of neighbours of 1, 2 and 4 bits, then of the bytes by one product."""
    # what an arithmetic shift draws in from the sign is masked away
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    return (v * 0x0101010101010101) >> 56


def _check_codes(x: PackedCodes, y: PackedCodes) -> tuple[int, int]:
    for name, codes in (("x", x), ("y", y)):
        if not isinstance(codes, PackedCodes):
            raise TypeError(f"{name}: expected PackedCodes, got {type(codes).__name__}")
        check_count(f"{name}.width", codes.width)
        words = codes.words
        if not isinstance(words, Tensor) or words.dtype != torch.int64:
            got = describe(words) if isinstance(words, Tensor) else type(words).__name__
            raise TypeError(f"{name}.words: expected int64, got {got}")
        count = math.ceil(codes.width / BITS)
        if words.dim() != 2 or words.shape[1] != count:
            raise ValueError(f"{name}.words: expected [N, {count}], got {describe(words)}")
    if x.width != y.width:
        raise ValueError(f"y: expected codes of {x.width} bits as x has, got {y.width}")
    validation.check_device("x", x.words, "y", y.words)
    return len(x.words), len(y.words)


def _check_floats(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor) or x.dtype not in validation.FLOATS:
        got = describe(x) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a floating point tensor, got {got}")


# a slope that passes through is that of no difference
examples(binary_codes, lambda f, t: f(t.x), bound=UNJUDGED)
examples(pack_codes, lambda f, t: f(t.x), bound=EXACT)
examples(hamming, lambda f, t: f(pack_codes(t.x), pack_codes(t.y)), bound=EXACT)
examples(packed_product, lambda f, t: f(pack_codes(t.x), pack_codes(t.y)), bound=EXACT)
examples(hamming_topk, lambda f, t: f(pack_codes(t.x), pack_codes(t.y), 3), bound=EXACT)
