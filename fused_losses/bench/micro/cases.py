"""What is measured: inputs, our ways to compute it, the rivals' ways, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends, functional
from fused_losses.backends import cpu
from fused_losses.bench.measure import LOWERED, Step
from fused_losses.bench.micro import peers

MARGIN, SCALE = 0.5, 64.0
KEEP = 128 << 20


@dataclass
class Case:
    """A measurement: providers by name, and the floor in FLOPs and bytes."""

    title: str
    providers: dict[str, Step]
    ours: list[str]
    leaves: list[Tensor]  # whose gradients every provider leaves in .grad
    flops: float  # the products that must be done, nothing kept
    bytes: float  # each input once, each output once
    unlike: tuple[str, ...] = ()  # providers that compute another loss
    tolerance: dict[str, float] = field(default_factory=dict)  # see measure.paired
    work: str = "products with no score kept"  # what flops are
    # rounds that slow providers take part in; 0: timed in the warm-up, which is their only step
    turns: dict[str, int] = field(default_factory=dict)
    result_mib: float = 0.0  # what every provider returns
    # how far two providers' results and gradients are apart, where relative L2 does not say it
    differ: Callable[[list[Tensor], list[Tensor]], float] | None = None
    # result and gradients in float64: providers then say how far they are from them
    truth: Callable[[], list[Tensor]] | None = None

    @property
    def gradients_mib(self) -> float:
        return self.result_mib + sum(leaf.nbytes for leaf in self.leaves) / 2**20

    def clear(self) -> None:
        """Drops the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


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


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss.detach()


def _apart(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function with a code object of its own: torch.compile's cache hangs on that."""
    code = loss.__code__.replace()
    return FunctionType(code, loss.__globals__, loss.__name__, loss.__defaults__, loss.__closure__)


def rivals_of(
    loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], compiled: bool = True
) -> dict[str, Step]:
    """The loss as plain PyTorch: eager and compiled, each also with the knob and under autocast."""
    device = inputs[0].device.type

    def step(f: Callable[..., Tensor], around: Callable[[], AbstractContextManager]) -> Step:
        def run() -> Tensor:
            with around():
                value = f(*inputs)
            return backward(value)

        return run

    def knobbed(f: Callable[..., Tensor]) -> Step:
        def run() -> Tensor:
            with _Knob("bf16"):
                return backward(f(*inputs))

        return run

    steps: dict[str, Step] = {}
    kinds = {"eager": lambda f: f} | ({"torch.compile": torch.compile} if compiled else {})
    for name, made in kinds.items():
        steps[name] = step(made(_apart(loss)), nullcontext)
        steps[f"{name}, autocast bf16"] = step(
            made(_apart(loss)), lambda: torch.autocast(device, torch.bfloat16)
        )
        if device == "cpu":
            steps[f"{name}, oneDNN knob"] = knobbed(made(_apart(loss)))
    return steps


def our_ways(like: Tensor) -> Iterator[tuple[str, dict[str, str]]]:
    """Names and options: each precision that can run, and on a GPU also each backend by name."""
    on_gpu = like.device.type == "cuda"
    names = ("triton", "cuda") if on_gpu else ("cpu",)
    for precision in ("fp32", "mixed", "bf16") if like.dtype == torch.float32 else ("fp32",):
        able = [
            name
            for name in names
            if not backends.reasons_against(name, like.device, like.dtype, precision)
        ]
        if precision == "fp32" or able:
            yield f"fused {precision}", {"precision": precision}
        for name in able if on_gpu else ():
            yield f"fused {precision}, {name}", {"precision": precision, "backend": name}


def in_16_bits(case: Case) -> Case:
    """Every provider may be as far from the first as rounded rows are."""
    case.tolerance = dict.fromkeys(case.providers, LOWERED) | case.tolerance
    return case


def margin_softmax(
    n: int,
    c: int,
    d: int,
    device: str = "cpu",
    rivals: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """ArcFace forward and backward against eager, torch.compile and torch's fused loss."""
    torch.manual_seed(seed)
    x = torch.randn(n, d, device=device, dtype=dtype).requires_grad_()
    w = torch.randn(c, d, device=device, dtype=dtype).requires_grad_()
    y = torch.randint(0, c, (n,), device=device)

    def ours(**options: object) -> Step:
        return lambda: backward(functional.margin_softmax(x, w, y, **options))

    providers: dict[str, Step] = {}
    for name, options in our_ways(x):
        providers[name] = ours(**options)
        if device == "cpu":
            providers[f"{name}, 128 MiB kept"] = ours(**options, memory_budget=KEEP)
    names = list(providers)
    unlike: tuple[str, ...] = ()
    if rivals:
        providers |= rivals_of(eager_arcface, (x, w, y))
        without_margin = {"F.linear_cross_entropy": lambda: backward(torch_lce(x, w, y))}
        without_margin |= peers.cross_entropy(x, w, y, SCALE)
        unlike = tuple(without_margin)
        providers |= without_margin
    case = Case(
        f"ArcFace, B={n:,} C={c:,} D={d}, {short(dtype)} inputs, forward + backward",
        providers,
        names,
        [x, w],
        4 * 2.0 * n * c * d,
        2.0 * (c + n) * d * dtype.itemsize,
        unlike,
    )
    return case if dtype == torch.float32 else in_16_bits(case)


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def capability() -> str:
    built = cpu.extension()
    return built.capability() if built else "not built"
