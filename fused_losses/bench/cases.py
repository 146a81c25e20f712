"""What is measured: inputs, our ways to compute it, the rivals' ways, and the floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends, functional
from fused_losses.backends import cpu
from fused_losses.bench.measure import Step

MARGIN, SCALE = 0.5, 64.0
KEEP = 128 << 20


@dataclass
class Case:
    """A measurement: providers by name, and the floor in FLOPs and bytes."""

    title: str
    providers: dict[str, Step]
    ours: list[str]
    gradients_mib: float
    flops: float  # the products that must be done, nothing kept
    bytes: float  # each input once, each output once
    clear: Callable[[], None]


def eager_arcface(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """ArcFace as every trainer writes it: the N x C cosines, the margin scattered in."""
    cosine = F.normalize(x) @ F.normalize(w).T
    target = cosine.gather(1, y[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
    moved = torch.cos(torch.acos(target) + MARGIN)
    return F.cross_entropy(cosine.scatter(1, y[:, None], moved) * SCALE, y)


def torch_lce(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """torch's own linear cross entropy: no margin, so the rival does less.

    Its chunked form is made for batches larger than D; at B=256, D=512 it takes ten times longer.
    """
    return F.linear_cross_entropy(F.normalize(x) * SCALE, F.normalize(w), y)


class _Knob:
    """oneDNN's float32 kernels instead of MKL's (results keep float32 accuracy here)."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __enter__(self) -> None:
        self.before = torch.backends.mkldnn.matmul.fp32_precision
        torch.backends.mkldnn.matmul.fp32_precision = self.value

    def __exit__(self, *_: object) -> None:
        torch.backends.mkldnn.matmul.fp32_precision = self.before


def margin_softmax(
    n: int, c: int, d: int, device: str = "cpu", rivals: bool = True, seed: int = 0
) -> Case:
    """ArcFace forward and backward against eager, torch.compile and torch's fused loss."""
    torch.manual_seed(seed)
    x = torch.randn(n, d, device=device, requires_grad=True)
    w = torch.randn(c, d, device=device, requires_grad=True)
    y = torch.randint(0, c, (n,), device=device)

    def clear() -> None:
        x.grad = w.grad = None

    def ours(**options: object) -> Step:
        return lambda: functional.margin_softmax(x, w, y, **options).backward()

    providers: dict[str, Step] = {}
    providers["fused fp32"] = ours()
    providers["fused fp32, 128 MiB kept"] = ours(memory_budget=KEEP)
    for precision in ("mixed", "bf16"):
        name, dev = ("cpu", torch.device("cpu")) if device == "cpu" else ("triton", x.device)
        if not backends.reasons_against(name, dev, x.dtype, precision):
            providers[f"fused {precision}"] = ours(precision=precision)
            if name == "cpu":
                kept = ours(precision=precision, memory_budget=KEEP)
                providers[f"fused {precision}, 128 MiB kept"] = kept
    names = list(providers)
    if rivals:
        providers |= _rivals(x, w, y)
    gradients = (x.numel() + w.numel()) * 4
    return Case(
        f"ArcFace, B={n:,} C={c:,} D={d}, float32 inputs, forward + backward",
        providers,
        names,
        gradients / 2**20,
        4 * 2.0 * n * c * d,
        2.0 * c * d * 4 + 2.0 * n * d * 4,
        clear,
    )


def _rivals(x: Tensor, w: Tensor, y: Tensor) -> dict[str, Step]:
    compiled = torch.compile(eager_arcface)
    knobbed = torch.compile(lambda a, b, c: eager_arcface(a, b, c))
    autocast = torch.compile(lambda a, b, c: eager_arcface(a, b, c) + 0)

    def with_knob(step: Callable[..., Tensor]) -> Step:
        def run() -> None:
            with _Knob("bf16"):
                step(x, w, y).backward()

        return run

    def under_autocast() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = autocast(x, w, y)
        loss.backward()

    steps: dict[str, Step] = {
        "eager": lambda: eager_arcface(x, w, y).backward(),
        "torch.compile": lambda: compiled(x, w, y).backward(),
        "torch.compile, autocast bf16": under_autocast,
        "F.linear_cross_entropy": lambda: torch_lce(x, w, y).backward(),
    }
    if x.device.type == "cpu":
        steps["torch.compile, oneDNN knob"] = with_knob(knobbed)
    return steps


def capability() -> str:
    built = cpu.extension()
    return built.capability() if built else "not built"
