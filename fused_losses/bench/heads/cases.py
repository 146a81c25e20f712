"""A training step of a large-class head: loss, gradients and the update of the class centres.

Rivals: the same in plain PyTorch with torch.optim.SGD on a dense gradient, and PartialFC's way,
which gathers the drawn rows, scatters their gradient into a dense one, and steps over all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses import backends
from fused_losses.bench.measure import Provider
from fused_losses.bench.micro.cases import MARGIN, SCALE, Case, backward, eager_arcface
from fused_losses.bench.micro.distillation_cases import eager_kl
from fused_losses.centers import ClassCenters, SphericalHead
from fused_losses.margins import ArcFace

RATE = 0.1
# the rate 0 keeps all tables equal: every provider does the whole update, and moves nothing
SGD: dict[str, Any] = dict(lr=0.0, momentum=0.9, weight_decay=5e-4)


def _ours(x: Tensor, y: Tensor, head: ClassCenters) -> Provider:
    return lambda: backward(head(x, y))


def _plain(
    x: Tensor,
    y: Tensor,
    table: Tensor,
    compiled: bool,
    formula: Callable[..., Tensor] = eager_arcface,
) -> Provider:
    weight = table.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], **SGD)
    loss = torch.compile(formula) if compiled else formula

    def step() -> Tensor:
        value = backward(loss(x, weight, y))
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def _partial(x: Tensor, y: Tensor, table: Tensor) -> Provider:
    weight = table.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], **SGD)
    generator = torch.Generator(x.device).manual_seed(0)
    # the labels' rows are all drawn, however few the rate asks for
    count = max(round(RATE * len(table)), len(y.unique()))

    def step() -> Tensor:
        draw = torch.rand(len(weight), device=x.device, generator=generator)
        index = draw.index_fill(0, y, 2.0).topk(count).indices.sort().values
        value = backward(eager_arcface(x, weight[index], torch.searchsorted(index, y)))
        optimizer.step()
        optimizer.zero_grad()
        return value

    return step


def _low_precisions(device: str) -> tuple[str, ...]:
    """("bf16",) where a backend has such products."""
    where = torch.device(device)
    names = ("cpu",) if where.type == "cpu" else ("triton", "cuda")
    able = any(not backends.reasons_against(b, where, torch.float32, "bf16") for b in names)
    return ("bf16",) if able else ()


def class_centers(n: int, c: int, d: int, device: str = "cpu", rivals: str = "all") -> Case:
    """n rows against c classes; the rivals need several copies of the table."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=device)).requires_grad_()
    y = torch.randint(0, c, (n,), device=device)
    options: dict[str, Any] = dict(
        margin=ArcFace(MARGIN, beyond_pi="none"),
        scale=SCALE,
        optimizer="sgd",
        optimizer_options=SGD,
        device=device,
    )
    heads = {
        "fused fp32": {},
        **{f"fused {p}": dict(precision=p) for p in _low_precisions(device)},
        "fused fp32, two sweeps (update='step')": dict(update="step"),
        f"fused fp32, r={RATE}": dict(sample_rate=RATE),
        f"fused fp32, r={RATE}, logQ": dict(sample_rate=RATE, log_q=True),
        f"fused bf16 table, r={RATE}": dict(sample_rate=RATE, dtype=torch.bfloat16),
    }
    steps: dict[str, Provider] = {}
    table: Tensor | None = None
    for name, more in heads.items():
        head = ClassCenters(c, d, **options, **more)
        table = head.weight if table is None else table
        steps[name] = _ours(x, y, head)
        if head.update_at == "step":
            steps[name] = _then_step(steps[name], head)
    if rivals != "none":
        assert table is not None
        steps["eager, dense SGD"] = _plain(x, y, table, compiled=False)
        if rivals == "all":
            steps["torch.compile, dense SGD"] = _plain(x, y, table, compiled=True)
        steps[f"PartialFC's way, r={RATE}"] = _partial(x, y, table)
    return Case(
        title=f"ClassCenters, a step with SGD and momentum, B={n}, C={c:,}, D={d}",
        providers=steps,
        ours=[name for name in steps if name.startswith("fused")],
        leaves=[x],
        flops=8 * n * c * d,
        bytes=6 * 4 * c * d,
        unlike=tuple(name for name in steps if f"r={RATE}" in name),
        flops_of="four products",
    )


def head_distillation(n: int, c: int, d: int, device: str = "cpu", rivals: str = "all") -> Case:
    """n rows against c classes of a student and of a frozen teacher of the same width, by KL."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=device)).requires_grad_()
    t = F.normalize(torch.randn(n, d, device=device))
    options: dict[str, Any] = dict(scale=SCALE, device=device)
    teacher = ClassCenters(c, d, seed=1, **options).requires_grad_(False)
    options |= dict(optimizer="sgd", optimizer_options=SGD)
    names = ("fp32", *_low_precisions(device))
    heads = {name: ClassCenters(c, d, **options, precision=name) for name in names}

    def of(head: ClassCenters) -> Provider:
        return lambda: backward(head.distillation(x, t, teacher))

    def eager(x: Tensor, w: Tensor, _: Tensor) -> Tensor:
        return eager_kl(
            SCALE * F.normalize(x), F.normalize(w), SCALE * t, F.normalize(teacher.weight)
        )

    steps = {f"fused {name}": of(head) for name, head in heads.items()}
    if rivals != "none":
        table = heads["fp32"].weight
        steps["eager, dense SGD"] = _plain(x, t, table, False, eager)
        if rivals == "all":
            steps["torch.compile, dense SGD"] = _plain(x, t, table, True, eager)
    return Case(
        title=f"ClassCenters.distillation (KL), a step with SGD, B={n}, C={c:,}, D={d}",
        providers=steps,
        ours=[f"fused {name}" for name in heads],
        leaves=[x],
        flops=6 * 2 * n * c * d,
        bytes=8 * 4 * c * d,
        flops_of="six products",
    )


def eager_z_loss(x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """The Z-loss on the N x C outputs."""
    outputs = x @ w.T
    deviation, mean = torch.std_mean(outputs, dim=1, correction=0)
    return F.softplus((mean - outputs.gather(1, y[:, None])[:, 0]) / deviation).mean()


def spherical_head(n: int, c: int, d: int, device: str = "cpu", rivals: str = "all") -> Case:
    """n rows against c classes under the Z-loss; beside it margin softmax, another loss."""
    torch.manual_seed(0)
    x = F.normalize(torch.randn(n, d, device=device)).requires_grad_()
    y = torch.randint(0, c, (n,), device=device)
    # at this rate, too, all tables stay equal
    head = SphericalHead(c, d, "z", lr=1e-30, device=device)
    steps = {"fused fp32": _then_step(lambda: backward(head(x, y)), head)}
    rate = dict(optimizer="sgd", optimizer_options=dict(lr=0.0), scale=SCALE, device=device)
    others = {"margin softmax": {}, f"margin softmax, r={RATE}": dict(sample_rate=RATE)}
    if rivals != "none":
        table = head.rows(torch.arange(c, device=device))
        steps["eager, dense SGD"] = _plain(x, y, table, False, eager_z_loss)
        if rivals == "all":
            steps["torch.compile, dense SGD"] = _plain(x, y, table, True, eager_z_loss)
        for name, more in others.items():
            steps[name] = _ours(x, y, ClassCenters(c, d, **rate, **more))
    return Case(
        title=f"SphericalHead, a step of the Z-loss with SGD, B={n}, C={c:,}, D={d}",
        providers=steps,
        ours=["fused fp32"],
        leaves=[x],
        # of the outputs, both gradients of the rows, and what a step changes
        flops=2 * (10 * n * d * d + 4 * n * n * d + 4 * d**3),
        bytes=8 * 10 * d * d + 4 * 4 * n * d,
        unlike=tuple(others),
        flops_of="D x D products in float64, none with all classes",
    )


def _then_step(step: Provider, head: ClassCenters | SphericalHead) -> Provider:
    optimizer = head.optimizer
    assert optimizer is not None

    def both() -> Tensor:
        value = step()
        optimizer.step()
        return value

    return both
