"""InfoNCE whose scores pass a gate of channels, one for each two classes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.integers import count_up
from fused_losses.base.numerics import accumulate_dtype, no_autocast, recomputed, reduced, row_dtype
from fused_losses.base.scalars import inverse
from fused_losses.base.sides import sides
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_class_ids, check_integers
from fused_losses.functions.pair_sums import PairSums
from fused_losses.primitives.opaque import OpaqueOp
from fused_losses.primitives.pairs.inputs import NEGATIVE, POSITIVE, PairInputs
from fused_losses.primitives.pairs.op import pair_statistics


def gated_contrastive(
    query: Tensor,  # [N, D]
    key: Tensor,  # [M, D]
    gates: Tensor,  # [A, B, D]
    labels: Tensor,  # [N]
    key_labels: Tensor,  # [M]
    *,
    temperature: float | Tensor = 0.07,
    normalize: bool = True,
    reduction: str = "mean",
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE in the channels that a query's class and a key's class open to each other.

        z_ij = sum_k g_abk q_ik k_jk / temperature,   a = labels_i, b = key_labels_j
        loss_i = log sum_j e^z_ij - z_ii

    Args:
        query, key: [N, D], [M, D]; key i is query i's. gates: [A, B, D], of each two classes.
        labels, key_labels: classes in [0, A) and [0, B).
        temperature: > 0; a float or a scalar tensor, which may need a gradient.
        normalize: divide rows by their norms, before the gates. reduction: "mean", "sum" or "none".

    Returns float32 (float64 for float64 inputs). Raises ValueError, TypeError, IndexError for bad
    arguments. The host reads how many queries a class has. Time O((N + A) M D), a sweep for each
    class of the queries; memory O((N + M) D), and the gates'. Paper: Wu et al., Rethinking Positive
    Pairs in Contrastive Learning, 2024.
    """
    both = sides(query, key, precision, names=("query", "key"), offset=0)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)
    if not isinstance(gates, Tensor) or not gates.is_floating_point():
        raise TypeError("gates: expected a floating point tensor [A, B, D]")
    if gates.dim() != 3 or gates.shape[2] != query.shape[1]:
        raise ValueError(
            f"gates: expected shape [A, B, {query.shape[1]}], got {validation.describe(gates)}"
        )
    validation.check_device("query", query, "gates", gates)
    for name, told, rows, classes in (
        ("labels", labels, query, gates.shape[0]),
        ("key_labels", key_labels, key, gates.shape[1]),
    ):
        check_integers(name, told, (rows.shape[0],), query)
        check_class_ids(name, told, classes)
    scale = inverse("temperature", temperature, query)
    with no_autocast(query.device):
        dtype = accumulate_dtype(both.x.dtype)
        x, y = both.x.to(dtype), both.y.to(dtype)
        x, y = (unit(x), unit(y)) if normalize else (x, y)
        given = labels.long(), key_labels.long(), scale, precision, backends.requested(backend)
        found = _GATED(x, y, gates.to(dtype), *given)
        return reduced(*PairSums.of(found).loss(), reduction, dtype)


def _gated(
    x: Tensor,
    y: Tensor,
    gates: Tensor,
    labels: Tensor,
    key_labels: Tensor,
    scale: Tensor,
    precision: str,
    backend: str,
) -> Tensor:
    """A row's logsumexp and count of its positive, then of its negatives. [N, 4]"""
    ordered, order = labels.sort(stable=True)
    ends = torch.searchsorted(ordered, count_up(gates.shape[0] + 1, x).long()).tolist()
    # a zero that knows all, for a batch without rows
    found = [(x[:0] * 0).sum(dim=1)[:, None].expand(0, 4).to(row_dtype(x.device))]
    # each gate's gradient goes to its own place: not to a copy of all
    for of_class, (start, end) in zip(gates.unbind(), pairwise(ends), strict=True):
        if start < end:
            rows = order[start:end]
            given = key_labels, rows, scale, precision, backend
            found.append(recomputed(_of_class, x[rows], y, of_class, *given))
    return torch.cat(found).index_select(0, order.argsort())


def _of_class(
    x: Tensor,
    y: Tensor,
    gates: Tensor,
    key_labels: Tensor,
    rows: Tensor,
    scale: Tensor,
    precision: str,
    backend: str,
) -> Tensor:
    """The same of the queries of one class, whose gates the keys pass. [n, 4]"""
    passed = (y * gates.index_select(0, key_labels)).contiguous()
    inputs = PairInputs(
        x.contiguous(), passed, scale, x_labels=rows.int(), y_labels=count_up(y.shape[0], y),
        precision=precision,
    )  # fmt: skip
    found, _ = pair_statistics(inputs, backend=backend)
    return torch.stack(
        [
            found.value[POSITIVE],
            found.count[POSITIVE],
            found.value[NEGATIVE],
            found.count[NEGATIVE],
        ],
        dim=1,
    )


_GATED = OpaqueOp(
    "gated_pairs",
    "(Tensor x, Tensor y, Tensor gates, Tensor labels, Tensor key_labels, Tensor scale, "
    "str precision, str backend)",
    _gated,
    lambda x, *_: x.new_empty((x.shape[0], 4), dtype=row_dtype(x.device)),
)


examples(
    gated_contrastive,
    lambda f, t: f(t.x, t.y, t.few[:6].view(2, 3, -1), t.labels % 2, t.y_labels % 3),
    {"": dict(temperature=0.2)},
)
