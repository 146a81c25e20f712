"""Numbers, a row at a time, O(N D): dtypes, norms, sums in log space, means."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, overload

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fused_losses.base.compiled import dense_rows, helpers

WIDE = (torch.float32, torch.float64)  # what the extension's helpers take
# numbers of a vector, entries of a matrix, up to which one pass takes less than PyTorch's own
SHORT, SMALL = 1 << 14, 1 << 16
RUN = 1 << 13  # rows that are widened at once
ZERO_NORM = 1e-12
# below it exp(r) - 1 - r and y - log(1 + y) are series, which are exact to 4e-17 of their value
NEAR_ZERO = 0.1
# unit roundoffs: half a unit in the last place of 1
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_dtype(device: torch.device) -> torch.dtype:
    """What the statistics of a row come in: float64 where the device has it."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


def power_of_two(x: Tensor) -> Tensor:
    """A power of two a row that brings its largest entry near 1: x times it is exact. [..., 1]

    Squares then neither overflow nor underflow, and a row of normal lengths keeps its bits.
    """
    if x.shape[-1] == 0:
        return x.new_ones((*x.shape[:-1], 1))
    most = {torch.float64: 2.0**1020, torch.float16: 2.0**14}.get(x.dtype, 2.0**124)
    top = torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1, keepdim=True)
    top = top.clamp(1 / most, most)
    return torch.frexp(top).mantissa / top


def common_factor(x: Tensor, y: Tensor, low: int = -20, high: int = 50) -> Tensor:
    """A power of two, one for both, that brings their largest entry into [2^low, 2^high]. []

    D squares of differences then neither overflow nor underflow, and no number changes but its
    exponent. Entries of NaN or inf are passed over with their rows. float16 stays as it is: its
    squares are numbers of float32.
    """
    dtype = accumulate_dtype(x.dtype)
    if x.dtype == torch.float16 or not x.numel() or not y.numel():
        return torch.ones((), dtype=dtype, device=x.device)
    tops = (torch.linalg.vector_norm(t.detach(), torch.inf, dim=-1) for t in (x, y))
    top = torch.stack([torch.where(t.isfinite(), t, 0).amax() for t in tops]).amax().to(dtype)
    exponent = torch.frexp(top).exponent
    shift = exponent.clamp(low, high) - exponent
    return torch.ldexp(torch.ones_like(top), shift.clamp(-125, 125))


def multiplied(factor: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both times a power of two, exact; y may be x and then is."""
    scaled = x * factor.to(x.dtype)
    return scaled, scaled if y is x else y * factor.to(y.dtype)


def unit_rows(x: Tensor) -> Tensor:
    """x / |x| a row, of any length; a row of zeros stays zero and gets gradient zero. [N, D]"""
    x = x * power_of_two(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    # `not <=` and not `>`: a NaN norm must stay NaN
    alive = ~(norm <= 0)
    return torch.where(alive, x / torch.where(alive, norm, 1), 0)


def root(v: Tensor) -> Tensor:
    """The square root, 0 (with gradient 0) where v <= 0; a NaN stays one."""
    compiled = helpers(v)
    if compiled is not None and v.dtype in WIDE and v.numel() <= SHORT:
        return compiled.root(v)
    positive = ~(v <= 0)
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)


def about_own_mean(x: Tensor) -> Tensor:
    """Rows less their own means, in the accumulation dtype; rounded once, however far they lie."""
    wide = x.to(row_dtype(x.device))
    moved = wide - wide.mean(dim=-1, keepdim=True)
    return moved.to(accumulate_dtype(x.dtype))


def exact_center(*sides: Tensor) -> Tensor | None:
    """A row [D] by which all rows can be moved towards 0 without a rounding; None: there is none.

    A coordinate has one where all its values have one sign: their mean, but at most twice the
    smallest |value|, cut to a multiple of the largest one's unit in the last place. Then v - c is a
    multiple of v's unit and no larger than v: it has a number of its own (Sterbenz). The mean is
    that of the last side's rows.
    """
    sides = tuple(t.detach() for t in sides if t.shape[0])
    if not sides or not sides[0].shape[1]:
        return None
    compiled = helpers(*sides)
    if compiled is not None and dense_rows(*sides) and sum(t.numel() for t in sides) <= SMALL:
        return compiled.exact_center(list(sides))
    dtype, wide = sides[0].dtype, accumulate_dtype(sides[0].dtype)
    low = torch.stack([t.amin(dim=0) for t in sides]).amin(dim=0).to(wide)
    high = torch.stack([t.amax(dim=0) for t in sides]).amax(dim=0).to(wide)
    mean = _mean_row(sides[-1], wide).abs()
    least, most = torch.minimum(low.abs(), high.abs()), torch.maximum(low.abs(), high.abs())
    # 2^e <= most < 2^(e + 1): the exponent's bits alone
    bits, exponent = (
        (torch.int64, 0x7FF0000000000000) if wide == torch.float64 else (torch.int32, 0x7F800000)
    )
    binade = (most.view(bits) & exponent).view(wide)
    unit = (binade * torch.finfo(dtype).eps).clamp_min(torch.finfo(dtype).tiny)
    center = (torch.minimum(mean, 2 * least) / unit).floor() * unit
    # so written, a NaN or an infinite value leaves its coordinate where it is
    movable = ((low > 0) | (high < 0)) & (most < torch.finfo(dtype).max)
    return torch.where(movable, center.copysign(low), 0).to(dtype)


def _mean_row(x: Tensor, wide: torch.dtype) -> Tensor:
    """The mean of the rows; of 16-bit ones a run at a time, which PyTorch widens before it sums."""
    if x.dtype == wide or torch.compiler.is_compiling():
        return x.mean(dim=0, dtype=wide)
    total = x[:RUN].sum(dim=0, dtype=wide)
    for start in range(RUN, x.shape[0], RUN):
        total = total + x[start : start + RUN].sum(dim=0, dtype=wide)
    return total / x.shape[0]


@overload
def exactly_centered(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]: ...
@overload
def exactly_centered(x: Tensor, y: None) -> tuple[Tensor, None]: ...
def exactly_centered(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both moved towards 0, while no difference of rows changes by so much as a rounding."""
    # strides would choose the order of sums
    x, y = x.contiguous(), None if y is None else y.contiguous()
    center = exact_center(x) if y is None else exact_center(x, y)
    if center is None or (helpers(center) is not None and not center.any()):
        # moved by nothing: no copy
        return x, y
    return x - center, None if y is None else y - center


def nan_where_infinite(x: Tensor) -> Tensor:
    """0 a row, NaN where one of its entries is infinite or NaN; no copy of x. [..., D] -> [...]"""
    compiled = helpers(x)
    if compiled is not None and (dense_rows(x) or (x.dim() and x.is_contiguous())):
        return compiled.row_marks(x)
    if x.shape[-1] == 0:
        return x.new_zeros(x.shape[:-1])
    return 0 * torch.linalg.vector_norm(x.detach(), torch.inf, dim=-1)


def exp_excess(r: Tensor) -> Tensor:
    """exp(r) - 1 - r >= 0, exact near 0 too."""
    small = r.abs() < NEAR_ZERO
    s = torch.where(small, r, 0)
    series = torch.ones_like(s)
    for n in range(11, 2, -1):  # r^2 / 2 (1 + r / 3 (1 + r / 4 (...)))
        series = 1 + s / n * series
    return torch.where(small, s * s / 2 * series, torch.expm1(r) - r)


def log_excess(y: Tensor) -> Tensor:
    """y - log(1 + y) >= 0 for y > -1, exact near 0 too."""
    small = y.abs() < NEAR_ZERO
    s = torch.where(small, y, 0)
    half = s / (2 + s)  # log(1 + y) = 2 atanh(y / (2 + y))
    square = half * half
    series = torch.full_like(s, 1 / 13)
    for n in range(11, 2, -2):
        series = 1 / n + square * series
    return torch.where(small, s * half - 2 * half * square * series, y - torch.log1p(y))


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), whose value, slope and curve keep their digits on both sides of 0.

    F.softplus is cut at 20, which costs float64 its digits; the curve of F.logsigmoid(-z) is a
    difference from 1 where z < 0, and that of F.softplus where z > 0.
    """
    compiled = helpers(z)
    if compiled is not None and z.dtype in WIDE and z.numel() <= SHORT:
        return compiled.softplus(z)
    return torch.where(z < 0, F.softplus(z), -F.logsigmoid(-z))


def logistic(z: Tensor) -> Tensor:
    """1 / (1 + e^-z), whose slope s (1 - s) keeps its digits on both sides of 0.

    That of torch.sigmoid is of 1 - s, and s is rounded to 1.
    """
    if not z.requires_grad:
        return torch.sigmoid(z)
    below = z < 0
    e = torch.where(below, z, -z).exp()
    return torch.where(below, e, 1) / (1 + e)


def share_loss(value: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """-log of the positives' share, softplus(negative - positive), and which rows have a positive.

    value: [2, ...] logsumexp of the positives and of the negatives; others [...]: how many
    negatives. A row without either has loss 0, whatever stands there.
    """
    compiled = helpers(value, others)
    wide = value.dtype == others.dtype and value.dtype in WIDE
    if compiled is not None and wide and value.numel() <= SHORT:
        return compiled.share_loss(value, others)
    positive, negative = value
    # `!=` and not `>`: a NaN must show
    counted = positive.detach() != -torch.inf
    both = counted & ((others > 0) | positive.isnan())
    return torch.where(both, softplus(torch.where(both, negative - positive, 0)), 0), counted


def log_ratio(v: Tensor, w: Tensor) -> Tensor:
    """log(v / w) for v, w > 0 of any size, accurate where they are near."""
    apart = v - w
    near = apart.abs() < 0.5 * w
    share = torch.where(near, apart, 0) / torch.where(near, w, 1)
    return torch.where(near, share.log1p(), v.log() - w.log())


def against(target: Tensor, lse: Tensor) -> Tensor:
    """softplus(lse - target), exact at both ends; against nothing (-inf) 0, and no NaN slope."""
    some = lse != -torch.inf
    loss = softplus(torch.where(some, lse, 0) - target)
    return torch.where(some, loss, 0 * target.detach())


def merged(first: Tensor, second: Tensor) -> Tensor:
    """logaddexp whose first and second derivatives are finite also at -inf."""
    top = torch.maximum(first, second).detach()
    dead = top == -torch.inf
    shift = torch.where(top.isinf(), 0, top)
    mass = (first - shift).exp() + (second - shift).exp()
    return torch.where(dead, -torch.inf, torch.where(dead, 1, mass).log() + shift)


def joined(target: Tensor, lse: Tensor) -> Tensor:
    """log(e^target + e^lse); beside nothing (-inf) the target, and no NaN slope or curve."""
    some = lse != -torch.inf
    return torch.where(some, merged(target, torch.where(some, lse, 0)), target)


def over_last(z: Tensor, kept: Tensor | None = None) -> Tensor:
    """logsumexp over the last dimension of what is kept; over nothing -inf, gradient 0."""
    if kept is not None:
        z = z.masked_fill(~kept, -torch.inf)
    top = z.detach().amax(dim=-1, keepdim=True)
    dead = top == -torch.inf
    shift = torch.where(top.isinf(), 0, top)
    mass = (z - shift).exp().sum(dim=-1, keepdim=True)
    return torch.where(dead, -torch.inf, torch.where(dead, 1, mass).log() + shift).squeeze(-1)


def reduced(
    loss: Tensor,
    counted: Tensor,
    reduction: str,
    dtype: torch.dtype,
    weight: Tensor | None = None,  # [N] >= 0
) -> Tensor:
    """A loss a row -> its mean over the rows that count (0 over none), its sum, or itself.

    weight: what a row counts for; one of weight 0 counts for nothing and may be NaN.
    """
    if weight is None and reduction != "none" and loss.dtype in WIDE and dtype in WIDE:
        compiled = helpers(loss, counted)
        alike = counted.dtype == torch.bool and loss.shape == counted.shape
        if compiled is not None and alike and loss.numel() <= SHORT:
            wide = dtype == torch.float64
            return compiled.reduced_loss(loss, counted, reduction == "mean", wide)
    if weight is None:
        loss = torch.where(counted, loss, 0)
        count = counted.sum().clamp_min(1)
    else:
        counts = torch.where(counted, weight.to(loss.dtype), 0)
        loss = torch.where(counts > 0, loss, 0) * counts
        count = counts.sum()
        count = torch.where(count > 0, count, 1)
    if reduction == "mean":
        loss = loss.sum() / count
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)


def traced(*tensors: Tensor) -> bool:
    """Whether every operation must be seen: in compiled code, in torch.func, or with a tangent."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    return forward_ad._current_level >= 0 and any(_moves(t) for t in tensors)


def followed(*tensors: Tensor) -> bool:
    """Whether a derivative through one of them is asked for, in reverse mode or in forward mode."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(t.is_floating_point() and _moves(t) for t in tensors)


def _moves(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


def recomputed(f: Callable[..., Any], *arguments: Any) -> Any:
    """f(*arguments), of which autograd keeps the arguments alone and runs f again.

    Neither torch.func nor a trace takes a checkpoint's hooks: there f is called as it is.
    """
    if traced():
        return f(*arguments)
    return checkpoint(f, *arguments, use_reentrant=False)


def autocasts(device: torch.device) -> bool:
    """Whether autocast surrounds the caller on this device."""
    if not torch._C._is_any_autocast_enabled():  # soonest told
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


_NOTHING = contextlib.nullcontext()  # entered as often as one likes


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Our own casts decide; autocast must not lower the [N, D] work around the kernels."""
    if not autocasts(device):
        return _NOTHING
    return torch.autocast(device.type, enabled=False)
