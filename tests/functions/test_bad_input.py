"""What is wrong is named; what is merely degenerate has a stated answer; NaN stays where it is."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from conftest import STREAMED, require
from small_softmax import C, D, N, call, good

import fused_losses

# name of the row: (what is changed, the error, its words)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "label-too-high": (
        {"labels": torch.tensor([0, 1, 9, 2, 12, 3])},
        IndexError,
        "labels: expected class ids in [0, 9) or ignore_index=-100, got values from 9 to 12 in 2 "
        "of 6 rows",
    ),
    "label-too-low": (
        {"labels": torch.tensor([0, 1, -7, 2, 1, 3])},
        IndexError,
        "labels: expected class ids in [0, 9) or ignore_index=-100, got values from -7 to -7",
    ),
    "stray-minus-one": (
        {"labels": torch.tensor([0, 1, -1, 2, 1, 3])},
        IndexError,
        "got values from -1 to -1 in 1 of 6 rows",
    ),
    "minus-one-hundred-is-not-ignored-when-another-is": (
        {"labels": torch.tensor([0, 1, -100, 2, 1, 3]), "ignore_index": -1},
        IndexError,
        "got values from -100 to -100",
    ),
    "label-is-float": (
        {"labels": torch.zeros(N)},
        TypeError,
        "labels: expected int64 class ids, got shape (6,), torch.float32, cpu",
    ),
    "label-is-bool": (
        {"labels": torch.zeros(N, dtype=torch.bool)},
        TypeError,
        "labels: expected int64 class ids, got shape (6,), torch.bool, cpu",
    ),
    "labels-are-a-list": ({"labels": [0] * N}, TypeError, "labels: expected an int64 tensor"),
    "labels-too-few": (
        {"labels": torch.zeros(N - 1, dtype=torch.int64)},
        ValueError,
        "labels: expected shape (6,), got shape (5,)",
    ),
    "labels-three-dimensional": (
        {"labels": torch.zeros(N, 1, 1, dtype=torch.int64)},
        ValueError,
        "labels: expected shape (6,), got shape (6, 1, 1)",
    ),
    "labels-elsewhere": (
        {"labels": torch.zeros(N, dtype=torch.int64, device="meta")},
        ValueError,
        "labels: expected device cpu, got shape (6,), torch.int64, meta",
    ),
    "weight-elsewhere": (
        {"weight": torch.zeros(C, D, device="meta")},
        ValueError,
        "weight: expected the device of embeddings (cpu), got shape (9, 5), torch.float32, meta",
    ),
    "bias-elsewhere": (
        {"bias": torch.zeros(C, device="meta")},
        ValueError,
        "bias: expected device cpu, got",
    ),
    "classes-elsewhere": (
        {"classes": torch.arange(C, device="meta")},
        ValueError,
        "classes: expected device cpu, got",
    ),
    "scale-elsewhere": (
        {"scale": torch.ones(N, device="meta")},
        ValueError,
        "scale: expected the device of embeddings (cpu), got",
    ),
    "dtypes-differ": (
        {"embeddings": torch.randn(N, D).bfloat16()},
        TypeError,
        "weight: expected the dtype of embeddings (torch.bfloat16), got shape (9, 5), "
        "torch.float32",
    ),
    "embeddings-are-integers": (
        {"embeddings": torch.ones(N, D, dtype=torch.int64)},
        TypeError,
        "embeddings: expected a floating point tensor [N, D]",
    ),
    "weight-is-complex": (
        {"weight": torch.ones(C, D, dtype=torch.complex64)},
        TypeError,
        "weight: expected a floating point tensor [C, D]",
    ),
    "embeddings-are-an-array": (
        {"embeddings": np.zeros((N, D))},
        TypeError,
        "embeddings: expected a tensor [N, D], got ndarray",
    ),
    "embeddings-one-dimensional": (
        {"embeddings": torch.randn(D)},
        ValueError,
        "embeddings: expected two dimensions [N, D], got shape (5,)",
    ),
    "weight-four-dimensional": (
        {"weight": torch.randn(C, 3, D, 1)},
        ValueError,
        "weight: expected two dimensions [C, D], got shape (9, 3, 5, 1)",
    ),
    "weight-has-other-width": (
        {"weight": torch.randn(C, D + 1)},
        ValueError,
        "weight: expected [C, 5] to match embeddings [N, 5], got shape (9, 6)",
    ),
    "no-classes-at-all": (
        {"weight": torch.randn(0, D)},
        ValueError,
        "weight: expected at least one class, got shape (0, 5)",
    ),
    "bias-of-wrong-shape": (
        {"bias": torch.zeros(C + 1)},
        ValueError,
        "bias: expected shape (9,) one value a class [C], got shape (10,)",
    ),
    "bias-of-integers": (
        {"bias": torch.zeros(C, dtype=torch.int64)},
        TypeError,
        "bias: expected a floating point tensor one value a class [C], got shape (9,)",
    ),
    "class-weight-of-wrong-shape": (
        {"class_weight": torch.ones(C, 1)},
        ValueError,
        "class_weight: expected shape (9,) one value a class [C], got shape (9, 1)",
    ),
    "class-weight-is-a-list": (
        {"class_weight": [1.0] * C},
        TypeError,
        "class_weight: expected a floating point tensor one value a class [C], got list",
    ),
    "scale-zero": ({"scale": 0.0}, ValueError, "scale: expected a finite value > 0, got 0.0"),
    "scale-negative": ({"scale": -3}, ValueError, "scale: expected a finite value > 0, got -3"),
    "scale-nan": ({"scale": float("nan")}, ValueError, "scale: expected a number, got nan"),
    "scale-of-wrong-shape": (
        {"scale": torch.ones(C)},
        ValueError,
        "scale: expected a number, a scalar tensor or shape (6,), got shape (9,)",
    ),
    "scale-two-dimensional": (
        {"scale": torch.ones(N, 1)},
        ValueError,
        "scale: expected a number, a scalar tensor or shape (6,), got shape (6, 1)",
    ),
    "smoothing-above-one": (
        {"label_smoothing": 1.1},
        ValueError,
        "label_smoothing: expected a value in [0, 1], got 1.1",
    ),
    "smoothing-negative": (
        {"label_smoothing": -0.1},
        ValueError,
        "label_smoothing: expected a value in [0, 1], got -0.1",
    ),
    "budget-negative": (
        {"memory_budget": -1},
        ValueError,
        "memory_budget: expected bytes >= 0, got -1",
    ),
    "precision-unknown": (
        {"precision": "fp8"},
        ValueError,
        "precision: expected one of fp32, tf32, mixed, bf16, got 'fp8'",
    ),
    "reduction-unknown": (
        {"reduction": "average"},
        ValueError,
        "reduction: expected one of mean, sum, none, got 'average'",
    ),
    "gradient-unknown": (
        {"gradient": "detached"},
        ValueError,
        "gradient: expected one of exact, straight_through, got 'detached'",
    ),
    "classes-without-a-label": (
        {"classes": torch.tensor([0, 3, 8, 1])},
        ValueError,
        "classes: expected every label among the classes that take part, but ",
    ),
    "classes-twice": (
        {"classes": torch.tensor([0, 3, 8, 1, 5, 3])},
        ValueError,
        "classes: expected distinct class ids",
    ),
    "classes-too-high": (
        {"classes": torch.tensor([0, 3, 8, 1, 5, 9])},
        IndexError,
        "classes: expected class ids in [0, 9), got ",
    ),
    "classes-too-low": (
        {"classes": torch.tensor([0, 3, 8, 1, 5, -1])},
        IndexError,
        "classes: expected class ids in [0, 9), got ",
    ),
    "classes-empty": (
        {"classes": torch.zeros(0, dtype=torch.int64)},
        ValueError,
        "classes: expected at least one class id, got an empty tensor",
    ),
    "classes-are-a-mask": (
        {"classes": torch.ones(C, dtype=torch.bool)},
        TypeError,
        "classes: expected int64 class ids, got shape (9,), torch.bool",
    ),
    "classes-two-dimensional": (
        {"classes": torch.arange(C)[None]},
        ValueError,
        "classes: expected one dimension, got shape (1, 9)",
    ),
}


@pytest.mark.parametrize("row", REFUSED)
def test_is_refused_by_name(row: str, backend: str) -> None:
    changes, error, words = REFUSED[row]
    with pytest.raises(error, match=re.escape(words)):
        call(backend, **changes)


@pytest.mark.parametrize("backend_name", STREAMED)
def test_primitive_reads_no_row_out_of_range(backend_name: str) -> None:
    # below margin_softmax's checks: the kernels' own door
    require(backend_name)
    x, w = torch.randn(N, D), torch.randn(C, D)
    for labels in ([0, 1, 9, 2, 1, 3], [0, 1, -2, 2, 1, 3]):
        with pytest.raises(IndexError, match=r"labels: expected class ids in \[0, 9\)"):
            fused_losses.row_statistics(x, w, torch.tensor(labels), backend=backend_name)
    labels = torch.tensor([0, 1, 1, 2, 1, 3])
    with pytest.raises(IndexError, match=r"classes: expected class ids in \[0, 9\)"):
        fused_losses.row_statistics(
            x, w, labels, classes=torch.tensor([0, 1, 2, 3, 9]), backend=backend_name
        )
    with pytest.raises(ValueError, match="classes: expected distinct class ids"):
        fused_losses.row_statistics(
            x, w, labels, classes=torch.tensor([0, 1, 2, 3, 3]), backend=backend_name
        )
    with pytest.raises(ValueError, match="classes: expected every label among"):
        fused_losses.row_statistics(
            x, w, labels, classes=torch.tensor([0, 1, 2]), backend=backend_name
        )


def test_a_forced_backend_that_cannot_run_says_why() -> None:
    wide = {k: good()[k].double() for k in ("embeddings", "weight")}
    with pytest.raises(RuntimeError, match=r"backend='cuda' cannot run this call .* cuda: \w+"):
        call("cuda", **wide)  # on a GPU, on its host execution, and without either


@pytest.mark.parametrize("precision", ["tf32", "bf16", "mixed"])
@pytest.mark.parametrize("name", ["reference", "bounded"])
def test_precision_is_refused_and_not_replaced(name: str, precision: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run this call.*{precision}"):
        call(name, precision=precision)


def test_tf32_is_refused_on_a_cpu() -> None:
    with pytest.raises(RuntimeError, match="backend='auto' cannot run this call.*tf32"):
        call(None, precision="tf32")
    require("cpu")
    with pytest.raises(RuntimeError, match="precision='tf32': a CPU has no tf32 products"):
        call("cpu", precision="tf32")


def test_bf16_products_of_float64_are_refused() -> None:
    require("cpu")
    inputs = {k: good()[k].double() for k in ("embeddings", "weight")}
    with pytest.raises(RuntimeError, match="float64 inputs are multiplied in float64"):
        call("cpu", precision="bf16", **inputs)
