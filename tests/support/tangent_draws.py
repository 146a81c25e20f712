"""Forward mode on drawn calls: the tangent along drawn directions, against the formula's slope."""

from __future__ import annotations

from collections.abc import Iterator

import pair_cases
import torch
import torch.autograd.forward_ad as forward_ad
from draws import CANCEL, Call, Draw, calls, inputs
from pair_cases import Case, Inputs
from torch import Tensor

from fused_losses.base.disturbance import Movement, distance
from fused_losses.base.numerics import ROUNDOFF, accumulate_dtype

# of a row alone: a mean over nothing is NaN and so moves
MORE_THAN_ONE = ("linear_cross_entropy_options",)


def drawn(like: list[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in like]


def weighted(value: Tensor) -> Tensor:
    return (value * drawn([value.detach()], 5)[0]).sum()


def slope(case: Case, t: Inputs) -> Tensor:
    """Of a weighting of the formula's value along the direction, by reverse mode."""
    leaves = [getattr(t, name) for name in case.leaves]
    grads = torch.autograd.grad(weighted(case.formula(t)), leaves, allow_unused=True)
    pairs = zip(grads, drawn(leaves, 7), strict=True)
    return torch.stack([(g * a).sum() for g, a in pairs if g is not None]).sum()


def tangent(case: Case, t: Inputs, backend: str) -> Tensor:
    leaves = [getattr(t, name).detach() for name in case.leaves]
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, leaves, drawn(leaves, 7))
        made = vars(t) | dict(zip(case.leaves, duals, strict=True))
        value = weighted(case.call(Inputs(**made), backend=backend))
        found = forward_ad.unpack_dual(value).tangent
    # an option that counts has no tangent
    return torch.zeros(()).double() if found is None else found.double()


def judge(case: Case, draw: Draw) -> Iterator[tuple[Call, float, float]]:
    """Error and bound of each backend; one that refuses forward mode says what to do instead."""
    exact = inputs(case, draw)

    def right() -> list[Tensor]:
        return [slope(case, pair_cases.in_dtype(case, exact, torch.float64))]

    truth = right()
    if not bool(truth[0].isfinite()):
        return
    movement = Movement(right, truth, draw.dtype, draw.shape[2])
    unit = ROUNDOFF[accumulate_dtype(draw.dtype)]
    # the length that a rounding of 1 is of, and of a direction's tangent that which divides it
    rows = [torch.atleast_2d(getattr(exact, name)) for name in case.leaves]
    lengths = torch.cat([torch.linalg.vector_norm(r, dim=-1).flatten() for r in rows])
    lengths = lengths[lengths > 0]
    long = max([1.0, *(float(f) for r in lengths for f in (r, 1 / r))])
    spare = (4 * float(truth[0].abs()) + CANCEL.get(case.name, 0) * long) * unit
    spare += 1024 * torch.finfo(draw.dtype).tiny
    for call in calls(case, draw):
        if call.layout != "contiguous" or call.precision != "fp32":
            continue
        try:
            found = tangent(case, pair_cases.in_dtype(case, exact, draw.dtype), call.backend)
        except NotImplementedError as refusal:
            assert "backend='reference'" in str(refusal), refusal
            continue
        error = distance(found, truth[0])
        yield call, error, movement.bounds([error], [spare])[0]
