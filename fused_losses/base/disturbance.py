"""How far roundings may move a result: a formula run again, each of its roundings drawn anew.

Under `Disturbed` a float64 formula goes on as if it were computed in a narrower arithmetic: what
each operation returns, forward and backward, is moved by a random part, plus or minus, of the most
that an implementation's rounding may move it there. The largest of several such movements says how
far apart two honest computations of the formula may come at these very inputs: where values cancel,
where a slope jumps, where one term rules. docs/reliability.md says what each operation is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.base.numerics import ROUNDOFF

# of a product's factors, where they are narrowed
LOWERED = {"fp32": 0.0, "tf32": 2.0**-11, "mixed": 2.0**-8, "bf16": 2.0**-8}
# at most: terms of one size, or jumps of two pairs, take themselves away in half of the draws
SAMPLES = 32
# times the largest of the samples: what is allowed; a sum of errors of one sign is seldom drawn
SURE = 4.0
# a narrowed factor's rounding is shared by all pairs of its row: few draws say little of it
SURE_LOWERED = 16.0

# what moves or chooses values and rounds nothing (views and masks beside)
_EXACT = frozenset(
    "abs alias amax amin arange argmax argmin argsort as_strided bitwise_and bitwise_not "
    "bitwise_or cat clamp clamp_max clamp_min clone constant_pad_nd copy cummax cummin detach "
    "diag_embed diagonal diagonal_backward diagonal_copy empty empty_like empty_strided eq expand "
    "eye fill flip floor full full_like gather ge gt index index_put index_select is_same_size "
    "isfinite isinf isnan le lift_fresh logical_and logical_not logical_or lt masked_fill "
    "masked_scatter masked_select max maximum min minimum nan_to_num ne neg new_empty "
    "new_empty_strided new_full new_ones new_zeros nonzero ones ones_like permute relu repeat "
    "reshape roll round scalar_tensor scatter select select_backward select_scatter sgn sign slice "
    "slice_backward sort split split_with_sizes squeeze stack t threshold threshold_backward topk "
    "transpose tril triu unbind unfold unsafe_split unsafe_view unsqueeze "
    "value_selecting_reduction_backward view where zero zeros zeros_like _local_scalar_dense "
    "_reshape_alias _to_copy _unsafe_view _efficientzerotensor".split()
)
_PRODUCTS = frozenset("mm bmm mv dot addmm baddbmm".split())


class Disturbed(TorchDispatchMode):
    """Runs float64 arithmetic as if its roundings were those of a narrower one.

    dtype: what the caller's rows are held in; sums are float32's, or float64's for float64.
    width: D; a matrix whose last dimension it is holds rows, in their dtype, and so does what has
    one of `shapes`. lowered: the rounding of a product's factors. seed: which roundings are drawn.
    alike: what one operation returns has roundings of one sign, as rows that are nearly equal have.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        width: int,
        *,
        lowered: float = 0.0,
        shapes: Collection[tuple[int, ...]] = (),
        seed: int = 0,
        alike: bool = False,
    ) -> None:
        super().__init__()
        self.unit = ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
        self.row_unit = ROUNDOFF[dtype]
        # what storing rows rounds beyond the sums' own rounding
        self.stored = self.row_unit if self.row_unit > self.unit else 0.0
        self.width, self.lowered, self.shapes = width, lowered, frozenset(shapes)
        self._seed, self._drawings, self._alike = seed, 0, alike

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        plain = name.rstrip("_") if not name.startswith("__") else name
        if plain in _EXACT:
            return func(*args, **kwargs)
        inplace = func._schema.is_mutable
        # read before an operation in place changes them
        before = tuple(a.clone() if inplace and isinstance(a, Tensor) else a for a in args)
        out = func(*args, **kwargs)
        for part in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(part, Tensor) and part.dtype == torch.float64 and part.numel():
                most = self._most(plain, Executed(self, func, before, kwargs, part))
                moved = part + self._drawn(part) * most
                # what is infinite stays so, and is infinite or NaN once moved, too
                part.copy_(torch.where(moved.isfinite(), moved, part))
        return out

    def _drawn(self, like: Tensor) -> Tensor:
        """Plus or minus one."""
        signs, count = _signs(), like.numel()
        self._drawings += 1
        # another part of the same signs each time: drawing anew would take most of the time
        start = (self._drawings * 7919 + self._seed * 104729) % (len(signs) // 2)
        if self._alike:
            return signs[start].to(like).expand(like.shape)
        found = signs[start : start + count]
        if len(found) < count:
            found = found.repeat(-(-count // len(found)))[:count]
        return found.view(like.shape).to(like)

    def sum(self, terms: int) -> float:
        """Of a sum of so many terms in any order, in shares of the sum of their magnitudes."""
        return (terms / 8 + 16) * self.unit

    def _most(self, name: str, step: Executed) -> Tensor:
        """The most that rounding may move each element of what an operation returns."""
        args, out, size = step.args, step.out, step.out.abs()
        unit = self.row_unit if self._holds_rows(name, out) else self.unit
        if name in _PRODUCTS:
            a, b = args[-2:] if name in ("addmm", "baddbmm") else args[:2]
            product = getattr(torch, {"addmm": "mm", "baddbmm": "bmm"}.get(name, name))
            # of 16-bit rows a library multiplies 16-bit factors
            share = self.sum(a.shape[-1]) + 2 * max(self.lowered, self.stored)
            most = share * product(a.abs(), b.abs()) + unit * size
            if self.lowered:
                # a factor is rounded once for all that it is multiplied with
                most = most + (product(self._narrowed(a), self._narrowed(b)) - product(a, b)).abs()
            return most
        rule = _RULES.get(name)
        if rule is None:
            return 4 * unit * size
        return rule(step) + (unit * size if unit > self.unit else 0)

    def _narrowed(self, factor: Tensor) -> Tensor:
        # some tensor cores cut digits off, at twice the error of rounding to nearest
        return factor * (1 + 2 * self.lowered * self._drawn(factor))

    def _holds_rows(self, name: str, out: Tensor) -> bool:
        """Rows, or a product of two rows for each pair."""
        kept = out.dim() == 2 or name == "mul" or tuple(out.shape) in self.shapes
        return kept and self.wide(out)

    def wide(self, out: Tensor) -> bool:
        """Whether the last dimension is that of rows: D, or one more, which some metrics add."""
        return out.dim() > 1 and 0 <= out.shape[-1] - self.width <= 1


@lru_cache(maxsize=1)
def _signs() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randint(0, 2, (1 << 20,), generator=generator) - 1).double()


class Executed(NamedTuple):
    """One operation: what it was given and what it returned."""

    mode: Disturbed
    func: Any
    args: tuple
    kwargs: dict
    out: Tensor


Magnitude = Callable[[Executed], Tensor]


def _magnitude(a: Any) -> Any:
    return a.abs() if isinstance(a, Tensor) else abs(a)


def _finite(size: Tensor) -> Tensor:
    return size.nan_to_num(0, 0, 0)


def _added(s: Executed) -> Tensor:
    """Of rows the result's own; of scores their terms', which others may add in another order."""
    mode, first, second = s.mode, s.args[0], s.args[1]
    both = _magnitude(first) + abs(s.kwargs.get("alpha", 1)) * _magnitude(second)
    pairs = s.out.dim() > 2 and isinstance(second, Tensor) and first.shape != second.shape
    if not pairs and not mode.wide(s.out):
        return (mode.unit * both).expand(s.out.shape)
    # others move rows before they are stored, or take pairs' differences from a product
    rough = max(mode.lowered, mode.stored)
    return mode.unit * s.out.abs() + (rough * both if pairs else 0)


def _summed(s: Executed) -> Tensor:
    terms = s.args[0].numel() // max(s.out.numel(), 1)
    return s.mode.sum(max(terms, 1)) * s.func(s.args[0].abs(), *s.args[1:], **s.kwargs).double()


def _cumulated(s: Executed) -> Tensor:
    terms = s.args[0].shape[s.args[1]]
    return s.mode.sum(terms) * s.func(s.args[0].abs(), *s.args[1:], **s.kwargs)


def _exponential(s: Executed) -> Tensor:
    # to base 2, z / log 2 is rounded first
    return s.mode.unit * (4 + _finite(s.args[0].abs())) * s.out.abs()


def _logarithm(s: Executed) -> Tensor:
    return 4 * s.mode.unit * (1 + _finite(s.out.abs()))


def _log_sum(s: Executed) -> Tensor:
    terms = s.args[0].numel() // max(s.out.numel(), 1)
    return s.mode.sum(terms) + 4 * s.mode.unit * _finite(s.out.abs())


def _softmax(s: Executed) -> Tensor:
    """A weight is the exponential of a score less a logsumexp, each rounded in its own length."""
    z, dim = s.args[:2]
    both = _finite(z.abs() + z.amax(dim, keepdim=True).abs())
    return (s.mode.sum(z.shape[dim]) + s.mode.unit * (4 + both)) * s.out.abs()


def _log_softmax(s: Executed) -> Tensor:
    z, dim = s.args[:2]
    return s.mode.sum(z.shape[dim]) + s.mode.unit * _finite(s.out.abs() + z.abs())


def _softmax_back(s: Executed) -> Tensor:
    grad, p, dim = s.args[0].abs(), s.args[1], s.args[2]
    return s.mode.sum(p.shape[dim]) * p * (grad + (grad * p).sum(dim, keepdim=True))


def _log_softmax_back(s: Executed) -> Tensor:
    grad, log_p, dim = s.args[0].abs(), s.args[1], s.args[2]
    return s.mode.sum(log_p.shape[dim]) * (grad + log_p.exp() * grad.sum(dim, keepdim=True))


def _turned(s: Executed) -> Tensor:
    return 4 * s.mode.unit * torch.ones_like(s.out)


_RULES: dict[str, Magnitude] = {
    "add": _added,
    "sub": _added,
    "rsub": _added,
    "sum": _summed,
    "mean": _summed,
    "cumsum": _cumulated,
    "exp": _exponential,
    "sigmoid": _exponential,
    "log": _logarithm,
    "logsumexp": _log_sum,
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "_softmax_backward_data": _softmax_back,
    "_log_softmax_backward_data": _log_softmax_back,
    "sin": _turned,
    "cos": _turned,
}


class Movement:
    """How far roundings move each part of an outcome at most, in norm; drawn as far as is needed.

    outcome computes in float64, forward and backward; truth is what it returns undisturbed.
    lowered: of `LOWERED`, by a call's precision.
    """

    def __init__(
        self,
        outcome: Callable[[], list[Tensor]],
        truth: list[Tensor],
        dtype: torch.dtype,
        width: int,
        *,
        lowered: float = 0.0,
    ) -> None:
        self._outcome, self._truth = outcome, truth
        shapes = [tuple(part.shape) for part in truth]
        self._mode = partial(Disturbed, dtype, width, lowered=lowered, shapes=shapes)
        self._times = SURE_LOWERED if lowered else SURE
        self._most, self._drawn = [0.0] * len(truth), 0

    def bounds(self, errors: Sequence[float], spare: Sequence[float]) -> list[float]:
        """What each part may be off: the movement's share and what is spare.

        One more movement is drawn while an error is above its bound: further ones only widen it.
        """
        while True:
            found = [self._times * m + s for m, s in zip(self._most, spare, strict=True)]
            within = all(e <= b for e, b in zip(errors, found, strict=True))
            if within or self._drawn == SAMPLES:
                return found
            self._draw()

    def _draw(self) -> None:
        # the later half: what is nearly equal is rounded alike
        with self._mode(seed=self._drawn, alike=2 * self._drawn >= SAMPLES):
            moved = self._outcome()
        apart = [distance(part, right) for part, right in zip(moved, self._truth, strict=True)]
        self._most = [max(pair) for pair in zip(self._most, apart, strict=True)]
        self._drawn += 1


def rounded_once(stored: Tensor, size: float) -> float:
    """What storing a tensor of this norm costs at most; numbers near 0 have fewer digits."""
    unit = ROUNDOFF[stored.dtype]
    sums = torch.float64 if stored.dtype == torch.float64 else torch.float32
    # of a few steps that are all that small; and an exponential may be flushed to 0
    smallest = 4 * torch.finfo(stored.dtype).smallest_normal * unit
    smallest += 1024 * torch.finfo(sums).smallest_normal
    return unit * size + smallest * stored.numel() ** 0.5


def distance(got: Tensor, want: Tensor) -> float:
    """|got - want| in norm over what is finite; inf where one is finite or NaN and the other not.

    Infinities must be the same.
    """
    got, want = got.double(), want.double()
    alike = (got == want) | (got.isnan() & want.isnan())
    if bool(((~got.isfinite() | ~want.isfinite()) & ~alike).any()):
        return float("inf")
    return float(torch.where(alike, 0, got - want).norm())
