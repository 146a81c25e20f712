"""What the functions over pairs share around the sweep: checks, integers, scores by name, means.

A score by name becomes u = scale <x, y> + a + b. "rbf": -g |x - y|^2 = 2g <x, y> - g|x|^2 - g|y|^2,
"euclidean" the root of that with g squared, -g |x - y|.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import validation
from fused_losses.pair_inputs import PairInputs
from fused_losses.rows import accumulate_dtype
from fused_losses.unit_norm import unit

SIMILARITIES = ("dot", "cosine", "rbf", "euclidean")
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# ---- checks -------------------------------------------------------------------------------------


def check_rows(name: str, x: Tensor, precision: str) -> None:
    """Embeddings [N, D]."""
    validation.check_matrix(name, x, "[N, D]")
    validation.check_choice("precision", precision, validation.PRECISIONS)


def check_both(
    x_name: str, x: Tensor, y_name: str, y: Tensor, precision: str, rows: str = "M"
) -> Tensor:
    """Two sets of embeddings that meet in a product; x, under autocast in y's dtype."""
    check_rows(x_name, x, precision)
    validation.check_matrix(y_name, y, f"[{rows}, D]")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{y_name}: expected [{rows}, {x.shape[1]}] to match {x_name} [N, {x.shape[1]}], got "
            f"{validation.describe(y)}"
        )
    validation.check_device(x_name, x, y_name, y)
    if x.dtype != y.dtype and torch.is_autocast_enabled(x.device.type):
        return x.to(y.dtype)
    validation.check_same_dtype(x_name, x, y_name, y)
    return x


def check_integers(name: str, tensor: Tensor, shape: tuple[int | None, ...], like: Tensor) -> None:
    """An integer tensor on the device of `like`; None in the shape stands for any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(tensor).__name__}")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {validation.describe(tensor)}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = str(tuple("any" if s is None else s for s in shape)).replace("'", "")
        raise ValueError(f"{name}: expected shape {wanted}, got {validation.describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(
            f"{name}: expected device {like.device}, got {validation.describe(tensor)}"
        )


def check_integer_pair(
    x_name: str,
    x: Tensor | None,
    y_name: str,
    y: Tensor | None,
    sizes: tuple[int, int],
    like: Tensor,
) -> None:
    """Labels, ids or groups: both sides or none."""
    if (x is None) != (y is None):
        given, missing = (x_name, y_name) if y is None else (y_name, x_name)
        raise ValueError(f"{missing}: expected a tensor beside {given}, got None")
    if x is not None:
        check_integers(x_name, x, (sizes[0],), like)
        check_integers(y_name, y, (sizes[1],), like)


def check_diagonal(name: str, y: Tensor, n: int, offset: int) -> None:
    """Row offset + i of y is the positive of row i."""
    if not 0 <= offset <= y.shape[0] - n:
        raise ValueError(
            f"{name}: expected at least offset + N = {offset + n} rows with offset >= 0 (row "
            f"offset + i is the positive of row i), got {validation.describe(y)}, offset={offset}"
        )


def check_class_ids(name: str, labels: Tensor, classes: int) -> None:
    """Every label in [0, classes): none is ignored. On a GPU as in `validation.check_labels`."""
    if torch.compiler.is_compiling() or labels.numel() == 0:
        return
    bad = (labels < 0) | (labels >= classes)
    if labels.is_cuda and os.environ.get("FUSED_LOSSES_VALIDATE") != "1":
        torch._assert_async(~bad.any(), f"{name}: expected class ids in [0, {classes})")
    elif bool(bad.any()):
        wrong = labels[bad]
        raise IndexError(
            validation.label_error(name, classes, int(wrong.min()), int(wrong.max()))
            + f" in {wrong.numel()} of {labels.numel()} rows"
        )


def check_batch(embeddings: Tensor, labels: Tensor, reduction: str, precision: str) -> None:
    """One batch [N, D] with its labels [N]."""
    check_rows("embeddings", embeddings, precision)
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    validation.check_choice("reduction", reduction, validation.REDUCTIONS)


def number(name: str, value: float | Tensor, like: Tensor, *, positive: bool = True) -> Tensor:
    """A float or a scalar tensor as float64 [], > 0 if so wanted; differentiable."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(
                f"{name}: expected a number or a scalar tensor, got {validation.describe(value)}"
            )
        validation.check_device("the embeddings", like, name, value)
        # reading it on a GPU would make the host wait
        readable = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if positive and readable and float(value.detach()) <= 0:
            raise ValueError(f"{name}: expected a value > 0, got {float(value.detach())}")
        return value.reshape(()).double()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number or a scalar tensor, got {type(value).__name__}")
    if positive and not 0 < value < float("inf"):
        raise ValueError(f"{name}: expected a value > 0, got {value}")
    return torch.full((), float(value), dtype=torch.float64, device=like.device)


def check_at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{name}: expected a value >= {low:g}, got {value}")


# ---- integers -----------------------------------------------------------------------------------


def dense(labels: Tensor) -> Tensor:
    """int32 numbers that are equal where the labels are; no host sync, static shapes."""
    if labels.dtype == torch.int32 or labels.numel() == 0:
        return labels.int()
    values, order = labels.sort()
    rank = torch.cat([values.new_zeros(1), (values[1:] != values[:-1]).long().cumsum(0)])
    return torch.empty_like(rank).scatter(0, order, rank).int()


def dense_pair(x: Tensor | None, y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The same for both sides of a comparison."""
    if x is None or y is None:
        return None, None
    if x.dtype != y.dtype:
        x, y = x.long(), y.long()
    both = dense(torch.cat([x, y]))
    return both[: x.shape[0]].contiguous(), both[x.shape[0] :].contiguous()


def count_up(n: int, like: Tensor, start: int = 0) -> Tensor:
    """start, start + 1, ...: labels of pairs that are positive on a diagonal."""
    return torch.arange(start, start + n, device=like.device, dtype=torch.int32)


# ---- scores -------------------------------------------------------------------------------------


def squared_norms(x: Tensor) -> Tensor:
    """|x|^2 a row, [N], in the accumulation dtype."""
    return x.to(accumulate_dtype(x.dtype)).square().sum(dim=1)


def centered(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both moved by y's mean, so that |x|^2 - 2<x, y> + |y|^2 cancels less."""
    about = (x if y is None else y).detach()
    if about.shape[0] == 0:
        return x, y
    about = about.to(accumulate_dtype(x.dtype))
    # a row with NaN must not reach the others
    mean = about.mean(dim=0).nan_to_num(0, 0, 0)
    if x.dtype in (torch.bfloat16, torch.float16):
        # moving rounds anew, but where values are nearer to their mean than that is to 0
        spread = (about - mean).square().mean(dim=0).sqrt()
        mean = torch.where(mean.abs() > spread, mean, 0)
    mean = mean.to(x.dtype)
    return x - mean, None if y is None else y - mean


def scored(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    *,
    similarity: str = "dot",
    normalize: bool = False,
    precision: str = "fp32",
) -> PairInputs:
    """The pairs of x and y (None: x itself) with their score by name."""
    if normalize or similarity == "cosine":
        x, y = unit(x), None if y is None else unit(y)
    if similarity in ("dot", "cosine"):
        x = x.contiguous()
        return PairInputs(x, x if y is None else y.contiguous(), scale, precision=precision)
    x, y = centered(x, y)
    x = x.contiguous()
    y = x if y is None else y.contiguous()
    # the root is taken of u: g |x - y| is the root of g^2 |x - y|^2
    scale = scale.square() if similarity == "euclidean" else scale
    narrow = accumulate_dtype(x.dtype)
    x_bias = (-scale * squared_norms(x)).to(narrow)
    y_bias = x_bias if y is x else (-scale * squared_norms(y)).to(narrow)
    score = "root" if similarity == "euclidean" else "linear"
    return PairInputs(x, y, 2 * scale, x_bias, y_bias, score=score, precision=precision)


def triangle(inputs: PairInputs) -> PairInputs:
    """The same pairs, y being x and i == j left out, at half the work."""
    return inputs._replace(
        triangle=True, y_bias=None, y_labels=None, y_ids=None, y_groups=None, y_window=None
    )


class ByLabel(NamedTuple):
    """One batch with its rows in the order of their labels.

    Positives then sit near the diagonal, and a kernel needs no masks away from it.
    """

    x: Tensor  # [N, D]
    labels: Tensor  # [N] int32, increasing
    order: Tensor  # [N]: where each row stood

    def restored(self, values: Tensor) -> Tensor:
        """A value a row [N], in the rows' first order."""
        return values.index_select(0, self.order.argsort())


def by_label(x: Tensor, labels: Tensor, normalize: bool) -> ByLabel:
    """Sorts a batch, and divides its rows by their norms; O(N D) memory, no host sync."""
    numbers, order = dense(labels).sort(stable=True)
    return ByLabel(unit(x, order) if normalize else x.index_select(0, order), numbers, order)


# ---- after the sweep ----------------------------------------------------------------------------


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z), without F.softplus's cut at 20, which costs float64 its digits."""
    return -F.logsigmoid(-z)


def merged(first: Tensor, second: Tensor) -> Tensor:
    """logaddexp whose first and second derivatives are finite also at -inf."""
    top = torch.maximum(first, second).detach()
    dead = top == -torch.inf
    shift = torch.where(top.isinf(), 0, top)
    mass = (first - shift).exp() + (second - shift).exp()
    return torch.where(dead, -torch.inf, torch.where(dead, 1, mass).log() + shift)


def over_last(z: Tensor, kept: Tensor | None = None) -> Tensor:
    """logsumexp over the last dimension of what is kept; over nothing -inf, gradient 0."""
    if kept is not None:
        z = z.masked_fill(~kept, -torch.inf)
    top = z.detach().amax(dim=-1, keepdim=True)
    dead = top == -torch.inf
    shift = torch.where(top.isinf(), 0, top)
    mass = (z - shift).exp().sum(dim=-1, keepdim=True)
    return torch.where(dead, -torch.inf, torch.where(dead, 1, mass).log() + shift).squeeze(-1)


def reduced(loss: Tensor, counted: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    """A loss a row -> its mean over the rows that count (0 over none), its sum, or itself."""
    loss = torch.where(counted, loss, 0)
    if reduction == "mean":
        loss = loss.sum() / counted.sum().clamp_min(1)
    elif reduction == "sum":
        loss = loss.sum()
    return loss.to(dtype)
