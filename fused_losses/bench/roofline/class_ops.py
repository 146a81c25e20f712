"""Operations of the roofline over classes that have Triton kernels of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fused_losses.bench.roofline.operation import (
    BF16,
    HostCode,
    Operation,
    bytes_of,
    empty,
    plain_backward,
)
from fused_losses.primitives.class_rules import triton as triton_class_rules
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.divergence import triton as triton_divergence
from fused_losses.primitives.divergence.inputs import (
    DivergenceGradients,
    DivergenceInputs,
    DivergenceNeeds,
    DivergenceSaved,
)

WIDE = torch.float64  # of the statistics


def _of_rows(n: int, *more: int) -> Tensor:
    return empty(*more, n, dtype=WIDE)


def divergence_op(n: int, c: int, d: int) -> Iterator[Operation]:
    """KL of a student and a frozen teacher of one width."""
    x, w, teacher, of_teacher = (empty(rows, d, dtype=BF16) for rows in (n, c, n, c))
    p = DivergenceInputs(x, w, teacher, of_teacher, empty(n, dtype=torch.int64))
    needs = DivergenceNeeds(False, True, True, *(False,) * 5)
    one, fold = _of_rows(n), _of_rows(n, 1)

    def backward() -> None:
        grads = DivergenceGradients(one, one, one, one, fold)
        triton_divergence.backward(p, DivergenceSaved(one, one, fold), grads, needs)

    def plain(x: Tensor = x, w: Tensor = w) -> Tensor:
        log_p, log_q = (
            F.log_softmax((a @ b.T).float(), 1) for a, b in ((teacher, of_teacher), (x, w))
        )
        return (log_p.exp() * (log_p - log_q)).sum()

    return _both(
        "distillation",
        f"B={n:,} C={c:,} D={d} both sides bf16",
        (bytes_of(x, w, teacher, of_teacher) + 8 * n, bytes_of(x, w) + 8 * n),
        (4 * n * c * d, 8 * n * c * d),
        (lambda: triton_divergence.forward(p), backward),
        (plain, plain_backward(plain, x, w)),
    )


def class_rule_op(n: int, c: int, d: int) -> Iterator[Operation]:
    """SFace: a sum over the classes, each cosine by a weight of its angle."""
    k, b = 80.0, 1.23
    x, w = empty(n, d, dtype=BF16), empty(c, d, dtype=BF16)
    p = ClassInputs(x, w, empty(n, 1, dtype=torch.int64), rule="sface", params=[k, b])
    one = _of_rows(n, 1)

    def backward() -> None:
        triton_class_rules.backward(one, one.T, one, p, False, True, True)

    def plain(x: Tensor = x, w: Tensor = w) -> Tensor:
        cosine = F.normalize(x) @ F.normalize(w).T
        angle = torch.acos(cosine.detach().clamp(-1, 1))
        return (torch.sigmoid(k * (b - angle)) * cosine).float().sum()

    return _both(
        "sface",
        f"B={n:,} C={c:,} D={d} bf16",
        (bytes_of(x, w) + 8 * n, bytes_of(x, w) + 8 * n),
        (2 * n * c * d, 6 * n * c * d),
        (lambda: triton_class_rules.forward(p), backward),
        (plain, plain_backward(plain, x, w)),
    )


def _both(
    name: str,
    shape: str,
    moved: tuple[int, int],  # inputs of the forward, and what the backward writes
    flops: tuple[int, int],
    ours: tuple[HostCode, HostCode],
    plain: tuple[HostCode, HostCode],
) -> Iterator[Operation]:
    read, written = moved
    floors = read, read + written
    directions = ("forward", "backward")
    for row in zip(directions, floors, flops, ours, plain, strict=True):
        direction, floor, products, form, of_torch = row
        yield Operation(name, direction, shape, floor, products, {"triton": form}, of_torch)
