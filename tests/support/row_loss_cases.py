"""One table of the losses over rows: an example and its formula, as `pair_cases` has for pairs.

A new loss is one definition with its examples, and one row here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import ranked_formulas as g
import row_loss_formulas as f
import torch
from centroid_formulas import centroids
from pair_cases import Case, case, require_pairs
from pair_rows import batch

from fused_losses.primitives.pairs import blocks as pair_blocks
from fused_losses.primitives.row_rules import bounded as row_rules_bounded

TOWERS = ("x", "y")


def triplets(example: str = "", make=batch, name: str = "", **formula) -> Case:
    """A row of `all_triplets`; options of its formula."""
    formula = {"margin": 0.3} | formula
    ref = make is f.two_batches
    return case(
        f"all_triplets, {example}" if example else "all_triplets",
        make,
        lambda t: f.all_triplets(t, ref=ref, **formula),
        TOWERS if ref else ("x",),
        name=name,
    )


def chosen(example: str, name: str, make=batch, **formula) -> Case:
    """A row of `batch_hard_triplet` or `batch_easy_hard_triplet`; options of its formula."""
    formula = {"margin": 0.3} | formula
    ref = make is f.two_batches
    return case(
        example,
        make,
        lambda t: f.chosen_triplets(t, ref=ref, **formula),
        TOWERS if ref else ("x",),
        name=name,
    )


SEMIHARD = {"kind": "semihard", "margin": 0.8}
UNIT = {"distance": "cosine", "normalize": True}
HARD, EASY = "batch_hard_triplet", "batch_easy_hard_triplet"

ROWS = [
    triplets(name="all_triplets_mean"),
    triplets("none", reduction="none"),
    triplets("sum", f.crowded, "all_triplets_sum_crowded", reduction="sum"),
    triplets("hard", kind="hard"),
    triplets("hard", f.crowded, "all_triplets_hard_crowded", kind="hard"),
    triplets("semihard", distance="sqeuclidean", **SEMIHARD),
    triplets(
        "semihard, none",
        f.crowded,
        "all_triplets_semihard_crowded",
        kind="semihard",
        reduction="none",
    ),
    triplets("smooth", smooth=True),
    triplets("smooth, hard", smooth=True, kind="hard"),
    triplets("smooth, easy", smooth=True, kind="easy"),
    triplets("smooth, semihard", smooth=True, **SEMIHARD),
    triplets("cosine", **UNIT),
    triplets("ref", f.two_batches),
    case("harmonic_triplet", f.two_batches, f.harmonic),
    chosen(HARD, "batch_hard"),
    chosen(f"{HARD}, soft", "batch_hard_soft", margin=None),
    chosen(f"{HARD}, none", "batch_hard_none", reduction="none"),
    chosen(f"{HARD}, cosine", "batch_hard_cosine", **UNIT),
    chosen(f"{HARD}, ref", "batch_hard_ref", f.two_batches, distance="sqeuclidean"),
    chosen(EASY, "batch_easy_semihard", positive="easiest", negative="semihard"),
    chosen(
        f"{EASY}, semihard, hard", "batch_semihard_hard", positive="semihard", negative="hardest"
    ),
    chosen(
        f"{EASY}, semihard, easy",
        "batch_semihard_easy",
        positive="semihard",
        negative="easiest",
        reduction="sum",
    ),
    chosen(
        f"{EASY}, ref",
        "batch_hard_easy_ref",
        f.two_batches,
        positive="hardest",
        negative="easiest",
    ),
    case("centroid_triplet", batch, centroids),
    case("centroid_triplet, of queries", batch, lambda t: centroids(t, False)),
    case("prototype_triplet", f.prototypes, f.prototype_triplets, ("x", "w")),
    case("contrastive", batch, f.contrastive),
    case("contrastive, none", batch, lambda t: f.contrastive(t, reduction="none")),
    case("contrastive, ref", f.two_batches, lambda t: f.contrastive(t, True, "none"), TOWERS),
    *(
        case(
            f"margin_loss, {beta.replace('_', ' ')}, {per}",
            f.bounded_batch,
            lambda t, beta=beta, per=per: f.wu_margin(t, beta, per),
            ("x", beta),
        )
        for beta in ("beta", "class_beta")
        for per in ("pair", "triplet")
    ),
    case(
        "margin_loss, none",
        f.bounded_batch,
        lambda t: f.wu_margin(t, "class_beta", "triplet", "none"),
        ("x", "class_beta"),
    ),
    case("threshold_consistent_margin", batch, f.threshold_consistent),
    case("snr_contrastive", batch, f.snr),
    case("snr_contrastive, ref", f.two_batches, lambda t: f.snr(t, True), TOWERS),
    case("tuplet_margin", batch, f.tuplets),
    case("tuplet_margin, ref", f.two_batches, lambda t: f.tuplets(t, True, "none"), TOWERS),
    case("angular", batch, f.angular),
    case("angular, none", batch, lambda t: f.angular(t, "none")),
    case("ranked_list", batch, f.ranked_list),
    case("fast_ap", batch, f.average_precision),
    case("fast_ap, ref", f.two_batches, lambda t: f.average_precision(t, True), TOWERS),
    case("histogram", batch, f.histogram),
    case("intra_pair_variance", batch, f.intra_pair_variance),
    case("icnn", batch, f.icnn),
    case("all_triplets, swap", f.two_batches, g.swapped, TOWERS),
    case("angular, ref", f.two_batches, lambda t: g.angular(t, False), TOWERS),
    case("ranked_list, ref", f.two_batches, g.ranked_list, TOWERS),
    case("histogram, ref", f.two_batches, lambda t: g.histogram(t, False), TOWERS),
    case("centroid_triplet, ref", f.two_batches, g.centroids, TOWERS),
    case("icnn, ref", f.two_batches, g.icnn, TOWERS),
    case("semihard_triplet", batch, g.semihard),
    case(
        "semihard_triplet, no fallback", batch, lambda t: g.semihard(t, margin=0.4, fallback=False)
    ),
    case("semihard_triplet, ref", f.two_batches, lambda t: g.semihard(t, True), TOWERS),
    case("smooth_ap", batch, g.smooth_ap),
    case("smooth_ap, others", batch, lambda t: g.smooth_ap(t, count_self=False)),
    case("smooth_ap, ref", f.two_batches, lambda t: g.smooth_ap(t, True), TOWERS),
    case("smooth_ap, listed", batch, lambda t: g.smooth_ap(t, weighted=True)),
    *(case(f"pnp, {v}", batch, lambda t, v=v: g.pnp(t, v)) for v in g.MADE),
    case("pnp, ref", f.two_batches, lambda t: g.pnp(t, "O", True), TOWERS),
]
BY_NAME = {case.name: case for case in ROWS}
BACKENDS = ("reference", "bounded", "cpu")  # that take float64


def require_rows(name: str) -> str:
    """The backend's name; skips where it has no kernel for the scores of a row."""
    name = require_pairs(name)
    op = f"fused_losses::distance_matrix_{name}"
    if name == "cpu" and not torch._C._dispatch_has_kernel_for_dispatch_key(op, "CPU"):
        why = "this build has no C++ kernels for distances"
        if os.environ.get("FUSED_LOSSES_REQUIRE_CPU") == "1":
            pytest.fail(why)
        pytest.skip(why)
    return name


@contextmanager
def small_row_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several ragged blocks also at these sizes."""
    monkeypatch.setattr(row_rules_bounded, "BLOCK_BYTES", 5 * 29 * 8)
    monkeypatch.setattr(pair_blocks, "BLOCK_ROWS", 8)
    monkeypatch.setattr(pair_blocks, "BLOCK_BYTES", 8 * 16 * 4)
    yield
