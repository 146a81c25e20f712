"""Second derivatives on drawn calls: of the gradients along drawn directions, by every leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pair_cases
import torch
from draws import CANCEL, CASES, Draw, Verdict, calls, inputs, unjudged
from pair_cases import Case, Inputs
from tangent_draws import drawn, weighted
from torch import Tensor

from fused_losses.base.disturbance import Movement, distance, rounded_once
from fused_losses.base.numerics import ROUNDOFF, accumulate_dtype

# a second derivative is refused on every backend (of the k best by a product)
NONE = {name for name in CASES if name.startswith(("pairwise_topk", "trilinear_attention"))}
NONE -= {"pairwise_topk_minkowski", "pairwise_topk_class_covariance"}
# potentials are held fixed
NONE |= {name for name in CASES if name.startswith("sinkhorn_divergence")}
# rows of 100 and more whose weighted sum is near 0: positives and softmax are summed apart
SUMS_THAT_CANCEL = {("supervised_contrastive_out", kind) for kind in ("clusters", "far")}


def judged(name: str, draw: Draw) -> bool:
    kept = name not in NONE and (name, draw.kind) not in SUMS_THAT_CANCEL
    return kept and not unjudged(CASES[name], draw)


def second(case: Case, t: Inputs, value: Callable[[Inputs], Tensor]) -> list[Tensor]:
    """The Hessian of a weighting of the value, times a direction; zeros where there is none."""
    leaves = [getattr(t, name).detach().requires_grad_() for name in case.leaves]
    made = Inputs(**(vars(t) | dict(zip(case.leaves, leaves, strict=True))))
    grads = torch.autograd.grad(weighted(value(made)), leaves, create_graph=True, allow_unused=True)
    pairs = zip(grads, drawn(leaves, 7), strict=True)
    along = torch.stack([(g * a).sum() for g, a in pairs if g is not None]).sum()
    zeros = [torch.zeros_like(leaf) for leaf in leaves]
    if not along.requires_grad:
        return zeros
    found = torch.autograd.grad(along, leaves, allow_unused=True)
    return [z if g is None else g for z, g in zip(zeros, found, strict=True)]


def judge(case: Case, draw: Draw) -> Iterator[Verdict]:
    """Errors and bounds of each backend; one that has none says what to do instead."""
    exact = inputs(case, draw)

    def right() -> list[Tensor]:
        return second(case, pair_cases.in_dtype(case, exact, torch.float64), case.formula)

    truth = right()
    top = torch.finfo(draw.dtype).max
    # no number of the dtype, or a curve that is none: a root at 0, a kink
    if not all(bool((h.abs() < top).all()) for h in truth):
        return
    movement = Movement(right, truth, draw.dtype, draw.shape[2])
    long = max(1.0, *(float(getattr(exact, name).abs().max()) for name in case.leaves))
    spare = CANCEL.get(case.name, 0) * ROUNDOFF[accumulate_dtype(draw.dtype)] * long
    for call in calls(case, draw):
        if call.layout != "contiguous" or call.precision != "fp32":
            continue
        t = pair_cases.in_dtype(case, exact, draw.dtype)
        try:
            found = second(case, t, lambda t, call=call: case.call(t, backend=call.backend))
        except NotImplementedError as refusal:
            # which the reference does not send to itself
            assert "backend='reference'" in str(refusal) and call.backend != "reference", refusal
            continue
        errors = [distance(g, w) for g, w in zip(found, truth, strict=True)]
        spares = [
            2 * rounded_once(g, float(w.norm())) + spare for g, w in zip(found, truth, strict=True)
        ]
        bounds = movement.bounds(errors, spares)
        yield Verdict(call, list(zip(case.leaves, errors, bounds, strict=True)))
