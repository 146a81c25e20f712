"""Draws of hard data: a call of a loss or similarity, and how far its results may be off.

The bound of each result is what roundings do at its very inputs: `fused_losses.base.disturbance`
under the literal formula, which shares no code with the package. docs/reliability.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pair_cases
import row_loss_cases
import torch
from class_pair_draws import MORE
from conftest import BACKENDS
from hard_data import KINDS, LABELS
from pair_cases import Case, Inputs, outcome
from torch import Tensor

from fused_losses import backends
from fused_losses.base.disturbance import SURE, distance, movement, rounded_once
from fused_losses.base.numerics import ROUNDOFF, accumulate_dtype

TABLES = (*pair_cases.LOSSES, *pair_cases.SIMILARITIES, *row_loss_cases.ROWS, *MORE)
CASES = {case.name: case for case in TABLES}


@dataclass(frozen=True)
class Draw:
    """One call."""

    shape: tuple[int, int, int]
    kind: str
    labels: str
    dtype: torch.dtype
    backend: str
    seed: int


# where a promise ends, and why: these draws are not judged
LIMITS: dict[str, tuple[str, ...]] = {
    # float32 loses softplus(-100), and with it a triplet that the mean would count
    "all_triplets_smooth": ("clusters",),
    "all_triplets_smooth_hard": ("clusters",),
    "all_triplets_smooth_easy": ("clusters",),
    # costs of 1e6 over eps of 0.1: the exponents' own rounding is above 1
    "sinkhorn_dot": ("far", "clusters", "outlier"),
    # which of equal neighbours are nearest is open
    "icnn": ("integers", "constant", "duplicates", "sparse"),
    # the hats of a histogram have no slope of their own where a value stands on a node
    "fast_ap": ("integers", "duplicates", "constant"),
    "fast_ap_ref": ("integers", "duplicates", "constant"),
    "histogram": ("integers", "duplicates", "constant"),
    # products of two rows are held in their dtype
    "trilinear_attention": ("outlier", "far", "clusters"),
    # which of a document's equal tokens gets the gradient is open, and which of equal neighbours
    **dict.fromkeys(
        ("maxsim_padded", "pairwise_topk_euclidean", "pairwise_topk_dot", "pairwise_topk_cosine"),
        ("integers", "constant", "duplicates", "sparse"),
    ),
    # which of equal prototypes is the nearest is open
    "prototype_triplet": ("integers", "constant", "duplicates"),
}
# 1 - cos, and sums of means near 1 that cancel: the error is of absolute size, in roundings of 1
CANCEL = {
    "pairwise_cosine": 64.0,
    "pairwise_topk_cosine": 64.0,
    "hsic": 64.0,
    "cauchy_schwarz_qmi": 256.0,
    "cauchy_schwarz_divergence": 256.0,
}

SIDE = st.sampled_from([1, 2, 3, 5, 7, 13, 16, 17, 29, 33])
WIDTH = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 33, 65])
DRAWS = st.builds(
    Draw,
    shape=st.tuples(SIDE, SIDE, WIDTH),
    kind=st.sampled_from(sorted(KINDS)),
    labels=st.sampled_from(sorted(LABELS)),
    dtype=st.sampled_from(
        [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]
    ),
    backend=st.sampled_from(BACKENDS),
    seed=st.integers(0, 2**31),
)


def inputs(case: Case, draw: Draw) -> Inputs:
    """The case's inputs with hard rows, in float64, of values that the drawn dtype has."""
    with torch.random.fork_rng():
        torch.manual_seed(draw.seed)
        made = vars(case.make(*draw.shape))
    generator = torch.Generator().manual_seed(draw.seed)
    for name, value in made.items():
        if not value.is_floating_point():
            continue
        value = value.double()
        if value.dim() > 1:
            value = KINDS[draw.kind](value, generator)
        made[name] = value.to(draw.dtype).double()
    if set(made) == {"x", "labels", "temperature"}:  # one labelled batch
        made["labels"] = LABELS[draw.labels](made["labels"])
    return Inputs(**made)


def leaves_in(case: Case, t: Inputs, dtype: torch.dtype) -> Inputs:
    return pair_cases.in_dtype(case, t, dtype)


def excess(case: Case, draw: Draw) -> tuple[float, list[tuple[str, float, float]]]:
    """The largest error in shares of its bound; and of each result error and bound."""
    exact = inputs(case, draw)
    right = lambda: outcome(case, leaves_in(case, exact, torch.float64), case.formula)
    truth = right()
    moved = movement(right, truth, draw.dtype, draw.shape[2])
    t = leaves_in(case, exact, draw.dtype)
    stored: list[Tensor] = []

    def called(t: Inputs) -> Tensor:
        stored.append(case.call(t, backend=draw.backend))
        return stored[0]

    got = outcome(case, t, called)
    stored += [getattr(t, name) for name in case.leaves]
    if any(
        float(w.abs().max()) > torch.finfo(s.dtype).max for w, s in zip(truth, stored, strict=True)
    ):
        return 0.0, []  # no number of that dtype is right
    # what is moved about its mean is rounded as itself
    slope = max(1.0, *(float(getattr(exact, name).abs().max()) for name in case.leaves))
    found = []
    for name, g, w, move, like in zip(
        ("value", *case.leaves), got, truth, moved, stored, strict=True
    ):
        # stored by the op, and once more on its way to a leaf
        bound = SURE * move + 2 * rounded_once(like, float(w.norm()))
        bound += CANCEL.get(case.name, 0) * ROUNDOFF[accumulate_dtype(draw.dtype)] * slope
        found.append((name, distance(g, w), bound))
    return max(e / max(b, 1e-300) if e else 0.0 for _, e, b in found), found


def refused(case: Case, draw: Draw) -> bool:
    if draw.kind in LIMITS.get(case.name, ()):
        return True
    if draw.dtype == torch.float16 and draw.kind in ("far", "clusters", "outlier"):
        return True  # their products are beyond its range
    if draw.backend == "reference":
        # materialised in the dtype of its rows
        return draw.dtype in (torch.bfloat16, torch.float16)
    return bool(backends.reasons_against(draw.backend, torch.device("cpu"), draw.dtype, "fp32"))
