"""What is measured: inputs, our ways to compute it, the rivals' ways, and the floor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends, functional
from fused_losses.backends.cpu import capability as cpu
from fused_losses.bench.measure import LOWERED, Provider
from fused_losses.bench.micro import peers

MARGIN, SCALE = 0.5, 64.0
KEEP = 128 << 20
EVERYTHING = 1 << 50  # room for all scores, which is what is then kept


@dataclass
class Case:
    """A measurement: providers by name, and the floor in FLOPs and bytes."""

    title: str
    providers: dict[str, Provider]
    ours: list[str]
    leaves: list[Tensor]  # whose gradients every provider leaves in .grad
    flops: float  # the products that must be done, nothing kept
    bytes: float  # each input once, each output once
    unlike: tuple[str, ...] = ()  # providers that compute another loss
    tolerance: dict[str, float] = field(default_factory=dict)  # see measure.paired
    flops_of: str = "products with no score kept"
    # rounds that slow providers take part in; 0: timed in the warm-up, which is their only step
    turns: dict[str, int] = field(default_factory=dict)
    result_mib: float = 0.0  # what every provider returns
    inputs: tuple[Tensor, ...] = ()  # what a peer is given besides
    # how far two providers' results and gradients are apart, where relative L2 does not say it
    differ: Callable[[list[Tensor], list[Tensor]], float] | None = None
    # result and gradients in float64, by which providers are judged
    truth: Callable[[], list[Tensor]] | None = None
    tells_errors: bool = False  # how far each element may be from them, too

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


@contextmanager
def knob() -> Iterator[None]:
    """oneDNN's float32 kernels instead of MKL's (results keep float32 accuracy here)."""
    # set when torch is imported: no stub knows of it
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def knobbed(f: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """f under the knob."""
    with knob():
        return f(*inputs)


def backward(loss: Tensor) -> Tensor:
    """The loss, once its gradients are there."""
    loss.backward()
    return loss.detach()


def in_float64(
    loss: Callable[..., Tensor], inputs: tuple[Tensor, ...]
) -> Callable[[], list[Tensor]]:
    """The truth of a loss as it is written: its value and gradients, computed when asked for."""

    def truth() -> list[Tensor]:
        wide = [t.detach().double() if t.is_floating_point() else t for t in inputs]
        leaves = [w.requires_grad_() for w, t in zip(wide, inputs, strict=True) if t.requires_grad]
        value = loss(*wide)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return truth


def apart(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function with a code object of its own: torch.compile's cache hangs on that."""
    code = loss.__code__.replace()
    return FunctionType(code, loss.__globals__, loss.__name__, loss.__defaults__, loss.__closure__)


def rivals_of(
    loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], compiled: bool = True
) -> dict[str, Provider]:
    """The loss as plain PyTorch: eager and compiled, each also with the knob and under autocast."""
    device = inputs[0].device.type

    def provider(
        f: Callable[..., Tensor], around: Callable[[], AbstractContextManager]
    ) -> Provider:
        def run() -> Tensor:
            with around():
                value = f(*inputs)
            return backward(value)

        return run

    providers: dict[str, Provider] = {}
    kinds = {"eager": lambda f: f} | ({"torch.compile": torch.compile} if compiled else {})
    for name, made in kinds.items():
        providers[name] = provider(made(apart(loss)), nullcontext)
        providers[f"{name}, autocast bf16"] = provider(
            made(apart(loss)), lambda: torch.autocast(device, torch.bfloat16)
        )
        if device == "cpu":
            plain = provider(made(apart(loss)), nullcontext)
            providers[f"{name}, oneDNN knob"] = lambda plain=plain: knobbed(plain)
    return providers


def our_ways(like: Tensor) -> Iterator[tuple[str, dict[str, Any]]]:
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


def against_eager(
    title: str,
    fused: Callable[..., Tensor],
    eager: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    flops: float,
    rivals: str,
    kept: bool = False,
) -> Case:
    """fused(*inputs, precision=) against eager(*inputs). rivals: "all", "eager" or "none".

    kept: on a CPU also with all scores kept from the forward.
    """
    like = inputs[0]
    leaves = [t for t in inputs if t.requires_grad]
    providers: dict[str, Provider] = {}
    for name, options in our_ways(like):
        providers[name] = lambda o=options: backward(fused(*inputs, **o))
        if kept and like.device.type == "cpu":
            more = dict(memory_budget=EVERYTHING, **options)
            providers[f"{name}, scores kept"] = lambda o=more: backward(fused(*inputs, **o))
    ours = list(providers)
    if rivals != "none":
        providers |= rivals_of(eager, inputs, compiled=rivals == "all")
    floor = 2.0 * sum(leaf.nbytes for leaf in leaves)
    title = f"{title}, {short(like.dtype)} inputs, forward + backward"
    case = Case(title, providers, ours, leaves, flops, floor)
    case.truth = None if rivals == "none" else in_float64(eager, inputs)
    return case if like.dtype == torch.float32 else in_16_bits(case)


def margin_softmax(
    n: int,
    c: int,
    d: int,
    device: str = "cpu",
    rivals: str = "all",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """ArcFace forward and backward against eager, torch.compile and torch's fused loss."""
    torch.manual_seed(seed)
    x = torch.randn(n, d, device=device, dtype=dtype).requires_grad_()
    w = torch.randn(c, d, device=device, dtype=dtype).requires_grad_()
    y = torch.randint(0, c, (n,), device=device)

    def ours(**options: Any) -> Provider:
        def step() -> Tensor:
            loss = functional.margin_softmax(x, w, y, **options)
            assert isinstance(loss, Tensor)  # no stats were asked for
            return backward(loss)

        return step

    providers: dict[str, Provider] = {}
    for name, options in our_ways(x):
        providers[name] = ours(**options)
        if device == "cpu":
            providers[f"{name}, 128 MiB kept"] = ours(**options, memory_budget=KEEP)
    names = list(providers)
    unlike: tuple[str, ...] = ()
    if rivals != "none":
        providers |= rivals_of(eager_arcface, (x, w, y), compiled=rivals == "all")
        without_margin: dict[str, Provider] = {}
        if hasattr(F, "linear_cross_entropy"):  # torch 2.11 has none
            without_margin["F.linear_cross_entropy"] = lambda: backward(torch_lce(x, w, y))
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
    case.truth = None if rivals == "none" else in_float64(eager_arcface, (x, w, y))
    return case if dtype == torch.float32 else in_16_bits(case)


def short(dtype: torch.dtype) -> str:
    """Without its module."""
    return str(dtype).removeprefix("torch.")


def capability() -> str:
    """What the CPU kernels run on."""
    built = cpu.extension()
    return built.capability() if built else "not built"
