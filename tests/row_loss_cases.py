"""One table of the losses over rows: a call and its formula, as `pair_cases` has for pairs.

A new loss is one definition and one row here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import row_loss_formulas as f
import torch
from pair_cases import Case, require_pairs
from pair_formulas import batch

from fused_losses.losses import centroids, margin_pairs, neighbours, variance
from fused_losses.losses import ranking as rl
from fused_losses.losses import triplets as tl
from fused_losses.primitives.pairs import bounded as bounded_pairs
from fused_losses.primitives.row_rules import bounded as row_rules_bounded

TOWERS = ("x", "y")
UNIT = {"normalize": True}
REF = lambda t: (t.x, t.labels, t.y, t.y_labels)
ALONE = lambda t: (t.x, t.labels)


def triplets(name: str, make=batch, **options) -> Case:
    """A row of `all_triplets`; options of both, under the call's names."""
    given = {"margin": 0.3} | options
    formula = {"kind" if k == "triplets" else k: v for k, v in given.items()}
    ref = make is f.two_batches
    return Case(
        f"all_triplets_{name}",
        make,
        lambda t, **o: tl.all_triplets(*(REF(t) if ref else ALONE(t)), **given, **o),
        lambda t: f.all_triplets(t, ref=ref, **formula),
        TOWERS if ref else ("x",),
    )


def chosen(name: str, make=batch, **options) -> Case:
    """A row of `batch_hard_triplet`, or with a choice of `batch_easy_hard_triplet`."""
    given = {"margin": 0.3} | options
    loss = tl.batch_easy_hard_triplet if "positive" in given else tl.batch_hard_triplet
    ref = make is f.two_batches
    return Case(
        f"batch_{name}",
        make,
        lambda t, **o: loss(*(REF(t) if ref else ALONE(t)), **given, **o),
        lambda t: f.chosen_triplets(t, ref=ref, **given),
        TOWERS if ref else ("x",),
    )


CONTRASTIVE = {"positive_margin": 0.2, "negative_margin": 1.1}
MARGIN = {"nu": 0.1}
SNR = {"positive_margin": 0.1, "negative_margin": 1.5, "zero_mean_weight": 0.3}
RANKED = {"imbalance": 0.3, "positive_temperature": 1.5, "negative_temperature": 4.0} | UNIT

ROWS = [
    triplets("mean"),
    triplets("none", reduction="none"),
    triplets("sum_crowded", f.crowded, reduction="sum"),
    triplets("hard", triplets="hard"),
    triplets("hard_crowded", f.crowded, triplets="hard"),
    triplets("semihard", triplets="semihard", distance="sqeuclidean", margin=0.8),
    triplets("semihard_crowded", f.crowded, triplets="semihard", reduction="none"),
    triplets("smooth", smooth=True),
    triplets("smooth_hard", smooth=True, triplets="hard"),
    triplets("smooth_easy", smooth=True, triplets="easy"),
    triplets("smooth_semihard", smooth=True, triplets="semihard", margin=0.8),
    triplets("cosine", distance="cosine", **UNIT),
    triplets("ref", f.two_batches),
    Case(
        "harmonic_triplet",
        f.two_batches,
        lambda t, **o: tl.harmonic_triplet(
            t.x, t.labels, t.y, t.y_labels, margin=0.4, distance="sqeuclidean", **o
        ),
        f.harmonic,
    ),
    chosen("hard"),
    chosen("hard_soft", margin=None),
    chosen("hard_none", reduction="none"),
    chosen("hard_cosine", distance="cosine", **UNIT),
    chosen("hard_ref", f.two_batches, distance="sqeuclidean"),
    chosen("easy_semihard", positive="easiest", negative="semihard"),
    chosen("semihard_hard", positive="semihard", negative="hardest"),
    chosen("semihard_easy", positive="semihard", negative="easiest", reduction="sum"),
    chosen("hard_easy_ref", f.two_batches, positive="hardest", negative="easiest"),
    Case(
        "centroid_triplet",
        batch,
        lambda t, **o: centroids.centroid_triplet(*ALONE(t), **o),
        f.centroids,
    ),
    Case(
        "centroid_triplet_of_queries",
        batch,
        lambda t, **o: centroids.centroid_triplet(*ALONE(t), centroid_anchors=False, **o),
        lambda t: f.centroids(t, False),
    ),
    Case(
        "prototype_triplet",
        f.prototypes,
        lambda t, **o: centroids.prototype_triplet(t.x, t.w, t.labels, **o),
        f.prototype_triplets,
        ("x", "w"),
    ),
    Case(
        "contrastive",
        batch,
        lambda t, **o: margin_pairs.contrastive(*ALONE(t), **CONTRASTIVE, **o),
        f.contrastive,
    ),
    Case(
        "contrastive_none",
        batch,
        lambda t, **o: margin_pairs.contrastive(*ALONE(t), **CONTRASTIVE, reduction="none", **o),
        lambda t: f.contrastive(t, reduction="none"),
    ),
    Case(
        "contrastive_ref",
        f.two_batches,
        lambda t, **o: margin_pairs.contrastive(*REF(t), **CONTRASTIVE, reduction="none", **o),
        lambda t: f.contrastive(t, True, "none"),
        TOWERS,
    ),
    *(
        Case(
            f"margin_loss_{beta}_{per}",
            f.bounded_batch,
            lambda t, beta=beta, per=per, **o: margin_pairs.margin_loss(
                *ALONE(t), beta=getattr(t, beta), per=per, **MARGIN, **o
            ),
            lambda t, beta=beta, per=per: f.wu_margin(t, beta, per),
            ("x", beta),
        )
        for beta in ("beta", "class_beta")
        for per in ("pair", "triplet")
    ),
    Case(
        "margin_loss_none",
        f.bounded_batch,
        lambda t, **o: margin_pairs.margin_loss(
            *ALONE(t), beta=t.class_beta, per="triplet", reduction="none", **MARGIN, **o
        ),
        lambda t: f.wu_margin(t, "class_beta", "triplet", "none"),
        ("x", "class_beta"),
    ),
    Case(
        "snr_contrastive",
        batch,
        lambda t, **o: margin_pairs.snr_contrastive(*ALONE(t), **SNR, **o),
        f.snr,
    ),
    Case(
        "snr_contrastive_ref",
        f.two_batches,
        lambda t, **o: margin_pairs.snr_contrastive(*REF(t), **SNR, **o),
        lambda t: f.snr(t, True),
        TOWERS,
    ),
    Case(
        "tuplet_margin",
        batch,
        lambda t, **o: rl.tuplet_margin(*ALONE(t), scale=20, **UNIT, **o),
        f.tuplets,
    ),
    Case(
        "tuplet_margin_ref",
        f.two_batches,
        lambda t, **o: rl.tuplet_margin(*REF(t), scale=20, reduction="none", **UNIT, **o),
        lambda t: f.tuplets(t, True, "none"),
        TOWERS,
    ),
    Case("angular", batch, lambda t, **o: rl.angular(*ALONE(t), **UNIT, **o), f.angular),
    Case(
        "angular_none",
        batch,
        lambda t, **o: rl.angular(*ALONE(t), reduction="none", **UNIT, **o),
        lambda t: f.angular(t, "none"),
    ),
    Case(
        "ranked_list", batch, lambda t, **o: rl.ranked_list(*ALONE(t), **RANKED, **o), f.ranked_list
    ),
    Case(
        "fast_ap",
        batch,
        lambda t, **o: rl.fast_ap(*ALONE(t), bins=8, **UNIT, **o),
        f.average_precision,
    ),
    Case(
        "fast_ap_ref",
        f.two_batches,
        lambda t, **o: rl.fast_ap(*REF(t), bins=8, **UNIT, **o),
        lambda t: f.average_precision(t, True),
        TOWERS,
    ),
    Case(
        "histogram",
        batch,
        lambda t, **o: rl.histogram(*ALONE(t), bins=12, **UNIT, **o),
        f.histogram,
    ),
    Case(
        "intra_pair_variance",
        batch,
        lambda t, **o: variance.intra_pair_variance(
            *ALONE(t), positive_eps=0.05, negative_eps=0.03, **UNIT, **o
        ),
        f.intra_pair_variance,
    ),
    Case(
        "icnn", batch, lambda t, **o: neighbours.icnn(*ALONE(t), neighbors=3, window=5, **o), f.icnn
    ),
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
    monkeypatch.setattr(bounded_pairs, "BLOCK_ROWS", 8)
    monkeypatch.setattr(bounded_pairs, "BLOCK_BYTES", 8 * 16 * 4)
    yield
