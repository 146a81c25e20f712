"""Class losses refuse what does not fit, and their memory is bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from class_loss_formulas import (  # noqa: F401
    C,
    D,
    K,
    N,
    _small_tiles,
    op_inputs,
)
from conftest import MEASURED, require
from counted import COUNTER, MIB, told_by_child

from fused_losses import margins
from fused_losses.class_losses import MLCD, ClassLoss, SFace, Softmax, SoftTriple, SphereFace2
from fused_losses.functions.class_loss import class_loss
from fused_losses.primitives.class_rules.op import (
    class_statistics,
)

X, W, Y = torch.randn(4, D), torch.randn(C, K, D), torch.tensor([0, 1, 2, -100])
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "embeddings": ({"embeddings": X[0]}, ValueError, "embeddings: expected two dimensions"),
    "width": ({"weight": W[:, :, 1:]}, ValueError, "weight: expected .C, 5."),
    "no centres": ({"weight": W[:, :0]}, ValueError, r"weight: expected \[C, K >= 1, D\]"),
    "no classes": ({"weight": W[:0]}, ValueError, "weight: expected at least one class"),
    "dtype": ({"weight": W.double()}, TypeError, "weight: expected the dtype of embeddings"),
    "labels": ({"labels": Y[:3]}, ValueError, r"labels: expected shape \(4,\)"),
    "labels' dtype": ({"labels": Y.float()}, TypeError, "labels: expected int64"),
    "label": ({"labels": Y + 17}, IndexError, r"labels: expected class ids in \[0, 19\)"),
    "stray label": ({"labels": Y.clamp_min(-1)}, IndexError, "labels: .* from -1 to -1"),
    "class": ({"classes": torch.tensor([0, 1, 2, C])}, IndexError, "classes: expected class ids"),
    "twice": ({"classes": torch.tensor([0, 1, 2, 2])}, ValueError, "classes: expected distinct"),
    "missing": ({"classes": torch.tensor([0, 1])}, ValueError, "classes: expected every label"),
    "none": ({"classes": torch.zeros(0, dtype=torch.int64)}, ValueError, "at least one class id"),
    "loss": ({"loss": margins.ArcFace()}, TypeError, "loss: expected a ClassLoss, got ArcFace"),
    "reduction": ({"reduction": "all"}, ValueError, "reduction: expected one of"),
    "precision": ({"precision": "fp8"}, ValueError, "precision: expected one of"),
    "bend": (
        {"loss": Softmax(margins.CurricularFace()), "labels": torch.stack([Y, Y], 1)},
        ValueError,
        "labels: expected one a row with CurricularFace, got 2",
    ),
    "norm": (
        {"loss": Softmax(margins.MagFace()), "labels": torch.stack([Y, Y], 1)},
        ValueError,
        "labels: expected one a row with MagFace, got 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, backend: str) -> None:
    changed, error, message = BAD[case]
    given = {"embeddings": X, "weight": W, "labels": Y, "loss": MLCD()} | changed
    with pytest.raises(error, match=message):
        class_loss(**given, backend=backend)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Softmax(scale=0.0), "scale: expected a finite value > 0"),
        (lambda: Softmax(gradient="none"), "gradient: expected one of"),
        (lambda: SoftTriple(gamma=-1.0), "gamma: expected a finite value > 0"),
        (lambda: SFace(k=math.inf), "k: expected a finite value > 0"),
        (lambda: SphereFace2(0.0, t=0.5), "t: expected a finite value >= 1"),
        (lambda: SphereFace2(0.0, alpha=1.0), "alpha: expected a value in"),
        (lambda: SphereFace2(torch.zeros(2)), "bias: expected one number"),
        (lambda: SphereFace2.balanced(1), "classes: expected at least 2"),
        (lambda: MLCD(math.nan), "scale: expected a number, got nan"),
    ],
)
def test_bad_losses(make: Callable[[], ClassLoss], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_scale_whose_gradient_would_be_lost_is_refused() -> None:
    for make in (
        lambda s: Softmax(scale=s),
        SFace,
        MLCD,
        SoftTriple,
        lambda s: SphereFace2(0.0, s),
    ):
        with pytest.raises(TypeError, match="expected a float, got a tensor"):
            make(torch.tensor(8.0, requires_grad=True))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"centers": 4}, ValueError, "centers: expected a divisor of weight's 57 rows, got 4"),
        ({"softness": -1.0}, ValueError, "softness: expected a value >= 0"),
        ({"rule": "hinges"}, ValueError, "rule: expected one of"),
        ({"params": []}, ValueError, "params: expected 1 of 'softmax', got 0"),
        ({"values": torch.zeros(1, N)}, ValueError, r"values: expected None or \(4, 7\)"),
        ({"labels": torch.zeros(N, dtype=torch.int64)}, ValueError, r"labels: expected shape \(7"),
        ({"labels": torch.zeros(N, 1)}, TypeError, "labels: expected int64"),
        ({"x": torch.zeros(N, D, dtype=torch.float16)}, TypeError, "x: expected torch.float32"),
    ],
)
def test_bad_op_input(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    p = op_inputs("softmax", torch.float32)._replace(**changed)
    with pytest.raises(error, match=message):
        class_statistics(p)


MEMORY = {
    "softmax": ("Softmax()", 1),
    "sphereface2": ("SphereFace2(0.0)", 1),
    "sub-centres": ("Softmax()", 3),
}
MEMORY_N, MEMORY_D, MEMORY_C = 256, 64, 24_000
MEMORY_BOUND = 17 * MIB

CHILD = (
    COUNTER
    + """
from fused_losses.class_losses import *

def run(made, centers, n, d, c, backend):
    torch.manual_seed(0)
    x = torch.randn(n, d, requires_grad=True)
    w = torch.randn(c // centers, centers, d, requires_grad=True)
    y = torch.randint(0, c // centers, (n, 2))  # one label a row goes by row_statistics
    loss = eval(made)
    peak = extra(lambda: class_loss(x, w, y, loss, backend=backend).backward())
    plan = fused_losses.explain(class_loss, x, w, y, loss, backend=backend)
    return peak - x.grad.nbytes - w.grad.nbytes, plan.peak_extra_bytes

cases, n, d, c = json.loads(sys.argv[1])
for name, made, centers, backend in cases:
    run(made, centers, n, d, 3000, backend)
print(json.dumps({f"{backend} {name}": run(made, centers, n, d, c, backend)
                  for name, made, centers, backend in cases}))
"""
)


@pytest.mark.slow
def test_peak_is_bounded_whatever_the_number_of_classes() -> None:
    for name in MEASURED:
        require(name)
    scores = MEMORY_N * MEMORY_C * 4
    sizes = [MEMORY_N, MEMORY_D, MEMORY_C]
    cases = [(name, *case, backend) for backend in MEASURED for name, case in MEMORY.items()]
    cases.append(("softmax", *MEMORY["softmax"], "reference"))
    told = told_by_child(CHILD, [cases, *sizes], OMP_WAIT_POLICY="passive")
    assert len(told) == len(cases)
    for name, (peak, plan) in told.items():
        if name.startswith("reference"):  # the control: a harness that saw nothing would pass
            assert peak > scores > 1.3 * MEMORY_BOUND, (name, peak)
        else:
            assert peak <= MEMORY_BOUND, (name, peak)
            assert peak <= plan <= 4 * peak, (name, peak, plan)
