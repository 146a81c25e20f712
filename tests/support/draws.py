"""Draws of hard data: calls of a loss or similarity, and how far their results may be off.

A draw makes inputs; every backend is called with them, in several layouts and precisions. The bound
of each result is what roundings do at these very inputs: `fused_losses.base.disturbance` under the
literal formula, which shares no code with the package. docs/reliability.md.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import binary_draws
import chosen_draws
import class_batch_draws
import class_loss_draws
import class_option_draws
import hypothesis.strategies as st
import leanvec_draws
import listed_draws
import margin_draws
import margin_option_draws
import metric_draws
import muvera_draws
import narrow_sums
import option_draws
import pair_cases
import pair_option_draws
import ranked_draws
import row_loss_cases
import row_option_draws
import segment_draws
import set_draws
import torch
import trilinear_draws
from class_pair_draws import MORE
from conftest import BACKENDS
from hard_data import ALIGNED, KINDS, LABELS, aligned
from layouts import LAYOUTS, relaid
from pair_cases import Case, Inputs, outcome
from torch import Tensor

from fused_losses.backends import reasons_against
from fused_losses.base.disturbance import LOWERED, Movement, distance, rounded_once
from fused_losses.base.numerics import ROUNDOFF, accumulate_dtype

TABLES = (
    *pair_cases.LOSSES,
    *pair_cases.SIMILARITIES,
    *row_loss_cases.ROWS,
    *MORE,
    *margin_draws.DRAWN,
    *class_batch_draws.DRAWN,
    *class_loss_draws.DRAWN,
    *metric_draws.DRAWN,
    *option_draws.DRAWN,
    *class_option_draws.DRAWN,
    *margin_option_draws.DRAWN,
    *row_option_draws.DRAWN,
    *pair_option_draws.DRAWN,
    *segment_draws.DRAWN,
    *listed_draws.DRAWN,
    *ranked_draws.DRAWN,
    *set_draws.DRAWN,
    *muvera_draws.DRAWN,
    *leanvec_draws.DRAWN,
    *binary_draws.DRAWN,
    *trilinear_draws.DRAWN,
    *chosen_draws.DRAWN,
)
CASES = {case.name: case for case in TABLES}


@dataclass(frozen=True)
class Draw:
    """What the inputs are made from."""

    shape: tuple[int, int, int]
    kind: str
    labels: str
    dtype: torch.dtype
    seed: int


BUDGET = 1 << 16


class Call(NamedTuple):
    """One way to call a function with them."""

    backend: str
    layout: str = "contiguous"
    precision: str = "fp32"
    budget: int = 0  # bytes of scores that the forward may keep


class Verdict(NamedTuple):
    """Of a call's value and of each gradient: name, error and bound."""

    call: Call
    found: list[tuple[str, float, float]]

    @property
    def share(self) -> float:
        """The largest error in shares of its bound."""
        return max((e / max(b, 1e-300) if e else 0.0 for _, e, b in self.found), default=0.0)


# what is made hard: all rows, and none of the numbers that must be above 0
ROWS = frozenset(
    "x y z w v other few few_values first_bank second_bank negatives teacher teacher_w".split()
)
# where a promise ends, and why: these draws are not judged
LIMITS: dict[str, tuple[str, ...]] = {
    # which of equal neighbours are nearest is open
    "icnn": (
        *("integers", "constant", "duplicates", "sparse", "near duplicates", "unit clusters"),
    ),
    "icnn_ref": (
        *("integers", "constant", "duplicates", "sparse", "near duplicates", "unit clusters"),
    ),
    # on which side of its positive an equal negative falls
    **dict.fromkeys(
        (name for name in CASES if name.startswith("semihard_triplet")),
        ("integers", "constant", "duplicates", "sparse"),
    ),
    "batch_easy_hard_triplet_mined": ("integers", "constant", "duplicates", "sparse"),
    **dict.fromkeys(
        ("histogram_ref", "histogram_mined"), ("integers", "duplicates", "constant", "sparse")
    ),
    # the slope of |.| where all cosines are 0
    **dict.fromkeys(("one_label_ALDR", "one_label_MappedLDR_l1"), ("sparse",)),
    # the hats of a histogram have no slope of their own where a value stands on a node
    "histogram": ("integers", "duplicates", "constant", "sparse"),
    # which of a document's equal tokens gets the gradient is open
    **dict.fromkeys(("maxsim_padded", "maxsim_masked", "maxsim_ragged"), ("integers", "sparse")),
    # equal values of rows that are not: which is rounded to the larger, or a formula's first
    **dict.fromkeys(
        (name for name in CASES if name.startswith("pairwise_topk_")),
        ("integers", "constant", "duplicates", "sparse"),
    ),
    "pairwise_topk_euclidean": (),
    "pairwise_topk_dot": (),
    "pairwise_topk_cosine": ("integers", "sparse"),
    # which of a class's equal centres gets the gradient is open; a row of zeros is equal to many
    **dict.fromkeys(
        (name for name in CASES if name.startswith("class_loss_")),
        ("integers", "constant", "duplicates", "sparse", "clusters"),
    ),
    **dict.fromkeys(
        (
            f"class_loss_{name}"
            for name in margin_draws.CLASS_LOSSES
            if name not in margin_draws.PROBABILITY
        ),
        ("integers", "sparse"),
    ),
    # at which of equal scores a hinge opens, and which of equal best classes gets the gradient
    **dict.fromkeys(
        ("one_label_CrammerSinger", "one_label_WestonWatkins"),
        ("integers", "constant", "duplicates", "sparse", "clusters"),
    ),
    # which of negatives that differ by a rounding are the hardest
    **dict.fromkeys(
        (name for name in CASES if name.startswith(("info_nce_share", "hard_contrastive"))),
        ("integers", "constant", "duplicates", "sparse", "near duplicates", "unit clusters"),
    ),
    # the logarithm of a distance of 0
    "class_aware_alignment_none": ("integers", "constant", "duplicates", "sparse"),
    # on which side of a threshold a tie falls
    **dict.fromkeys(
        (name for name in CASES if "triplets" in name and "semi" in name),
        ("integers", "constant", "duplicates"),
    ),
    **dict.fromkeys(
        ("all_triplets_semihard", "all_triplets_semihard_crowded", "all_triplets_smooth_semihard"),
        (),
    ),
    # which of equal prototypes is the nearest is open
    **dict.fromkeys(
        (name for name in CASES if name.startswith("prototype_triplet")),
        ("integers", "constant", "duplicates"),
    ),
    "prototype_triplet": ("constant",),
}
# numbers whose gradient `cpu` reads off dx, sum <x, dx> over them: what dx is off, they are with it
READ_OFF = ("temperature", "scale")
# with narrowed products: a score that passes a threshold is another loss
CHOSEN = ("info_nce_false_negatives", "info_nce_share", "hard_contrastive")
# nor where a row has one column: its weight is 1, its slope what two products leave
ALONE = ("attention_cosine_same", "attention_rbf_different")
# and scores of so many products are rounded by more than 1, or sums near 1 leave noise
VAST = ("clusters", "far", "outlier", "large")
# whose slope at an angle near 0 no rounded cosine has: 16-bit products read rows beside targets
# that are exact, where the moved formula has neither
STEEP = ("margin_ArcFace", "margin_ElasticArcFace", "margin_MVSoftmax_arc")
# 1 - cos, and sums of means near 1 that cancel: the error is of absolute size, in roundings of 1
CANCEL = {
    "pairwise_cosine": 64.0,
    "pairwise_weighted_cosine": 64.0,
    "pairwise_topk_cosine": 64.0,
    "sinkhorn_cosine": 64.0,
    "sinkhorn_unbalanced": 64.0,
    "sinkhorn_divergence": 64.0,
    "sinkhorn_divergence_masses": 64.0,
    "sinkhorn_divergence_unbalanced": 64.0,
    "hsic": 64.0,
    "cauchy_schwarz_qmi": 256.0,
    "cauchy_schwarz_divergence": 256.0,
}

SIDES = (1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 29, 31, 32, 33)
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 65)
DTYPES = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
KIND_NAMES, LABEL_NAMES = sorted([*KINDS, *ALIGNED]), sorted(LABELS)
DRAWS = st.builds(
    Draw,
    shape=st.tuples(*map(st.sampled_from, (SIDES, SIDES, WIDTHS))),
    kind=st.sampled_from(KIND_NAMES),
    labels=st.sampled_from(LABEL_NAMES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)


def any_draw(choice: random.Random) -> Draw:
    shape = choice.choice(SIDES), choice.choice(SIDES), choice.choice(WIDTHS)
    kind, labels = choice.choice(KIND_NAMES), choice.choice(LABEL_NAMES)
    return Draw(shape, kind, labels, choice.choice(DTYPES), choice.randrange(2**31))


def inputs(case: Case, draw: Draw) -> Inputs:
    """The case's inputs with hard rows, in float64, of values that the drawn dtype has."""
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(draw.seed)
        made = vars(case.make(*draw.shape))
    generator = torch.Generator().manual_seed(draw.seed)
    if set(made) == {"x", "labels", "temperature"}:  # one labelled batch
        made["labels"] = LABELS[draw.labels](made["labels"])
    for name, value in made.items():
        if not value.is_floating_point():
            continue
        value = value.double()
        if value.dim() > 1 and draw.kind in KINDS and name in ROWS:
            value = KINDS[draw.kind](value, generator)
        elif draw.kind in ALIGNED:
            value = aligned(name, value, made, ALIGNED[draw.kind], draw.seed)
        made[name] = value.to(draw.dtype).double()
    return Inputs(**made)


@lru_cache(maxsize=512)
def takes(case: Case, option: str) -> bool:
    return case.function is not None and option in inspect.signature(case.function).parameters


def calls(case: Case, draw: Draw, backends: tuple[str, ...] = BACKENDS) -> list[Call]:
    """On each backend the plain call, and one in another layout; in a narrower precision one.

    The second keeps scores of its forward, where it can.
    """
    choice = random.Random(draw.seed)
    found = []
    for backend in backends:
        budget = BUDGET if takes(case, "memory_budget") else 0
        found += [Call(backend), Call(backend, choice.choice(LAYOUTS), budget=budget)]
        # in one dimension a direction is 1 or -1, without a slope: what is left is rounding alone
        narrow = takes(case, "precision") and not case.name.startswith((*CHOSEN, *ALONE))
        # nor of one key, or of equal ones: the weights' slopes cancel
        alike = draw.shape[1] == 1 or draw.kind == "constant"
        narrow = narrow and not ("attention" in case.name and alike)
        narrow = narrow and draw.kind not in VAST and case.name not in CANCEL
        if narrow and backend in ("cpu", "cuda", "triton") and draw.shape[2] > 1:
            found.append(Call(backend, precision=choice.choice(["tf32", "mixed", "bf16"])))
    steep = case.name.startswith(STEEP) and draw.kind in VAST and draw.dtype.itemsize == 2
    found = [call for call in found if not (steep and call.backend in ("cuda", "triton"))]
    # of 16-bit rows Triton's products narrow the weights, too
    if "attention" in case.name and draw.kind == "constant" and draw.dtype.itemsize == 2:
        found = [call for call in found if call.backend != "triton"]
    return [call for call in found if not _refused(call, draw)]


def _refused(call: Call, draw: Draw) -> bool:
    if call.backend == "reference":
        # materialised in the dtype of its rows
        return draw.dtype in (torch.bfloat16, torch.float16)
    device = torch.device("cpu")
    return bool(reasons_against(call.backend, device, draw.dtype, call.precision))


def chooses(backend: str, draw: Draw) -> bool:
    """Whether a backend takes rows of this dtype."""
    return not reasons_against(backend, torch.device("cpu"), draw.dtype, "fp32")


def answered(
    case: Case, exact: Inputs, draw: Draw, call: Call
) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients in float64; and what holds them: the value as it came, the leaves."""
    t = pair_cases.in_dtype(case, exact, draw.dtype)
    relaid(t, case.leaves, call.layout)
    stored: list[Tensor] = []

    def called(t: Inputs) -> Tensor:
        options: dict[str, Any] = {}
        options |= {"precision": call.precision} if call.precision != "fp32" else {}
        options |= {"memory_budget": call.budget} if call.budget else {}
        stored.append(case.call(t, backend=call.backend, **options))
        return stored[0]

    got = outcome(case, t, called)
    return got, [stored[0], *(getattr(t, name) for name in case.leaves)]


def judge(case: Case, draw: Draw, which: list[Call] | None = None) -> Iterator[Verdict]:
    """Each call's results against the truth; nothing where no number of the dtype is right."""
    exact = inputs(case, draw)
    right = lambda: outcome(case, pair_cases.in_dtype(case, exact, torch.float64), case.formula)
    truth = right()
    moved = lru_cache(
        lambda lowered: Movement(right, truth, draw.dtype, draw.shape[2], lowered=lowered)
    )
    # what is moved about its mean is rounded as itself
    slope = max(1.0, *(float(getattr(exact, name).abs().max()) for name in case.leaves))
    spare = CANCEL.get(case.name, 0) * ROUNDOFF[accumulate_dtype(draw.dtype)] * slope
    for call in calls(case, draw) if which is None else which:
        got, stored = answered(case, exact, draw, call)
        if any(
            _size(w, torch.inf) > torch.finfo(s.dtype).max
            for w, s in zip(truth, stored, strict=True)
        ):
            continue
        errors = [distance(g, w) for g, w in zip(got, truth, strict=True)]
        # stored by the op, and once more on its way to a leaf
        spares = [
            2 * rounded_once(like, _size(w)) + spare for w, like in zip(truth, stored, strict=True)
        ]
        if case.name == "sinkhorn_dot":
            # a streamed logsumexp is rounded at its own size, and its row's mass with it
            top = float((exact.x @ exact.y.T).abs().max()) / 0.5
            masses = 2 * ROUNDOFF[torch.float64] * top
            spares = [s + masses * _size(w) for s, w in zip(spares, truth, strict=True)]
        leaf, more = narrow_sums.spare(
            case.name, call.backend, call.precision, draw.dtype, exact, truth[0]
        )
        if leaf:
            spares[1 + case.leaves.index(leaf)] += more
        if call.backend == "cpu" and call.precision != "fp32":
            off = sum(
                e * _size(getattr(exact, name))
                for e, name in zip(errors[1:], case.leaves, strict=True)
                if name in ROWS
            )
            for at, name in enumerate(case.leaves, 1):
                spares[at] += off / float(getattr(exact, name)) if name in READ_OFF else 0.0
        bounds = moved(LOWERED[call.precision]).bounds(errors, spares)
        if call.precision == "mixed":  # the value is exact
            bounds[0] = moved(0.0).bounds(errors[:1] + [0.0] * len(case.leaves), spares)[0]
        yield Verdict(call, list(zip(("value", *case.leaves), errors, bounds, strict=True)))


def _size(t: Tensor, order: float = 2.0) -> float:
    """The norm of what is finite."""
    return float(torch.linalg.vector_norm(t.nan_to_num(0, 0, 0), order)) if t.numel() else 0.0


def unjudged(case: Case, draw: Draw) -> bool:
    if draw.kind in LIMITS.get(case.name, ()):
        return True
    # of one coordinate directions are equal, and which of a document's equal tokens wins is open
    if case.name.startswith("maxsim_") and draw.shape[2] == 1 and draw.kind == "unit clusters":
        return True
    # which of many equal coordinates is the largest is open: 16 bits make them equal
    if "chebyshev" in case.name and draw.kind == "clusters" and draw.dtype.itemsize == 2:
        return True
    # their products are beyond its range, and a scale of 10,000 makes it of long rows
    scaled = case.name == "adaptive_margin_softmax_eval"
    beyond = ("far", "clusters", "outlier", *(("large",) * scaled))
    return draw.dtype == torch.float16 and draw.kind in beyond
