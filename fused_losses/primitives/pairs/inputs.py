"""What a sweep over pairs is given, passed whole between layers (grammar: `op`).

Fields stand in the order of the ops' schema.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_losses.base.sides import Integers

SCORES = ("linear", "root", "power")
REDUCTIONS = ("lse", "softplus", "relu")
POSITIVE, NEGATIVE = 0, 1  # the two classes of pairs, as statistics are indexed
VALUE, TOTAL, COUNT, BEST = range(4)  # the statistics of a class, as they are indexed


class Rule(NamedTuple):
    """How a score s becomes the term z of its class: z = factor (s - center) w.

    w = 1, or with a finite reach max(0, reach + sign(factor) s), a weight that is not
    differentiated (circle loss). factor 0 gives z = 0: the pair counts, its score does not.
    """

    factor: float = 1.0
    center: float = 0.0
    reach: float = float("inf")


class PairInputs(NamedTuple):
    """One call: s_ij = psi(scale <x_i, y_j> + x_bias_i + y_bias_j) and which pairs take part.

    The biases of pairs apart have no gradients.
    """

    x: Tensor  # [N, D]
    y: Tensor  # [M, D], of x's dtype; with triangle: x itself
    scale: Tensor  # [], float64
    x_bias: Tensor | None = None  # [N] in the accumulation dtype
    y_bias: Tensor | None = None  # [M]
    x_labels: Tensor | None = None  # [N] int32; equal labels: a positive pair, else a negative one
    y_labels: Tensor | None = None  # [M] int32; no labels: every pair is negative
    x_ids: Tensor | None = None  # [N] int32; equal ids: the pair is left out
    y_ids: Tensor | None = None  # [M] int32
    x_groups: Tensor | None = None  # [N] int32; different groups: the pair is left out
    y_groups: Tensor | None = None  # [M] int32
    exclude: Tensor | None = None  # [N, E] int32 columns left out, -1: none; not with triangle
    x_window: Tensor | None = None  # [4, N] accumulation dtype, see `pairs`
    y_window: Tensor | None = None  # [4, M]
    score: str = "linear"  # psi: linear u; root -sqrt(max(-u, 0)); power, see `op`
    positive: Rule = Rule()  # a list of floats on its way through an op
    negative: Rule = Rule()
    skip_self: bool = False  # leave out i == j
    triangle: bool = False  # y is x: pairs i < j only, each counted for both of its ends
    apart: bool = False  # -scale |x_i - y_j|^2 for the product (`apart`)
    precision: str = "fp32"

    def known(self, numbers: Integers) -> PairInputs:
        """The same with what is known of both sides."""
        return PairInputs(*self[:5], *numbers, *self[12:])


class PairNeeds(NamedTuple):
    """The gradients that are asked for (y and y_bias never with triangle)."""

    x: bool
    y: bool
    scale: bool
    x_bias: bool
    y_bias: bool


FIELDS = len(PairInputs._fields)
# how many of an op's flat arguments stand before PairInputs
BEFORE = {
    "pair_statistics": 0,
    "pair_statistics_backward": 5,
    "pair_attention": 1,
    "pair_attention_backward": 5,
}


def sorted_out(kind: str, arguments: tuple | list) -> tuple[tuple, PairInputs, tuple]:
    """An op's flat arguments: those before its inputs, the inputs with their rules, those after."""
    at = BEFORE[kind]
    p = PairInputs(*arguments[at : at + FIELDS])
    p = p._replace(positive=Rule(*p.positive), negative=Rule(*p.negative))
    return tuple(arguments[:at]), p, tuple(arguments[at + FIELDS :])


INPUTS = (
    "Tensor x, Tensor y, Tensor scale, Tensor? x_bias, Tensor? y_bias, Tensor? x_labels, "
    "Tensor? y_labels, Tensor? x_ids, Tensor? y_ids, Tensor? x_groups, Tensor? y_groups, "
    "Tensor? exclude, Tensor? x_window, Tensor? y_window, str score, float[] positive, "
    "float[] negative, bool skip_self, bool triangle, bool apart, "
    "str precision"
)

NEEDS = "bool need_x, bool need_y, bool need_scale, bool need_x_bias, bool need_y_bias"

SOME = "Tensor dx, Tensor dy, Tensor dscale, Tensor dx_bias, Tensor dy_bias"

SCHEMAS = {
    "pair_statistics": (
        f"({INPUTS}, str reduction, bool cols, SymInt kept_scores) "
        "-> (Tensor rows, Tensor columns, Tensor kept)"
    ),
    "pair_statistics_backward": (
        "(Tensor grad_rows, Tensor grad_columns, Tensor rows, Tensor columns, Tensor kept, "
        f"{INPUTS}, "
        f"str reduction, bool cols, {NEEDS}) -> ({SOME})"
    ),
    "pair_attention": f"(Tensor values, {INPUTS}, bool positives) -> (Tensor out, Tensor lse)",
    "pair_attention_backward": (
        f"(Tensor grad_out, Tensor grad_lse, Tensor out, Tensor lse, Tensor values, {INPUTS}, "
        f"bool positives, bool need_values, {NEEDS}) -> (Tensor dvalues, {SOME})"
    ),
}
