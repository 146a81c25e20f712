"""What a class loss asks of a GPU, on tensors without data: kernels, and no wait of the host."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fused_losses import backends, margins
from fused_losses.class_losses import MLCD, ClassLoss, SFace, Softmax, SoftTriple, SphereFace2
from fused_losses.functions.class_loss import class_loss
from fused_losses.primitives.class_rules import bounded, triton
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS
from tools.gpu_static import record

pytest.importorskip("triton")

RULES = ("softmax", "summed_softmax", "sface", "sphereface2")
# what copies from the host where its arguments are not on the device already
MADE = ("tensor", "as_tensor", "to", "cuda", "copy_")
READS = (
    "item",
    "tolist",
    "nonzero",
    "unique",
    "equal",
    "masked_select",
    "cpu",
    "__bool__",
    "__int__",
)


class Waits(TorchFunctionMode):
    """Notes the calls that bring numbers of the host to a device, or of the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        given = {t.device.type for t in args if isinstance(t, Tensor)}
        if name in READS and "meta" in given:
            self.found.append(name)
        out = func(*args, **kwargs)
        made = out.device.type if isinstance(out, Tensor) else ""
        if name in MADE and made == "meta" and given <= {"cpu"}:
            self.found.append(name)
        return out


LOSSES: dict[str, tuple[ClassLoss, int, int]] = {  # with its centres and labels a row
    "SFace": (SFace(), 1, 1),
    "SphereFace2": (SphereFace2(0.3), 1, 1),
    "MLCD": (MLCD(16.0), 1, 4),
    "SoftTriple": (SoftTriple(), 3, 1),
    "sub-centres": (Softmax(), 3, 1),
    "bent": (Softmax(margins.MVSoftmax()), 3, 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_never_wait(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, centers, many = LOSSES[name]
    monkeypatch.setattr(backends, "reasons_against", lambda *_: [])
    with Waits() as waits, record.on("sm_90", lambda *_: None):
        x = torch.empty(64, 32, device="meta")
        w = torch.empty(1000, centers, 32, device="meta")
        labels = torch.empty(64, many, dtype=torch.int64, device="meta")
        found = class_loss(x, w, labels, loss, backend="triton")
    assert found.shape == () and found.device.type == "meta"
    assert waits.found == []


@pytest.mark.parametrize("form", (triton, bounded), ids=("triton", "bounded"))
@pytest.mark.parametrize("classes", (None, 100))
@pytest.mark.parametrize("rule", RULES)
def test_forms_never_wait(rule: str, classes: int | None, form: Any) -> None:
    ran: Counter[str] = Counter()

    def launch(kernel: Any, *_: Any) -> None:
        ran[kernel.fn.__name__] += 1

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    fold = CLASS_FOLDS[rule]
    values, wide = min(fold.values), torch.float64
    before = () if form is triton else ("bounded",)
    after = () if form is triton else (empty(0),)  # no room for scores
    with Waits() as waits, record.on("sm_90", launch):
        p = ClassInputs(
            empty(64, 32),
            empty(3000, 32, dtype=torch.float16),
            empty(64, 2, dtype=torch.int64),
            None if classes is None else empty(classes, dtype=torch.int64),
            empty(values, 64) if values else None,
            rule,
            [2.0] * fold.params,
            centers=3,
            softness=0.1,
        )
        out = form.forward(*before, p, *after)
        assert out.statistics.shape == (len(fold.kinds), 64)
        if form is triton:
            assert ran == {"inverse_norms": 1, "forward_classes": 1, "merge_classes": 1}
        ran.clear()
        given = out.statistics, empty(64, 2, dtype=wide), out.statistics, p
        dx, dweight = form.backward(*before, *given, True, True, True, *after)
    assert dx.shape == p.x.shape and dweight.shape[0] == 3 * (classes or 1000)
    if form is triton:
        assert ran == {"inverse_norms": 1, "gradient_classes": 1, "finish_weight": 1}
    assert waits.found == []


def test_what_waits_is_seen() -> None:
    x = torch.empty(3, device="meta")
    for waits in (
        lambda: torch.tensor([1.0, 2.0], device=x.device),
        lambda: torch.as_tensor(0.5, dtype=x.dtype, device=x.device),
        lambda: torch.ones(2).to(x.device),
        lambda: x[0].item(),
        lambda: x.nonzero(),
    ):
        with Waits() as seen, contextlib.suppress(RuntimeError, NotImplementedError):
            waits()
        assert seen.found
