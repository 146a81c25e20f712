"""Checks at the door: every message names the argument, what came and what was expected."""

from __future__ import annotations

import math
import os
from numbers import Integral, Real

import torch
from torch import Tensor

from fused_losses.base.numerics import autocasts, followed

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PRECISIONS = ("fp32", "tf32", "mixed", "bf16")
REDUCTIONS = ("mean", "sum", "none")
# raises on the device, once a kernel comes to it; torch has no public name for it
assert_async = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
NO_TARGET = -1  # what the primitives take for "this row has no target here"


def describe(tensor: Tensor) -> str:
    """`shape (3, 4), torch.float32, cpu`: how a tensor is named in an error."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def check_matrix(name: str, tensor: Tensor | None, shape: str) -> Tensor:
    """A two-dimensional floating point tensor, or a TypeError / ValueError that says what came."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name}: expected a floating point tensor {shape} (float32, bfloat16, float16 or "
            f"float64), got {describe(tensor)}"
        )
    if tensor.dim() != 2:
        raise ValueError(f"{name}: expected two dimensions {shape}, got {describe(tensor)}")
    return tensor


def check_pair(rows_name: str, rows: Tensor, weight_name: str, weight: Tensor) -> None:
    """Two matrices that meet in a product: same width, same device; dtypes are checked apart."""
    check_matrix(rows_name, rows, "[N, D]")
    check_matrix(weight_name, weight, "[C, D]")
    if rows.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{weight_name}: expected [C, {rows.shape[1]}] to match {rows_name} [N, "
            f"{rows.shape[1]}], got {describe(weight)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{weight_name}: expected at least one class, got {describe(weight)}")
    check_device(rows_name, rows, weight_name, weight)


def check_device(first_name: str, first: Tensor, name: str, tensor: Tensor) -> None:
    if tensor.device != first.device:
        raise ValueError(
            f"{name}: expected the device of {first_name} ({first.device}), got {describe(tensor)}"
        )


def check_same_dtype(rows_name: str, rows: Tensor, weight_name: str, weight: Tensor) -> None:
    if rows.dtype != weight.dtype:
        raise TypeError(
            f"{weight_name}: expected the dtype of {rows_name} ({rows.dtype}), got "
            f"{describe(weight)}; cast one of them, or call under torch.autocast, where "
            f"{rows_name} takes the dtype of {weight_name}"
        )


def check_vector(name: str, tensor: Tensor, size: int, what: str, like: Tensor) -> None:
    """A floating point vector of a known length on the device of `like`."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = describe(tensor) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name}: expected a floating point tensor {what}, got {got}")
    if tuple(tensor.shape) != (size,):
        raise ValueError(f"{name}: expected shape ({size},) {what}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {describe(tensor)}")


def check_index_vector(name: str, tensor: Tensor, size: int | None, like: Tensor) -> None:
    """An int64 (or int32) vector of class ids on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected an int64 tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 class ids, got {describe(tensor)}")
    if tensor.dim() != 1 or (size is not None and tensor.shape[0] != size):
        wanted = "one dimension" if size is None else f"shape ({size},)"
        raise ValueError(f"{name}: expected {wanted}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {describe(tensor)}")


def label_error(name: str, num_classes: int, low: int, high: int) -> str:
    return f"{name}: expected class ids in [0, {num_classes}), got values from {low} to {high}"


def label_text(name: str, num_classes: int, ignore_index: int) -> str:
    """What a device asserts of labels, whose values the host does not know."""
    extra = "" if ignore_index == NO_TARGET else f" or ignore_index={ignore_index}"
    return f"{name}: expected class ids in [0, {num_classes}){extra}"


def check_labels(
    labels: Tensor, num_classes: int, *, ignore_index: int = NO_TARGET, name: str = "labels"
) -> None:
    """Labels in [0, num_classes) or equal to ignore_index, found before any kernel reads them.

    On a GPU this is an asynchronous device assertion (no host sync) unless
    FUSED_LOSSES_VALIDATE=1 asks for the eager check with the values in its text.
    """
    if labels.numel() == 0 or labels.is_meta:
        return
    bad = ((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)
    if asserted(labels):
        assert_async(~bad.any(), label_text(name, num_classes, ignore_index))
    elif bool(bad.any()):
        wrong = labels[bad]
        raise IndexError(
            f"{label_text(name, num_classes, ignore_index)}, got values from {int(wrong.min())} "
            f"to {int(wrong.max())} in {wrong.numel()} of {labels.numel()} rows"
        )


def asserted(values: Tensor) -> bool:
    """Whether values are judged on their device, by `assert_async`: who reads them waits for it."""
    return values.is_cuda and os.environ.get("FUSED_LOSSES_VALIDATE") != "1"


def increasing_classes(classes: Tensor | None, like: Tensor) -> Tensor | None:
    """The ids of the classes that take part, checked and increasing, [K] int64; None: all."""
    if classes is None:
        return None
    check_index_vector("classes", classes, None, like)
    if classes.shape[0] == 0:
        raise ValueError("classes: expected at least one class id, got an empty tensor")
    return torch.sort(classes.long()).values


def check_classes(classes: Tensor, num_classes: int) -> None:
    """Strictly increasing ids in [0, num_classes): what the primitives take for `classes`.

    Asserted as `check_labels` does.
    """
    if classes.numel() == 0:
        raise ValueError("classes: expected at least one class id, got an empty tensor")
    if classes.is_meta:
        return
    if asserted(classes):
        sound = (classes[0] >= 0) & (classes[-1] < num_classes) & (classes.diff() > 0).all()
        assert_async(sound, f"classes: expected distinct class ids in [0, {num_classes})")
        return
    if int(classes[0]) < 0 or int(classes[-1]) >= num_classes:
        raise IndexError(
            label_error("classes", num_classes, int(classes.min()), int(classes.max()))
        )
    if not bool((classes[1:] > classes[:-1]).all()):
        raise ValueError("classes: expected distinct class ids, got duplicates")


def check_labels_in_classes(labels: Tensor, classes: Tensor) -> None:
    """Each label (or NO_TARGET) is one of `classes`: a sampled softmax needs its positives.

    Asserted as `check_labels` does.
    """
    found = classes[torch.searchsorted(classes, labels).clamp_max(classes.numel() - 1)] == labels
    missing = ~found & (labels != NO_TARGET)
    told = "classes: expected every label among the classes that take part"
    if asserted(labels):
        assert_async(~missing.any(), told)
    elif bool(missing.any()):
        raise ValueError(
            f"{told}, but {int(missing.sum())} labels are not, for example class "
            f"{int(labels[missing][0])}"
        )


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_rows(name: str, x: Tensor, precision: str) -> None:
    """Embeddings [N, D]."""
    check_matrix(name, x, "[N, D]")
    check_choice("precision", precision, PRECISIONS)


def check_both(
    x_name: str, x: Tensor, y_name: str, y: Tensor | None, precision: str, rows: str = "M"
) -> Tensor:
    """Two sets of embeddings that meet in a product; x, under autocast in y's dtype."""
    check_rows(x_name, x, precision)
    y = check_matrix(y_name, y, f"[{rows}, D]")
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"{y_name}: expected [{rows}, {x.shape[1]}] to match {x_name} [N, {x.shape[1]}], got "
            f"{describe(y)}"
        )
    check_device(x_name, x, y_name, y)
    if x.dtype != y.dtype and autocasts(x.device):
        return x.to(y.dtype)
    check_same_dtype(x_name, x, y_name, y)
    return x


def check_meeting(x: Tensor, y: Tensor) -> None:
    """Rows and columns [., D] as the forms of a primitive rely on them: alike but in number."""
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"y: expected [M, {x.shape[1]}] as x has, got {describe(y)}")
    check_device("x", x, "y", y)
    check_same_dtype("x", x, "y", y)


def check_integers(
    name: str, tensor: Tensor | None, shape: tuple[int | None, ...], like: Tensor
) -> None:
    """An integer tensor on the device of `like`; None in the shape stands for any size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected an integer tensor, got {type(tensor).__name__}")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {describe(tensor)}")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = str(tuple("any" if s is None else s for s in shape)).replace("'", "")
        raise ValueError(f"{name}: expected shape {wanted}, got {describe(tensor)}")
    if tensor.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {describe(tensor)}")


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
            f"offset + i is the positive of row i), got {describe(y)}, offset={offset}"
        )


def check_class_ids(name: str, labels: Tensor, classes: int) -> None:
    """Every label in [0, classes): none is ignored. On a GPU as in `validation.check_labels`."""
    if torch.compiler.is_compiling() or labels.numel() == 0 or labels.is_meta:
        return
    bad = (labels < 0) | (labels >= classes)
    if asserted(labels):
        assert_async(~bad.any(), f"{name}: expected class ids in [0, {classes})")
    elif bool(bad.any()):
        wrong = labels[bad]
        raise IndexError(
            label_error(name, classes, int(wrong.min()), int(wrong.max()))
            + f" in {wrong.numel()} of {labels.numel()} rows"
        )


def check_columns(name: str, columns: Tensor, m: int) -> Tensor:
    """Columns in [0, M), or -1 for none, as int32; on a GPU as in `validation.check_labels`."""
    columns = columns.long()
    bad = (columns < -1) | (columns >= m)
    unread = torch.compiler.is_compiling() or columns.is_meta or columns.numel() == 0
    if columns.is_cuda and not unread and os.environ.get("FUSED_LOSSES_VALIDATE") != "1":
        assert_async(~bad.any(), f"{name}: expected columns in [0, {m}), or -1")
    elif not unread and bool(bad.any()):
        wrong = columns[bad]
        raise IndexError(
            f"{name}: expected columns in [0, {m}), or -1, got values from {int(wrong.min())} to "
            f"{int(wrong.max())}"
        )
    # where nothing was read, a stray column must at least not become another one
    return torch.where(bad, NO_TARGET, columns).int()


def check_number(name: str, value: float) -> None:
    """A number that is no NaN."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if value != value:  # NaN; compiled code may see a symbol here, which math refuses
        raise ValueError(f"{name}: expected a number, got {value}")


def check_count(name: str, value: int) -> None:
    """An integer >= 1, Python's or NumPy's."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        got = repr(value) if isinstance(value, Real) else type(value).__name__
        raise TypeError(f"{name}: expected an integer >= 1, got {got}")
    if value < 1:
        raise ValueError(f"{name}: expected a value >= 1, got {value}")


def check_range(name: str, bounds: tuple[float, float] | None) -> None:
    """None, or (low, high) in this order."""
    if bounds is None:
        return
    check_plain(**{name: bounds})
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"{name}: expected (low, high), got {bounds!r}")
    for bound in bounds:
        check_number(name, bound)
    if bounds[0] > bounds[1]:
        raise ValueError(f"{name}: expected low <= high, got {bounds!r}")


def number(name: str, value: float | Tensor, like: Tensor, *, positive: bool = True) -> Tensor:
    """A float or a scalar tensor as float64 [], > 0 if so wanted; differentiable."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"{name}: expected a number or a scalar tensor, got {describe(value)}")
        check_device("the embeddings", like, name, value)
        # reading it on a GPU would make the host wait
        readable = value.device.type == "cpu" and not torch.compiler.is_compiling()
        if positive and readable and float(value.detach()) <= 0:
            raise ValueError(f"{name}: expected a value > 0, got {float(value.detach())}")
        return (value.reshape(()) if value.dim() else value).double()
    check_positive(name, value, positive=positive)
    return torch.full((), float(value), dtype=torch.float64, device=like.device)


def check_positive(name: str, value: object, *, positive: bool = True) -> None:
    """A number that is no tensor, finite and > 0 if so wanted."""
    # what most are needs no look at the abstract class
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: expected a number or a scalar tensor, got {type(value).__name__}")
    if positive and not 0 < float(value) < math.inf:
        raise ValueError(f"{name}: expected a value > 0, got {value}")


def check_plain(**values: object) -> None:
    """Numbers, or several, without a gradient: a tensor that asks for one is refused."""
    for name, value in values.items():
        if value is None or type(value) in (float, int):
            continue
        each = value if isinstance(value, tuple | list) else (value,)
        if any(isinstance(one, Tensor) and followed(one) for one in each):
            raise TypeError(
                f"{name}: expected a number, got a tensor that asks for a gradient, which this "
                "argument has none of; detach it"
            )


def check_at_least(name: str, value: float, low: float) -> None:
    if not value >= low:
        raise ValueError(f"{name}: expected a value >= {low:g}, got {value}")


def in_one_dtype(like: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The others, under autocast in the dtype of `like`."""
    if not autocasts(like.device):
        return others
    return tuple(t.to(like.dtype) if t.is_floating_point() else t for t in others)


def beside(first_name: str, first: Tensor, name: str, tensor: Tensor) -> Tensor:
    """The tensor, on the device of the first and of its dtype, to which autocast brings it."""
    check_device(first_name, first, name, tensor)
    (tensor,) = in_one_dtype(first, tensor)
    check_same_dtype(first_name, first, name, tensor)
    return tensor


GRADIENTS = ("exact", "straight_through")


def meet(
    rows: Tensor,
    weight: Tensor,
    rows_name: str = "embeddings",
    weight_name: str = "weight",
) -> Tensor:
    """One dtype for both sides: the caller's, or under autocast the weight's."""
    if rows.dtype != weight.dtype and autocasts(rows.device):
        return rows.to(weight.dtype)
    check_same_dtype(rows_name, rows, weight_name, weight)
    return rows


def checked_smoothing(label_smoothing: float) -> float:
    """The value, a float: numpy's take over the products that they stand in."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")
    return label_smoothing if isinstance(label_smoothing, int | float) else float(label_smoothing)
