"""The streamed primitive over pairs: statistics of a score matrix's rows and columns, never stored.

    u_ij = scale <x_i, y_j> + a_i + b_j, or with apart -scale |x_i - y_j|^2 + a_i + b_j
                                                 s_ij = psi(u_ij)             (the score)
    each pair is positive, negative or left out                               (the pairs)
    z_ij = factor_c (s_ij - center_c) w_ij       for its class c              (`Rule`)
    value_ci = log sum_j exp z_ij, or sum_j f(z_ij)   over row i's pairs of class c (the reduction)
    total_ci = sum_j z_ij    count_ci    best_ci = max_j z_ij

and the same for columns, from the same sweep. Positives have sums of their own, so a loss near
zero keeps its digits: 1 - p = sigmoid(lse_negative - lse_positive).

psi: "linear" s = u; "root" s = -sqrt(max(-u, 0)): with u = -|x - y|^2 minus the distance; "power"
(apart alone, in PyTorch alone) s = -scale log |x - y| + a + b, +inf where the distance is 0: such
pairs have all the weight, alike, and no slope.
Labels equal: positive, else negative (no labels: all negative). Left out: equal ids, different
groups, listed in `exclude`, i == j with skip_self, or outside the window: row i's statistics leave
out s_ij <= low and s_ij >= high, with (positive low, positive high, negative low, negative high) =
x_window[:, i]; y_window says the same for the columns' statistics.

triangle: y is x, only i < j is computed and each pair counts in the rows of both its ends (x_bias
and x_window stand for both sides); half the work where the scores are symmetric.

Backward recomputes the scores that the forward has not kept: G_ij = dz_ij/du_ij (gradient of z_ij
through row i and column j).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.compiled import offered
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import accumulate_dtype, followed, nan_where_infinite, row_dtype
from fused_losses.base.validation import describe
from fused_losses.primitives.kept import keep, kept
from fused_losses.primitives.op import StreamedOp, duals, moves_of, through_backward
from fused_losses.primitives.pairs import bounded, tangents
from fused_losses.primitives.pairs import reference as reference_pairs
from fused_losses.primitives.pairs.inputs import (
    BEFORE,
    REDUCTIONS,
    SCHEMAS,
    SCORES,
    PairInputs,
    PairNeeds,
    sorted_out,
)
from fused_losses.primitives.pairs.keeping import SMALL, kept_scores

# where among PairInputs the tensors stand that may need a gradient, as in PairNeeds
DIFFERENTIABLE = (0, 1, 2, 3, 4)
POWERS = ("bounded", "reference")  # who has "power"
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
    inputs: PairInputs,
    *,
    reduction: str = "lse",
    cols: bool = False,
    room: Room | None = None,
    backend: str | None = None,
) -> tuple[PairStatistics, PairStatistics | None]:
    """One sweep: statistics of the rows, and with cols=True of the columns (module docstring).

    room: bytes of scores that the forward may keep to spare the backward their recomputation, as
    many whole blocks as fit ("cpu" and "bounded"; others keep none); it takes them from the room.

    Differentiable in x, y, scale and (but with apart) the biases. reduction: "lse", "softplus" or
    "relu".
    Raises ValueError or TypeError for inputs that do not fit each other. Time O(N M D), half with
    triangle; memory O((N + M) D) plus a block and what is kept. Second derivatives run on
    the pure-PyTorch path, whichever backend ran the first.
    """
    compiled = offered()
    if compiled is None or not compiled.pairs_fit(inputs):
        compiled = None
        _check(inputs)
    validation.check_choice("reduction", reduction, REDUCTIONS)
    # what fits is on the CPU, where nothing speaks against the best that there is
    plain = compiled is not None and inputs.precision == "fp32" and backends.unasked(backend)
    name = "cpu" if plain else _backend(inputs, backend)
    if compiled is not None and name == "cpu":
        # the same op, with its gradient in C++; whether one is asked for is seen there
        kept = -SMALL if room is None else kept_scores(name, inputs, room)
        of_rows, of_columns = compiled.pair_statistics(inputs, reduction, cols, kept)
        return PairStatistics(*of_rows), PairStatistics(*of_columns) if cols else None
    inputs = marked(inputs)
    if name == "reference":
        rows, columns = reference_pairs.statistics(inputs, reduction, cols)
    else:
        kept = kept_scores(name, inputs, room)
        rows, columns, _ = PAIR_STATISTICS(name, *_flat(inputs), reduction, cols, kept)
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
    name, inputs = _backend(inputs, backend), marked(inputs)
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
    name, plan = _backend(plan, backend), marked(plan)
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
    if p.score == "power":
        name = backends.requested(backend)
        if name not in ("auto", *POWERS):
            raise RuntimeError(
                f"backend={name!r} cannot run powers of distances: its kernels have no logarithm "
                f"of a score; use backend='auto', which takes 'bounded', or one of "
                f"{', '.join(POWERS)}"
            )
        backend = "bounded" if name == "auto" else name
    return backends.choose(backend, p.x.device, p.x.dtype, p.precision, "pairs", p.x.shape[1])[0]


def _check(p: PairInputs) -> None:
    """What kernels rely on; the losses say more of their own arguments."""
    validation.check_matrix("x", p.x, "[N, D]")
    validation.check_matrix("y", p.y, "[M, D]")
    validation.check_meeting(p.x, p.y)
    validation.check_choice("score", p.score, SCORES)
    if p.score == "power" and not p.apart:
        raise ValueError("apart: expected True with score='power', got False")
    for name in ("x_bias", "y_bias") if p.apart else ():
        bias = getattr(p, name)
        if bias is not None and followed(bias):
            raise NotImplementedError(f"{name}: has no gradient with apart, detach it")
    for side, rows in (("x", p.x),) if p.triangle else (("x", p.x), ("y", p.y)):
        n = rows.shape[0]
        for name in ("bias", *PAIRED, "window"):
            field, vector = f"{side}_{name}", getattr(p, f"{side}_{name}")
            if vector is None:
                continue
            shape = (4, n) if name == "window" else (n,)
            if vector.shape != shape:
                raise ValueError(f"{field}: expected shape {shape}, got {describe(vector)}")
            validation.check_device("x", p.x, field, vector)
            if name in PAIRED and vector.dtype != torch.int32:
                raise TypeError(f"{field}: expected int32, got {describe(vector)}")
    for name in () if p.triangle else PAIRED:
        if (getattr(p, f"x_{name}") is None) != (getattr(p, f"y_{name}") is None):
            raise ValueError(f"x_{name}, y_{name}: expected both or neither, got one")


def marked(p: PairInputs) -> PairInputs:
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
    value, total, count, best = statistics.unbind(0)
    return PairStatistics(value, total, count.detach(), best.detach())


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
    told = 0  # how many arguments, the last ones, the forward alone has

    def setup_context(self, ctx: Any, arguments: tuple, output: tuple) -> None:
        keep(ctx, arguments, *output)
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        """Gradients of the forward op's arguments, in their order."""
        arguments, output = kept(ctx)
        at = BEFORE[self.name]
        # of statistics value and total only: the others are counts
        part = slice(2) if self.name == "pair_statistics" else slice(None)
        grads = tuple(
            torch.zeros_like(o[part]) if g is None else g[part].contiguous()
            for g, o in zip(grads[:2], output[:2], strict=True)
        )
        given = arguments[: len(arguments) - self.told]
        needs = [needed[i] for i in range(at)] + [needed[at + i] for i in DIFFERENTIABLE]
        triangle = arguments[at + PairInputs._fields.index("triangle")]
        if triangle:
            needs[at + 1] = needs[at + 4] = False
        out = backward_op(*grads, *output, *given, *needs)
        out = [g if need else None for g, need in zip(out, needs, strict=True)]
        return (*out, *[None] * (len(arguments) - len(out)))

    def tangents(self, direction: str, arguments: tuple, moves: tuple, output: tuple) -> tuple:
        """In one sweep, from the statistics that are known."""
        name = self.name + direction
        at = BEFORE[name]
        moving = {*range(at), *(at + i for i in DIFFERENTIABLE)}
        given = duals(arguments, tuple(t if i in moving else None for i, t in enumerate(moves)))
        if direction:
            return moves_of(self.backward("bounded", *self.without_kept(given)))
        before, p, after = sorted_out(name, given)
        return self.moved(before, p, after, output)

    def without_kept(self, arguments: list[Any]) -> list[Any]:
        """A backward's arguments without scores that do not know their tangents."""
        return arguments

    def moved(self, before: tuple, p: PairInputs, after: tuple, output: tuple) -> tuple:
        """Tangents of the output, that of dual inputs."""
        raise NotImplementedError

    def setup_second(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        keep(ctx, inputs)

    def second(self, ctx: Any, *grads: Tensor | None) -> tuple:
        """The backward op's own derivative, through the pure-PyTorch path, tile by tile."""
        arguments, _ = kept(ctx)
        return through_backward(
            ctx, arguments, grads, lambda given: bounded.differentiable_backward(self.name, given)
        )


class PairStatisticsOp(PairsOp):
    """`pair_statistics` on a backend."""

    name = "pair_statistics"
    schema, backward_schema = SCHEMAS["pair_statistics"], SCHEMAS["pair_statistics_backward"]
    told = 1

    def setup_context(self, ctx: Any, arguments: tuple, output: tuple) -> None:
        super().setup_context(ctx, arguments, output)
        ctx.mark_non_differentiable(output[2])

    def without_kept(self, arguments: list[Any]) -> list[Any]:
        at = BEFORE[self.name + "_backward"] - 1
        return [*arguments[:at], arguments[at].new_empty(0), *arguments[at + 1 :]]

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        _, p, (_, cols, scores) = sorted_out(self.name, arguments)
        new: dict[str, Any] = dict(dtype=row_dtype(p.x.device))
        rows = p.x.new_empty((4, 2, p.x.shape[0]), **new)
        columns = p.x.new_empty((4, 2, p.y.shape[0] if cols else 0), **new)
        return rows, columns, _room_for(p, scores)

    def fake_backward(self, *arguments: Any) -> tuple[Tensor, ...]:
        _, p, (_, _, *needs) = sorted_out(f"{self.name}_backward", arguments)
        return _empty_gradients(p, PairNeeds(*needs))

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        _, p, (reduction, cols, scores) = sorted_out(self.name, arguments)
        kept = _room_for(p, scores)
        more = (kept,) if scores else ()
        return *self.form(backend).statistics(p, reduction, cols, *more), kept

    def moved(self, before: tuple, p: PairInputs, after: tuple, output: tuple) -> tuple:
        (rows, columns, _), (reduction, cols, _) = output, after
        return *tangents.statistics(p, rows, columns, reduction, cols), None

    def backward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        before, p, (reduction, cols, *needs) = sorted_out(f"{self.name}_backward", arguments)
        *given, kept = before
        run = self.form(backend).statistics_backward
        more = dict(kept=kept) if kept.numel() else {}
        return _padded(run(*given, p, reduction, cols, PairNeeds(*needs), **more), p)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        _, p, (_, _, *rest) = sorted_out(self.name + direction, arguments)
        return self.form(backend).workspace(p, PairNeeds(*rest) if direction else None)


def _room_for(p: PairInputs, scores: int) -> Tensor:
    return p.x.new_empty(scores, dtype=accumulate_dtype(p.x.dtype))


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
        # values are columns, too
        needs = needs and needs._replace(y=needs.y or rest[0])
        return self.form(backend).workspace(p, needs, before[-1].shape[1])


PAIR_STATISTICS = PairStatisticsOp()
PAIR_ATTENTION = PairAttentionOp()
PAIR_STATISTICS.define()
PAIR_ATTENTION.define()
