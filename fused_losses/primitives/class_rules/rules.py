"""The rules of a fold over classes: terms of a score and their slopes (`CLASS_FOLDS`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base.numerics import row_dtype, softplus
from fused_losses.primitives.class_rules import mapped
from fused_losses.primitives.row_statistics.bend import bent, bent_slope, steepest_bend

Terms = Callable[[Tensor, Tensor | None, list[float]], tuple[Tensor, ...]]

RuleSlopes = Callable[[Tensor, Tensor | None, list[float]], tuple[Tensor | float, ...]]


# what compiled forms have; the others run in PyTorch on tiles everywhere
KERNEL_RULES = frozenset(("softmax", "summed_softmax", "sface", "sphereface2"))
BEND = 4  # rows of values: a threshold and a polynomial


class ClassRule(NamedTuple):
    """What a cosine of a negative class adds to the row's statistics.

    terms(c [N, T], values [R, N, 1] or None, params) gives one [N, T] a statistic, in PyTorch that
    autograd follows; slopes gives their derivatives in c (of an lse a number will do). values
    carry a gradient where `own_slope` says so, params none.
    """

    kinds: tuple[str, ...]  # of each statistic: "lse" or "sum"
    terms: Terms
    slopes: RuleSlopes
    steepest: Callable[[list[float]], float]  # a bound on |slopes|, but for what the values do
    params: int  # how many
    values: tuple[int, ...]  # how many rows of them it may have
    times: Callable[[Tensor | None], Tensor | float] = lambda _: 1.0  # what they do, [N]
    more_tiles: int = 0  # alive at the peak, beside those that any rule has (`LIVE_TILES`)
    own_slope: bool = False  # the second statistic is the first's derivative in the one value


def _softmax_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    return (params[0] * (c if values is None else bent(c, values)),)


def _softmax_slopes(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor | float]:
    return (params[0] if values is None else params[0] * bent_slope(c, values),)


def _summed_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor, Tensor]:
    (score,) = _softmax_terms(c, values, params)
    return score, score


def _summed_slopes(
    c: Tensor, values: Tensor | None, params: list[float]
) -> tuple[Tensor | float, Tensor | float]:
    (slope,) = _softmax_slopes(c, values, params)
    return slope, slope


def _capped_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    scale, cap = params
    return (cap * torch.tanh(scale / cap * c),)


def _capped_slopes(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    scale, cap = params
    # 1 - tanh^2 has no digits where tanh rounds to 1
    return (scale / torch.cosh(scale / cap * c) ** 2,)


def _twice_capped(
    of: Callable[[Tensor, Tensor | None, list[float]], tuple[Tensor]],
) -> Callable[[Tensor, Tensor | None, list[float]], tuple[Tensor, Tensor]]:
    def both(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor, Tensor]:
        (each,) = of(c, values, params)
        return each, each

    return both


def _entropy_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    """e^{z - L} (L - z), z capped if a cap is given: a class's part of the entropy."""
    assert values is not None
    below = values[0] - _entropy_score(c, params)
    return ((-below).exp() * below,)


def _entropy_score(c: Tensor, params: list[float]) -> Tensor:
    scale, cap = params
    return _capped_terms(c, None, params)[0] if cap else scale * c


def _entropy_slopes(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    assert values is not None
    below = values[0] - _entropy_score(c, params)
    slope = _capped_slopes(c, None, params)[0] if params[1] else params[0]
    return ((-below).exp() * (below - 1) * slope,)


def _squared_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor, Tensor]:
    (score,) = _softmax_terms(c, values, params)
    return score, 2 * score


def _squared_slopes(
    c: Tensor, values: Tensor | None, params: list[float]
) -> tuple[Tensor | float, Tensor | float]:
    (slope,) = _softmax_slopes(c, values, params)
    return slope, 2 * slope


def _hinge_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor, Tensor]:
    """max(0, z + v), and its slope in v."""
    assert values is not None
    above = params[0] * c + values[0]
    return above.clamp_min(0), (above > 0).to(c.dtype)


def _hinge_slopes(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor, float]:
    assert values is not None
    return params[0] * (params[0] * c + values[0] > 0).to(c.dtype), 0.0


def _sface_weight(c: Tensor, params: list[float]) -> Tensor:
    k, b = params
    # rounding takes a cosine beyond 1, where acos is NaN
    return torch.sigmoid(k * (b - c.detach().clamp(-1, 1).acos()))


def _sface_terms(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    return (_sface_weight(c, params) * c,)


def _sface_slopes(c: Tensor, values: Tensor | None, params: list[float]) -> tuple[Tensor]:
    return (_sface_weight(c, params),)


def raised(c: Tensor, t: float, straight_through: bool) -> Tensor:
    """2 ((c + 1) / 2)^t - 1, SphereFace2's map of a cosine; straight_through: with slope 1."""
    value = 2 * ((c + 1) / 2).clamp_min(0) ** t - 1
    return c + (value - c).detach() if straight_through else value


def _sphereface2_score(c: Tensor, values: Tensor | None, params: list[float]) -> Tensor:
    scale, margin, t, straight_through = params
    assert values is not None
    return scale * (raised(c, t, bool(straight_through)) + margin) + values[0]


def _sphereface2_terms(
    c: Tensor, values: Tensor | None, params: list[float]
) -> tuple[Tensor, Tensor]:
    """softplus(z), and its slope in the bias."""
    z = _sphereface2_score(c, values, params)
    return softplus(z), torch.sigmoid(z)


def _sphereface2_slopes(
    c: Tensor, values: Tensor | None, params: list[float]
) -> tuple[Tensor, Tensor]:
    scale, _, t, straight_through = params
    z = _sphereface2_score(c, values, params)
    share = torch.sigmoid(z)
    of_score: Tensor | float = scale
    if not straight_through:
        of_score = scale * t * ((c + 1) / 2).clamp_min(0) ** (t - 1)
    return share * of_score, share * torch.sigmoid(-z) * of_score


_TERMS, _SUMS = (
    (mapped.mapped_terms, mapped.mapped_slopes),
    (mapped.row_sum_terms, mapped.row_sum_slopes),
)
_DIVERGENCE = (mapped.divergence_terms, mapped.divergence_slopes)
# params: scale; values: l and t. Or scale, eps, K, and L beside them
_MAPPED = (
    ("mapped_l1", ("lse", "lse", "lse", "sum"), *_TERMS, False, 1, (2,)),
    ("mapped_softplus", ("lse", "lse", "lse"), *_TERMS, True, 1, (2,)),
    ("row_sum_l1", ("sum",), *_SUMS, False, 1, (0,)),
    ("row_sum_softplus", ("lse",), *_SUMS, True, 1, (0,)),
    ("divergence_l1", ("sum",), *_DIVERGENCE, False, 3, (3,)),
    ("divergence_softplus", ("sum",), *_DIVERGENCE, True, 3, (3,)),
)
CLASS_FOLDS: Mapping[str, ClassRule] = MappingProxyType(
    {
        # params: scale; values: none, or the bend's four
        "softmax": ClassRule(
            ("lse",), _softmax_terms, _softmax_slopes, lambda p: p[0], 1, (0, BEND), steepest_bend
        ),
        # and the sum of these scores
        "summed_softmax": ClassRule(
            ("lse", "sum"),
            _summed_terms,
            _summed_slopes,
            lambda p: p[0],
            1,
            (0, BEND),
            steepest_bend,
        ),
        # params: scale, cap
        "capped_softmax": ClassRule(
            ("lse",), _capped_terms, _capped_slopes, lambda p: p[0], 2, (0,)
        ),
        # and their sum
        "summed_capped": ClassRule(
            ("lse", "sum"),
            _twice_capped(_capped_terms),
            _twice_capped(_capped_slopes),
            lambda p: p[0],
            2,
            (0,),
        ),
        # params: scale, cap or 0; values: the logsumexp over all classes
        "entropy": ClassRule(("sum",), _entropy_terms, _entropy_slopes, lambda p: p[0], 2, (1,)),
        # and of the squares of their exponentials
        "squared_softmax": ClassRule(
            ("lse", "lse"),
            _squared_terms,
            _squared_slopes,
            lambda p: 2 * p[0],
            1,
            (0, BEND),
            steepest_bend,
        ),
        # params: scale; values: threshold less the label's score
        "hinge": ClassRule(
            ("sum", "sum"), _hinge_terms, _hinge_slopes, lambda p: p[0], 1, (1,), own_slope=True
        ),
        # params: k, b
        "sface": ClassRule(("sum",), _sface_terms, _sface_slopes, lambda _: 1.0, 2, (0,)),
        # params: scale, margin, t, whether straight through; values: the bias
        "sphereface2": ClassRule(
            ("sum", "sum"),
            _sphereface2_terms,
            _sphereface2_slopes,
            lambda p: p[0] * (1.0 if p[3] else p[2]),
            4,
            (1,),
            own_slope=True,
        ),
        **{
            name: ClassRule(
                kinds,
                partial(terms, soft=soft),
                partial(slopes, soft=soft),
                lambda p: p[0],
                params,
                values,
                mapped.steepest_mapped,
                more_tiles=3 * len(kinds),
            )
            for name, kinds, terms, slopes, soft, params, values in _MAPPED
        },
    }
)


def merge_statistics(kinds: tuple[str, ...], a: Tensor, b: Tensor) -> Tensor:
    """Statistics [S, N] over two disjoint sets of classes -> those over both."""
    merged = (torch.logaddexp if kind == "lse" else torch.add for kind in kinds)
    return torch.stack([both(a[s], b[s]) for s, both in enumerate(merged)])


def no_classes(kinds: tuple[str, ...], n: int, device: torch.device) -> Tensor:
    """Statistics [S, N] over no classes at all."""
    # fills: a tensor made of a list is a copy to the device, which waits for it
    make = partial(torch.full, (n,), dtype=row_dtype(device), device=device)
    return torch.stack([make(-torch.inf if kind == "lse" else 0.0) for kind in kinds])


def pool(product: Tensor, softness: float) -> Tensor:
    """A class's cosine from those of its centres, [..., K] -> [...].

    softness 0: the highest (of equal ones the first, which also gets the gradient); else their mean
    by softmax(product / softness), SoftTriple's relaxed similarity (Qian et al., 2019).
    """
    if product.shape[-1] == 1:
        return product[..., 0]
    if softness == 0:
        return product.max(dim=-1).values
    return (torch.softmax(product / softness, dim=-1) * product).sum(dim=-1)
