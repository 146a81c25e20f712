"""What a head is told at its construction and in a call, checked by name."""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fused_losses.base.parameters import check_above, check_called, check_parameter
from fused_losses.base.validation import FLOATS, check_choice, checked_smoothing, describe
from fused_losses.functions.unpg import UNPG

HEADS_OWN = ("name", "weight", "seed", "allocate")  # that the head gives its optimiser
LEAST_RATE = 2.0**-60  # of sample_rate
GRADIENT_SCALES = ("ddp_mean", "global_sum")


def counts(**given: Any) -> list[int]:
    """Integers >= 1, of numpy too; their values."""
    found = []
    for name, count in given.items():
        value = integer(name, count)
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {count}")
        found.append(value)
    return found


def integer(name: str, value: Any) -> int:
    """An integer, of numpy too."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an integer, got {value!r}") from None


def integers(**given: Any) -> list[int]:
    """The values of `integer`."""
    return [integer(name, value) for name, value in given.items()]


def check_set(name: str, value: Any) -> None:
    """What a head is given at its construction and may be given another value of later.

    Through a parameter alone, a scale, a gradient goes.
    """
    if name == "scale":
        if isinstance(value, nn.Parameter):
            if value.numel() != 1 or not value.is_floating_point():
                raise ValueError(f"scale: expected one floating point value, got {describe(value)}")
            value = float(value.detach())
        check_above("scale", value)
    elif name == "sample_rate":
        check_parameter("sample_rate", value, LEAST_RATE, 1, within="a value in (0, 1]")
    elif name == "max_grad_norm":
        if value is not None:
            check_above("max_grad_norm", value)
    elif name == "chunk_bytes":
        counts(chunk_bytes=value)
    elif name == "gradient_scale":
        check_choice("gradient_scale", value, GRADIENT_SCALES)


def check_kernels(dtype: Any, backend: str | None) -> None:
    """A table's dtype, and a backend that streams."""
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected a floating point type, got {dtype}")
    if backend == "reference":
        raise ValueError(
            "backend: expected a streamed one, got 'reference'; margin_softmax(..., "
            "backend='reference') materialises the logits"
        )


def check_objects(
    *, batch_negatives: object, optimizer_options: object, storage: object, **groups: object
) -> None:
    """TypeError for an object of another kind; groups: process_group and device_mesh."""
    kinds: dict[str, tuple[object, tuple[type, ...], str]] = {
        "batch_negatives": (batch_negatives, (UNPG,), "UNPG()"),
        "optimizer_options": (optimizer_options, (dict,), "a dict of hyper-parameters"),
        "storage": (storage, (str, Path), "a folder or 'pinned'"),
        "process_group": (
            groups["process_group"], (dist.ProcessGroup,), "a group that this rank is in",
        ),
        "device_mesh": (groups["device_mesh"], (DeviceMesh,), "a DeviceMesh"),
    }  # fmt: skip
    for name, (value, right, wanted) in kinds.items():
        if value is not None and not isinstance(value, right):
            raise TypeError(f"{name}: expected None or {wanted}, got {value!r}")
    if isinstance(optimizer_options, dict):
        own = [name for name in optimizer_options if name in HEADS_OWN or not isinstance(name, str)]
        if own:
            raise TypeError(
                f"optimizer_options: expected names of hyper-parameters, got {own[0]!r}"
            )
    if batch_negatives is not None:
        check_called("batch_negatives", batch_negatives)


def check_bias(bias: bool, margin: object, normalize: bool, sub_centers: int) -> bool:
    """Its value; ValueError beside what makes no logits <x, w> + b of one centre a class."""
    if bias and (margin is not None or normalize or sub_centers > 1):
        raise ValueError(
            "bias: expected margin=None, normalize=False and sub_centers=1 beside it, whose "
            "logits are no cosines, of which margins and the best of several centres are, got "
            f"margin={margin!r}, normalize={normalize} and sub_centers={sub_centers}"
        )
    return bool(bias)


def check_smoothing(label_smoothing: float, batch_negatives: object) -> float:
    """Its value; ValueError beside negatives that are no classes."""
    value = checked_smoothing(label_smoothing)
    if value and batch_negatives is not None:
        raise ValueError(f"label_smoothing: expected 0 beside batch_negatives, got {value}")
    return value


def check_width(
    embeddings: Tensor, num_classes: int, embedding_dim: int, of: str = "ClassCenters"
) -> None:
    """Rows [n, D] of the table's D; where they have C columns, the order is said."""
    if embeddings.shape[1] == embedding_dim:
        return
    order = ""
    if embeddings.shape[1] == num_classes:
        order = (
            f"; {of}(num_classes, embedding_dim) was given ({num_classes}, "
            f"{embedding_dim}), is it the other way round?"
        )
    raise ValueError(
        f"embeddings: expected [n, {embedding_dim}] for embedding_dim={embedding_dim}, got "
        f"{describe(embeddings)}{order}"
    )
