"""Statistics of listed pairs: those of `pairs` where a miner says which pairs take part.

    u_k = scale <x_i, y_j> + a_i + b_j, or -scale |x_i - y_j|^2 + a_i + b_j      of line k = (i, j)

Only u is an op, with O(P D) work in blocks; all that follows is autograd on vectors of P. Distances
come from differences, so that near pairs have all their digits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.compiled import helpers
from fused_losses.base.indices import ListedPairs, PairList
from fused_losses.base.numerics import (
    accumulate_dtype,
    root,
    row_dtype,
    softplus,
)
from fused_losses.primitives.listed import bounded, reference
from fused_losses.primitives.listed.inputs import BACKWARD, FORWARD, ListedInputs
from fused_losses.primitives.op import StreamedOp, through_backward
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, REDUCTIONS, PairInputs
from fused_losses.primitives.pairs.op import PairStatistics, marked
from fused_losses.primitives.pairs.reference import term
from fused_losses.primitives.row_rules.inputs import ROW_SCORES, RowBlock, RowInputs
from fused_losses.primitives.row_rules.rules import ROW_FOLDS

ADDITIVE = ("hinges", "ranked_list")  # rules whose statistics are sums over pairs


def listed_scores(
    x: Tensor,  # [N, D]
    y: Tensor,  # [M, D]
    pairs: PairList,
    *,
    apart: bool = False,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """<x_i, y_j>, or with apart |x_i - y_j|^2, of the listed pairs [P], in the accumulation dtype.

    NaN where a row has an entry that is not finite. The indices are not checked here
    (`base.indices`). Differentiable in x and y, twice on every backend. Products are not rounded,
    whatever precision says. Time O(P D); memory O(P + (N + M) D) and a block, on "reference"
    O(P D).
    """
    name, _ = backends.choose(backend, x.device, x.dtype, precision, "pairs", x.shape[1])
    inputs = ListedInputs(x, None if y is x else y, pairs.rows, pairs.columns, apart)
    # forward mode takes an empty result of a Function for a view of an empty list
    if name == "reference" or pairs.rows.shape[0] == 0:
        return reference.scores(inputs)
    compiled = helpers(x, y, pairs.rows, pairs.columns) if name == "cpu" else None
    if compiled is not None:
        # the same op, with its gradient in C++
        return compiled.listed_scores(*inputs)
    return LISTED_SCORES(name, *inputs)


def listed_pair_scores(p: PairInputs, pairs: PairList, *, backend: str | None = None) -> Tensor:
    """s = psi(u) of the listed pairs, [P] in the accumulation dtype; NaN of rows with inf."""
    p = marked(p)
    options: dict[str, Any] = dict(apart=p.apart, precision=p.precision, backend=backend)
    found = listed_scores(p.x, p.y, pairs, **options)
    scale = p.scale.to(found.dtype)
    u = (-scale if p.apart else scale) * found
    for bias, at in ((p.x_bias, pairs.rows), (p.y_bias, pairs.columns)):
        u = u if bias is None else u + bias.to(u.dtype).index_select(0, at)
    return u if p.score == "linear" else -root(-u)


def listed_statistics(
    inputs: PairInputs,
    listed: ListedPairs,
    *,
    reduction: str = "lse",
    backend: str | None = None,
) -> PairStatistics:
    """`pair_statistics` of the rows over listed pairs; labels and groups are not asked.

    Of inputs without triangle; x_window and ids leave pairs out. A pair that is listed twice counts
    twice, unless `listed.once` said otherwise. Weights multiply the terms of value and total, not
    count and best, of which a pair of weight 0 is none. Time O(P D); memory O(P + (N + M) D) and
    a block.
    """
    validation.check_choice("reduction", reduction, REDUCTIONS)
    p, n = inputs, inputs.x.shape[0]
    found = []
    for kind, pairs in ((POSITIVE, listed.positive), (NEGATIVE, listed.negative)):
        s = listed_pair_scores(p, pairs, backend=backend)
        z = term(s, p.positive if kind == POSITIVE else p.negative).to(row_dtype(s.device))
        kept = _taking_part(p, pairs, s.detach(), kind)
        w = None if pairs.weight is None else pairs.weight.to(z.dtype)
        found.append(_folded(z, pairs.rows, kept, n, reduction, w))
    return PairStatistics(*(torch.stack(two) for two in zip(*found, strict=True)))


def _taking_part(p: PairInputs, pairs: PairList, s: Tensor, kind: int) -> Tensor:
    """Which of the listed pairs count, [P] bool."""
    kept = torch.ones_like(s, dtype=torch.bool) if pairs.kept is None else pairs.kept
    if p.x_ids is not None:
        assert p.y_ids is not None
        kept = kept & (p.x_ids[pairs.rows] != p.y_ids[pairs.columns])
    if p.x_window is not None:
        low, high = p.x_window[2 * kind : 2 * kind + 2].index_select(1, pairs.rows)
        # so written, a NaN score takes part
        kept = kept & ~((s <= low) | (s >= high))
    return kept


def _folded(
    z: Tensor, rows: Tensor, kept: Tensor, n: int, reduction: str, weight: Tensor | None
) -> tuple[Tensor, ...]:
    """value, total, count, best of each row, [N]."""
    nothing = z.new_zeros(n)

    def summed(each: Tensor, weight: Tensor | None = weight) -> Tensor:
        each = each if weight is None else weight * each
        return nothing.index_add(0, rows, torch.where(kept, each, 0))

    some = kept if weight is None else kept & ~(weight == 0)
    hidden = z.detach().masked_fill(~some, -torch.inf)
    best = torch.full_like(nothing, -torch.inf).scatter_reduce(0, rows, hidden, "amax")
    count = summed(some.to(z.dtype), None)
    if reduction == "lse":
        shift = torch.where(best.isinf(), 0, best)
        # what is left out would be more than 1, and its slope times 0 no number
        apart = torch.where(kept, z - shift.index_select(0, rows), 0)
        if weight is not None:
            # of weight 0 a term may lie beyond the others' best, and has a slope in its weight
            apart = apart.clamp_max(math.log(torch.finfo(z.dtype).max) / 2)
        mass = summed(apart.exp())
        dead = count == 0
        value = torch.where(dead, -torch.inf, torch.where(dead, 1, mass).log() + shift)
    else:
        value = summed(softplus(z) if reduction == "softplus" else z.relu())
    return value, summed(z), count, best


def listed_row_losses(
    inputs: RowInputs, listed: ListedPairs, *, backend: str | None = None
) -> Tensor:
    """`row_losses` of a rule of ADDITIVE over listed pairs, [N, S]; labels are not asked."""
    validation.check_choice("rule", inputs.rule, ADDITIVE)
    kind, sign = ROW_SCORES[inputs.score]
    parts = []
    for positive, pairs in ((True, listed.positive), (False, listed.negative)):
        score = listed_scores(
            inputs.x,
            inputs.y,
            pairs,
            apart=kind != "dot",
            precision=inputs.precision,
            backend=backend,
        )
        score = sign * (root(score) if kind == "euclidean" else score)
        # as of all pairs: what is not finite is no number
        score = score.masked_fill(score.isinf(), torch.nan)[:, None]
        kept = torch.ones_like(score, dtype=torch.bool)
        kept = kept if pairs.kept is None else pairs.kept[:, None]
        other = torch.zeros_like(kept)
        values = None if inputs.values is None else inputs.values.index_select(0, pairs.rows)
        block = RowBlock(
            score,
            kept if positive else other,
            other if positive else kept,
            values,
            list(inputs.params),
        )
        each = ROW_FOLDS[inputs.rule].formula(block)
        out = each.new_zeros(inputs.x.shape[0], each.shape[1])
        parts.append(out.index_add(0, pairs.rows, each))
    return parts[0] + parts[1]


# ---- the op: autograd and registration ----------------------------------------------------------


class ListedScoresOp(StreamedOp):
    """The scores of listed pairs, with their gradient."""

    name, primitive = "listed_scores", "listed"
    schema, backward_schema = FORWARD, BACKWARD

    def setup_context(self, ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.apart = inputs[4]

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        needs = needed[0], needed[1]
        found = backward_op(grads[0].contiguous(), *ctx.saved_tensors, ctx.apart, *needs)
        return *(g if need else None for g, need in zip(found, needs, strict=True)), *[None] * 3

    def fake_forward(self, x: Tensor, y: Tensor, rows: Tensor, *rest: Any) -> Tensor:
        return x.new_empty(rows.shape[0], dtype=accumulate_dtype(x.dtype))

    def fake_backward(self, grad: Tensor, x: Tensor, y: Tensor | None, *rest: Any) -> tuple:
        need_x, need_y = rest[-2:]
        of_y = y.shape if need_y and y is not None else 0
        return x.new_empty(x.shape if need_x else 0), x.new_empty(of_y)

    def forward(self, backend: str, *arguments: Any) -> Tensor:
        return bounded.forward(ListedInputs(*arguments))

    def backward(self, backend: str, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        *given, need_x, need_y = arguments
        return bounded.backward(grad, ListedInputs(*given), need_x, need_y)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        at = 1 if direction else 0
        form = self.form("cpu") if backend == "cpu" else bounded
        return form.workspace(ListedInputs(*arguments[at : at + 5]), bool(direction))

    def setup_second(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.rest = inputs[5:]

    def second(self, ctx: Any, *grads: Tensor | None) -> tuple:
        """The backward op's own derivative, block by block."""

        def run(arguments: list[Any]) -> tuple:
            grad, *given, need_x, need_y = arguments
            return bounded.backward(grad, ListedInputs(*given), need_x, need_y, True)

        return through_backward(ctx, [*ctx.saved_tensors, *ctx.rest], grads, run)


LISTED_SCORES = ListedScoresOp()
LISTED_SCORES.define()
