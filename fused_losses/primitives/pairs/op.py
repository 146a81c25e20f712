"""The streamed primitive over pairs: statistics of a score matrix's rows and columns, never stored.

    u_ij = scale <x_i, y_j> + a_i + b_j, or with apart -scale |x_i - y_j|^2 + a_i + b_j
                                                 s_ij = psi(u_ij)             (the score)
    each pair is positive, negative or left out                               (the pairs)
    z_ij = factor_c (s_ij - center_c) w_ij       for its class c              (`Rule`)
    value_ci = log sum_j exp z_ij, or sum_j f(z_ij)   over row i's pairs of class c (the reduction)
    total_ci = sum_j z_ij    count_ci    best_ci = max_j z_ij

and the same for columns, from the same sweep. Positives have sums of their own, so a loss near
zero keeps its digits: 1 - p = sigmoid(lse_negative - lse_positive).

psi: "linear" s = u; "root" s = -sqrt(max(-u, 0)): with u = -|x - y|^2 minus the distance.
Labels equal: positive, else negative (no labels: all negative). Left out: equal ids, different
groups, listed in `exclude`, i == j with skip_self, or outside the window: row i's statistics leave
out s_ij <= low and s_ij >= high, with (positive low, positive high, negative low, negative high) =
x_window[:, i]; y_window says the same for the columns' statistics.

triangle: y is x, only i < j is computed and each pair counts in the rows of both its ends (x_bias
and x_window stand for both sides); half the work where the scores are symmetric.

Backward recomputes the scores: G_ij = dz_ij/du_ij (gradient of z_ij through row i and column j).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import accumulate_dtype, followed, nan_where_infinite, row_dtype
from fused_losses.base.validation import describe
from fused_losses.primitives.op import StreamedOp, duals, moves_of
from fused_losses.primitives.pairs import bounded, tangents
from fused_losses.primitives.pairs import reference as reference_pairs
from fused_losses.primitives.pairs.inputs import (
    BEFORE,
    BEST,
    COUNT,
    REDUCTIONS,
    SCHEMAS,
    SCORES,
    TOTAL,
    VALUE,
    PairInputs,
    PairNeeds,
    sorted_out,
)

# where among PairInputs the tensors stand that may need a gradient, as in PairNeeds
DIFFERENTIABLE = (0, 1, 2, 3, 4)
PAIRED = ("labels", "ids", "groups")  # compared across the sides


class PairStatistics(NamedTuple):
    """Statistics of each row (or column), [2, N] each: positives first, then negatives.

    value and total are differentiable. All in float64 where the device has it.
    """

    value: Tensor  # log sum exp z (-inf over no pairs), or sum f(z)
    total: Tensor  # sum of z
    count: Tensor  # pairs
    best: Tensor  # the largest z, -inf over no pairs


def pair_statistics(
    inputs: PairInputs, *, reduction: str = "lse", cols: bool = False, backend: str | None = None
) -> tuple[PairStatistics, PairStatistics | None]:
    """One sweep: statistics of the rows, and with cols=True of the columns (module docstring).

    Differentiable in x, y, scale and (but with apart) the biases. reduction: "lse", "softplus" or
    "relu".
    Raises ValueError or TypeError for inputs that do not fit each other. Time O(N M D), half with
    triangle; memory O((N + M) D) plus a block. Second derivatives run on
    the pure-PyTorch path, whichever backend ran the first.
    """
    _check(inputs)
    validation.check_choice("reduction", reduction, REDUCTIONS)
    name, inputs = _backend(inputs, backend), _marked(inputs)
    if name == "reference":
        rows, columns = reference_pairs.statistics(inputs, reduction, cols)
    else:
        rows, columns = PAIR_STATISTICS(name, *_flat(inputs), reduction, cols)
    return _named(rows), _named(columns) if cols else None


def pair_attention(
    values: Tensor, inputs: PairInputs, *, positives: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """sum_j softmax_j(z_ij) values_j over row i's negatives (or positives), and its logsumexp.

    values [M, Dv] of x's dtype -> out [N, Dv] in the accumulation dtype (a row without pairs: 0),
    lse [N] (without pairs: -inf). Both differentiable in values, x, y, scale and the biases (but
    with apart).
    Raises ValueError with triangle: rows attend to every other row. Time O(N M (D + Dv)); memory
    O((N + M)(D + Dv)) plus a block.
    """
    if inputs.triangle:
        raise ValueError("triangle: expected False, attention needs the pairs of both orders")
    _check(inputs)
    name, inputs = _backend(inputs, backend), _marked(inputs)
    if name == "reference":
        return reference_pairs.attention(values, inputs, positives)
    return PAIR_ATTENTION(name, values, *_flat(inputs), positives)


def pair_transport(
    x: Tensor,  # [N, D], of the plan's x its derivatives
    y: Tensor,  # [M, D]
    plan: PairInputs,  # apart and linear, whose tensors have no gradients
    x_bias: Tensor,  # [N], added to the plan's scores
    *,
    backend: str | None = None,
) -> Tensor:
    """sum_ij T_ij |x_i - y_j|^2 with T = e^(score) held fixed, differentiable in x and y.

    x and y are the plan's up to a common shift. Near pairs are those of differences, in the
    derivatives too. Time and memory are those of `pair_attention` with values of D + 1.
    """
    _check(plan)
    name, plan = _backend(plan, backend), _marked(plan)
    if name == "reference":
        wide = accumulate_dtype(x.dtype)
        weights = (reference_pairs.scores(plan) + x_bias[:, None]).exp().detach()
        square = reference_pairs.squared_distances(x.to(wide), y.to(wide))
        return (weights * square.to(weights.dtype)).sum()
    # T's part of a row's logsumexp has the derivatives -scale T |x - y|^2 where T is fixed, so of
    # first order all come from one backward; a square of what moves, which is 0, has the second
    dx, dy = x - x.detach(), y - y.detach()
    values = torch.cat([dy, dy.square().sum(dim=1, keepdim=True)], dim=1).contiguous()
    moved, lse = PAIR_ATTENTION(name, values, *_flat(plan), False)
    lse, out = lse.detach(), moved.detach()
    mass = (x_bias + lse).exp()
    grads = torch.zeros_like(out), -mass / plan.scale.to(mass.device)
    needs = False, True, True, True, False, False
    arguments = *grads, out, lse, values.detach(), *_flat(plan), False, *needs
    _, gx, gy, cost, *_ = PAIR_ATTENTION.run_backward(name, *arguments)
    dx, dy, moved = dx.to(mass), dy.to(mass), moved.to(mass)
    square = dx.square().sum(dim=1) + moved[:, -1] - 2 * (dx * moved[:, :-1]).sum(dim=1)
    cost = cost.to(mass) * plan.scale.to(mass)
    return cost + (gx * dx).sum() + (gy * dy).sum() + (mass * square).sum()


def _backend(p: PairInputs, backend: str | None) -> str:
    return backends.choose(backend, p.x.device, p.x.dtype, p.precision, "pairs", p.x.shape[1])[0]


def _check(p: PairInputs) -> None:
    """What kernels rely on; the losses say more of their own arguments."""
    validation.check_matrix("x", p.x, "[N, D]")
    validation.check_matrix("y", p.y, "[M, D]")
    validation.check_meeting(p.x, p.y)
    validation.check_choice("score", p.score, SCORES)
    for name in ("x_bias", "y_bias") if p.apart else ():
        bias = getattr(p, name)
        if bias is not None and followed(bias):
            raise NotImplementedError(f"{name}: has no gradient with apart, detach it")
    for side, rows in (("x", p.x),) if p.triangle else (("x", p.x), ("y", p.y)):
        n = rows.shape[0]
        for name in ("bias", "labels", "ids", "groups", "window"):
            field, vector = f"{side}_{name}", getattr(p, f"{side}_{name}")
            if vector is None:
                continue
            shape = (4, n) if name == "window" else (n,)
            if tuple(vector.shape) != shape:
                raise ValueError(f"{field}: expected shape {shape}, got {describe(vector)}")
            validation.check_device("x", p.x, field, vector)
            if name in PAIRED and vector.dtype != torch.int32:
                raise TypeError(f"{field}: expected int32, got {describe(vector)}")
    for name in () if p.triangle else PAIRED:
        if (getattr(p, f"x_{name}") is None) != (getattr(p, f"y_{name}") is None):
            raise ValueError(f"x_{name}, y_{name}: expected both or neither, got one")


def _marked(p: PairInputs) -> PairInputs:
    """Rows with inf are NaN in their biases: what sums make of inf would be each kernel's own."""

    def bias(rows: Tensor, known: Tensor | None) -> Tensor:
        mark = nan_where_infinite(rows).to(accumulate_dtype(rows.dtype))
        return mark if known is None else known + mark.to(known.dtype)

    x_bias = bias(p.x, p.x_bias)
    if p.triangle or (p.y is p.x and p.y_bias is p.x_bias):
        return p._replace(x_bias=x_bias, y_bias=None if p.triangle else x_bias)
    return p._replace(x_bias=x_bias, y_bias=bias(p.y, p.y_bias))


def _flat(p: PairInputs) -> PairInputs:
    # with triangle y is x, whose gradient x alone gets: compiled autograd cannot add None to it
    y = p.x.detach() if p.triangle else p.y
    return p._replace(y=y, positive=list(p.positive), negative=list(p.negative))


def _named(statistics: Tensor) -> PairStatistics:
    return PairStatistics(
        statistics[VALUE],
        statistics[TOTAL],
        statistics[COUNT].detach(),
        statistics[BEST].detach(),
    )


# ---- the ops: each has some tensors first, then the inputs, then what follows them --------------


def _empty_gradients(p: PairInputs, needs: PairNeeds) -> tuple[Tensor, ...]:
    like = (p.x, p.y, p.scale, p.x_bias, p.y_bias)
    return tuple(
        t.new_empty(t.shape) if need and t is not None else p.x.new_empty(0)
        for t, need in zip(like, needs, strict=True)
    )


def _padded(found: tuple, p: PairInputs) -> tuple[Tensor, ...]:
    """Python backends say None for what was not asked; an op must return tensors."""
    return tuple(p.x.new_empty(0) if g is None else g for g in found)


class PairsOp(StreamedOp):
    """What both ops share: they differ in what comes before and after PairInputs."""

    primitive = "pairs"

    def setup_context(self, ctx: Any, arguments: tuple, output: tuple) -> None:
        tensors = [a if isinstance(a, Tensor) else None for a in arguments]
        ctx.save_for_backward(*tensors, *output)
        ctx.rest = [None if isinstance(a, Tensor) else a for a in arguments]
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        """Gradients of the forward op's arguments, in their order."""
        count = len(ctx.rest)
        # read once: a checkpoint unpacks what was saved a single time
        saved = ctx.saved_tensors
        arguments = [
            rest if tensor is None else tensor
            for tensor, rest in zip(saved[:count], ctx.rest, strict=True)
        ]
        output = saved[count:]
        at = BEFORE[self.name]
        # of statistics value and total only: the others are counts
        part = slice(2) if self.name == "pair_statistics" else slice(None)
        grads = tuple(
            torch.zeros_like(o[part]) if g is None else g[part].contiguous()
            for g, o in zip(grads, output, strict=True)
        )
        needs = [needed[i] for i in range(at)] + [needed[at + i] for i in DIFFERENTIABLE]
        triangle = arguments[at + PairInputs._fields.index("triangle")]
        if triangle:
            needs[at + 1] = needs[at + 4] = False
        out = backward_op(*grads, *output, *arguments, *needs)
        out = [g if need else None for g, need in zip(out, needs, strict=True)]
        return (*out, *[None] * (count - len(out)))

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        """In one sweep, from the statistics that are known."""
        name = self.name + direction
        at = BEFORE[name]
        moving = {*range(at), *(at + i for i in DIFFERENTIABLE)}
        given = duals(arguments, tuple(t if i in moving else None for i, t in enumerate(moves)))
        if direction:
            return moves_of(self.backward("bounded", *given))
        before, p, after = sorted_out(name, given)
        return self.moved(before, p, after, output)

    def moved(self, before: tuple, p: PairInputs, after: tuple, output: tuple) -> tuple:
        """Tangents of the output, that of dual inputs."""
        raise NotImplementedError

    def setup_second(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.save_for_backward(*[a if isinstance(a, Tensor) else None for a in inputs])
        ctx.rest = [None if isinstance(a, Tensor) else a for a in inputs]

    def second(self, ctx: Any, *grads: Tensor | None) -> tuple:
        """The backward op's own derivative, through the pure-PyTorch path, tile by tile."""
        arguments = [
            rest if tensor is None else tensor
            for tensor, rest in zip(ctx.saved_tensors, ctx.rest, strict=True)
        ]
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        further = torch.is_grad_enabled()
        with torch.enable_grad():
            leaves = {i: arguments[i].view_as(arguments[i]) for i in wanted}
            replaced = [leaves.get(i, a) for i, a in enumerate(arguments)]
            outputs = bounded.differentiable_backward(self.name, replaced)
            pairs = [
                (o, g)
                for o, g in zip(outputs, grads, strict=True)
                if g is not None and o.requires_grad
            ]
            found = torch.autograd.grad(
                [o for o, _ in pairs],
                list(leaves.values()),
                [g for _, g in pairs],
                allow_unused=True,
                create_graph=further,
            )
        out: list[Tensor | None] = [None] * len(arguments)
        for i, g in zip(leaves, found, strict=True):
            out[i] = g
        return tuple(out)


class PairStatisticsOp(PairsOp):
    """`pair_statistics` on a backend."""

    name = "pair_statistics"
    schema, backward_schema = SCHEMAS["pair_statistics"], SCHEMAS["pair_statistics_backward"]

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        _, p, (_, cols) = sorted_out(self.name, arguments)
        new: dict[str, Any] = dict(dtype=row_dtype(p.x.device))
        rows = p.x.new_empty((4, 2, p.x.shape[0]), **new)
        return rows, p.x.new_empty((4, 2, p.y.shape[0] if cols else 0), **new)

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, p, (_, _, *needs) = sorted_out(f"{self.name}_backward", arguments)
        return _empty_gradients(p, PairNeeds(*needs))

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, p, after = sorted_out(self.name, arguments)
        return self.form(backend).statistics(p, *after)

    def moved(self, before: tuple, p: PairInputs, after: tuple, output: tuple) -> tuple:
        (rows, columns), (reduction, cols) = output, after
        return tangents.statistics(p, rows, columns, reduction, cols)

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        before, p, (reduction, cols, *needs) = sorted_out(f"{self.name}_backward", arguments)
        run = self.form(backend).statistics_backward
        return _padded(run(*before, p, reduction, cols, PairNeeds(*needs)), p)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        _, p, (_, _, *needs) = sorted_out(self.name + direction, arguments)
        return self.form(backend).workspace(p, PairNeeds(*needs) if direction else None)


class PairAttentionOp(PairsOp):
    """`pair_attention` on a backend."""

    name = "pair_attention"
    schema, backward_schema = SCHEMAS["pair_attention"], SCHEMAS["pair_attention_backward"]

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        (values,), p, _ = sorted_out(self.name, arguments)
        n = p.x.shape[0]
        out = p.x.new_empty((n, values.shape[1]), dtype=accumulate_dtype(p.x.dtype))
        return out, p.x.new_empty(n, dtype=row_dtype(p.x.device))

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        before, p, (_, need_values, *needs) = sorted_out(f"{self.name}_backward", arguments)
        values = before[-1]
        dvalues = values.new_empty(values.shape if need_values else 0)
        return dvalues, *_empty_gradients(p, PairNeeds(*needs))

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        before, p, after = sorted_out(self.name, arguments)
        return self.form(backend).attention(*before, p, *after)

    def moved(self, before: tuple, p: PairInputs, after: tuple, output: tuple) -> tuple:
        (values,), (positives,), (out, lse) = before, after, output
        return tangents.attention(values, p, positives, out, lse)

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        before, p, (positives, need_values, *needs) = sorted_out(f"{self.name}_backward", arguments)
        run = self.form(backend).attention_backward
        return _padded(run(*before, p, positives, need_values, PairNeeds(*needs)), p)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        before, p, (_, *rest) = sorted_out(self.name + direction, arguments)
        needs = PairNeeds(*rest[1:]) if direction else None
        return self.form(backend).workspace(p, needs, before[-1].shape[1])


PAIR_STATISTICS = PairStatisticsOp()
PAIR_ATTENTION = PairAttentionOp()
PAIR_STATISTICS.define()
PAIR_ATTENTION.define()
