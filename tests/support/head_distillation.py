"""Distillations of heads over ranks, and the same as literal formulas on whole matrices."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from distillation_formulas import TEMPERATURE, of_scores
from rank_heads import COUNTS, own
from torch import Tensor, nn

from fused_losses.centers import ClassCenters
from fused_losses.centers.sampling import sample
from fused_losses.centers.storage import INITIAL_STD

C, D, T = 23, 6, 5  # classes, and the widths of a student and of its teacher
RATE = 0.5
SAMPLED: dict[str, Any] = {"sample_rate": RATE, "seed": 3}
BIAS: dict[str, Any] = {"margin": None, "normalize": False, "bias": True}
LEARNS: dict[str, Any] = {"scale": nn.Parameter(torch.tensor(3.0, dtype=torch.float64))}


class Case(NamedTuple):
    """One distillation."""

    call: dict[str, Any]
    head: dict[str, Any] | None = None
    teacher: str = "rows"  # "head": a frozen ClassCenters
    bare: bool = False  # without labels


CASES: dict[str, Case] = {
    "kl": Case(dict(kind="kl", temperature=2.0)),
    "kl of all rows": Case(dict(kind="kl"), bare=True),
    "reverse": Case(dict(kind="reverse_kl"), dict(normalize=False, scale=0.7)),
    "jsd": Case(dict(kind="jsd", beta=0.3, temperature=3.0)),
    "tv": Case(dict(kind="tv", teacher_scale=2.0)),
    "soft": Case(dict(kind="soft_ce", teacher_normalize=True, teacher_scale=5.0)),
    "pskd": Case(dict(kind="pskd", alpha=0.3)),
    "dkd": Case(dict(kind="dkd", temperature=1.5)),
    "ofa": Case(dict(kind="ofa", eps=1.5)),
    "bernoulli": Case(dict(kind="bernoulli")),
    "bernoulli, cut": Case(dict(kind="bernoulli", eps=0.2)),
    "bernoulli_norm": Case(dict(kind="bernoulli_norm")),
    "mse": Case(dict(kind="mse")),
    "a head's": Case(dict(kind="kl", temperature=4.0), teacher="head"),
    "a scale that learns": Case(dict(kind="dkd", temperature=2.0), LEARNS),
    "biases": Case(dict(kind="jsd", teacher_bias=True), {**BIAS, **LEARNS}),
    "a sample": Case(dict(kind="kl"), SAMPLED),
    "a sample of all rows": Case(dict(kind="mse"), SAMPLED, bare=True),
    **{
        f"{kind}, corrected": Case(dict(kind=kind, temperature=1.5), {**SAMPLED, "log_q": True})
        for kind in ("kl", "jsd", "ofa", "dkd", "bernoulli")
    },
}


def head(name: str, **more: Any) -> ClassCenters:
    defaults: dict[str, Any] = dict(
        dtype=torch.float64, scale=4.0, chunk_bytes=4 * D * 8, seed=3, gradient_scale="global_sum"
    )
    options = {**defaults, **(CASES[name].head or {}), **more}
    if isinstance(options["scale"], Tensor):
        options["scale"] = nn.Parameter(options["scale"].detach().clone())
    made = ClassCenters(C, D, **options)
    if made.has_bias:
        with torch.no_grad():
            shard = slice(made.class_start, made.class_start + made.num_local)
            made.weight[:, -1] = torch.linspace(-1, 1, C, dtype=torch.float64)[shard]
    return made


# ---- near agreement ----

NEAR = ("kl", "reverse_kl", "jsd", "tv", "mse", "bernoulli_norm", "dkd")
MANY, WIDE = 2000, 32


def near(kind: str, apart: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Loss and gradient of a float32 head, its teacher a copy that is apart by so much; 0 rows of
    a batch on all ranks but the first."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    options: dict[str, Any] = dict(scale=8.0, seed=2, chunk_bytes=300 * WIDE * 4)
    made = ClassCenters(MANY, WIDE, **options, gradient_scale="global_sum")
    teacher = ClassCenters(MANY, WIDE, **options).requires_grad_(False)
    shard = slice(made.class_start, made.class_start + made.num_local)
    teacher.weight.add_(apart * near_noise()[shard])
    x = near_rows()[: 16 if rank == 0 else 0].clone().requires_grad_()
    labels = torch.arange(16)[: len(x)]
    loss = made.distillation(x, x.detach(), teacher, kind=kind, labels=labels, temperature=1.0)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def near_rows() -> Tensor:
    return torch.randn(16, WIDE, generator=torch.Generator().manual_seed(4))


def near_noise() -> Tensor:
    return INITIAL_STD * torch.randn(MANY, WIDE, generator=torch.Generator().manual_seed(5))


def literally_near(kind: str, apart: float = 1e-3) -> tuple[Tensor, Tensor]:
    made = ClassCenters(MANY, WIDE, scale=8.0, seed=2)
    table = made.weight.detach()
    of_teacher = (table + apart * near_noise()).double()
    x = near_rows().double().requires_grad_()
    u = 8 * unit(x) @ unit(table.double()).T
    v = 8 * unit(x.detach()) @ unit(of_teacher).T
    loss = of_scores(kind, u, v, torch.arange(16), 1.0).mean()
    (dx,) = torch.autograd.grad(loss, x)
    return loss.detach(), dx


# ---- what is refused on one rank ----

FAULTS = ("gradient", "width", "kinds", "labels")


def refusal(rank: int, fault: str) -> str:
    """What a rank says where the second one is at fault."""
    made, whole = head("kl"), batch()
    here = rank == 1
    weight = whole.table[made.class_start : made.class_start + made.num_local].clone()
    if fault == "gradient" and here:
        weight.requires_grad_()
    t = whole.t[:3, :-1] if fault == "width" and here else whole.t[:3]
    kind = "tv" if fault == "kinds" and here else "kl"
    labels = whole.labels[:3] if fault == "labels" and here else None
    try:
        made.distillation(whole.x[:3], t, weight, kind=kind, labels=labels)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


# ---- batches, and the same as literal formulas ----


class Batch(NamedTuple):
    """Of all ranks."""

    x: Tensor  # [N, D]
    t: Tensor  # [N, T]
    labels: Tensor  # [N]
    weights: Tensor  # [N] of rows
    table: Tensor  # [C, T] the teacher's
    bias: Tensor  # [C]


def batch(step: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(50 + step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    n = sum(COUNTS[1])
    labels = torch.randint(0, C, (n,), generator=generator)
    labels[2] = -100
    return Batch(normal(n, D), normal(n, T), labels, normal(n).abs(), normal(C, T), normal(C))


def teacher_head() -> ClassCenters:
    return ClassCenters(C, T, dtype=torch.float64, scale=9.0, seed=8).requires_grad_(False)


def call(made: ClassCenters, name: str, x: Tensor, t: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """This rank's part of a case."""
    case, whole = CASES[name], batch()  # one teacher's table, whatever the step
    shard = slice(made.class_start, made.class_start + made.num_local)
    options = dict(case.call)
    if options.pop("teacher_bias", False):
        options["teacher_bias"] = whole.bias[shard]
    if not case.bare:
        options["labels"] = y
    weight = teacher_head() if case.teacher == "head" else whole.table[shard]
    return made.distillation(x, t, weight, row_weight=w, **options)


def found(rank: int, name: str) -> dict[str, Tensor]:
    """Loss and gradients of one rank."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    made = head(name)
    whole = batch()
    x, t, y, w = own(rank, world, *whole[:4])
    x.requires_grad_()
    loss = call(made, name, x, t, y, w)
    (2 * loss).backward()
    gradient = made.weight.grad
    assert x.grad is not None and gradient is not None
    gradient = gradient.to_dense() if gradient.is_sparse else gradient
    told = {"loss": loss.detach(), "dx": x.grad, "dw": gradient}
    return told | ({"ds": made.scale.grad} if isinstance(made.scale, Tensor) else {})


def all_found(rank: int) -> dict[str, Any]:
    """Every case, every update, near agreement, and what is refused, in one group."""
    told: dict[str, Any] = {name: found(rank, name) for name in CASES}
    told["trained"] = {update: trained(rank, update) for update in UPDATES}
    told["near"] = {kind: near(kind) for kind in NEAR}
    return told | {"refused": [refusal(rank, fault) for fault in FAULTS]}


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


def literal(name: str) -> dict[str, Tensor]:
    """The same by whole matrices, which nothing of the package is used for but rows and draws."""
    made, whole = head(name), batch()
    x = whole.x.clone().requires_grad_()
    table = made.weight.detach().clone().requires_grad_()
    scale = torch.as_tensor(made.scale, dtype=torch.float64).detach().clone().requires_grad_()
    loss = literal_loss(name, made, whole, x, table, scale)
    dx, dw, ds = torch.autograd.grad(2 * loss, (x, table, scale))
    told = {"loss": loss.detach(), "dx": dx, "dw": dw}
    return told | ({"ds": ds} if isinstance(made.scale, Tensor) else {})


def literal_loss(
    name: str, made: ClassCenters, whole: Batch, x: Tensor, table: Tensor, scale: Tensor
) -> Tensor:
    case, options = CASES[name], dict(CASES[name].call)
    kind = options.pop("kind")
    temperature = options.pop("temperature", TEMPERATURE.get(kind, 1.0))
    rows, classes = x, table[:, :D]
    if made.normalize:
        rows, classes = unit(rows), unit(classes)
    u = scale * rows @ classes.T + (table[:, D] if made.has_bias else 0)
    t, wt, teacher_scale = whole.t, whole.table, options.pop("teacher_scale", 1.0)
    normalize = options.pop("teacher_normalize", False)
    if case.teacher == "head":
        frozen = teacher_head()
        wt, teacher_scale, normalize = frozen.weight, float(frozen.scale), True
    if normalize:
        t, wt = unit(t), unit(wt)
    v = teacher_scale * t @ wt.T + (whole.bias if options.pop("teacher_bias", False) else 0)
    valid = torch.ones(len(x), dtype=torch.bool) if case.bare else whole.labels >= 0
    u, v, weights = u[valid] / temperature, v[valid] / temperature, whole.weights[valid]
    labels = whole.labels[valid].clamp_min(0)
    times = torch.ones(C, dtype=torch.int64)
    options_of_head = case.head or {}
    if "sample_rate" in options_of_head:
        drawn = sample(0, C, RATE, seed=3, step=0)
        times = torch.zeros_like(times).index_fill(0, drawn, 2 if "log_q" in options_of_head else 1)
        times = times if case.bare else times.index_fill(0, labels, 1)
    # a class that counts twice is two equal classes
    ids = torch.arange(C).repeat_interleave(times)
    place = torch.searchsorted(ids, labels)
    each = of_scores(kind, u[:, ids], v[:, ids], place, temperature, **options)
    return (weights * each).sum() / weights.sum()


SGD = dict(lr=0.3, momentum=0.9, weight_decay=0.01)
UPDATES: dict[str, dict[str, Any]] = {
    "inside backward": {},
    "apart": dict(update="step"),
    "beside its own loss": dict(every=2),
    "clipped": dict(max_grad_norm=0.1),
}


def trained(rank: int, update: str) -> Tensor:
    """This rank's rows after three steps of a distillation, or of it and the head's own loss."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    made = head("kl", optimizer="sgd", optimizer_options=SGD, **UPDATES[update])
    for step in range(3):
        x, t, y, w = own(rank, world, *batch(step)[:4])
        x.requires_grad_()
        loss = call(made, "kl", x, t, y, w)
        loss = loss + made(x, y, row_weight=w) if made.every == 2 else loss
        loss.backward()
        made.optimizer.step()
    return made.weight.clone()


def literally_trained(update: str) -> Tensor:
    """By torch.optim.SGD on the whole table."""
    made = head("kl")
    table, scale = made.weight.detach().clone().requires_grad_(), torch.tensor(4.0).double()
    optimizer = torch.optim.SGD([table], **SGD)
    for step in range(3):
        whole = batch(step)._replace(table=batch().table)
        loss = literal_loss("kl", made, whole, whole.x, table, scale)
        if "every" in UPDATES[update]:
            loss = loss + literal_arcface(whole, table, 4.0)
        optimizer.zero_grad()
        loss.backward()
        if "max_grad_norm" in UPDATES[update]:
            torch.nn.utils.clip_grad_norm_([table], UPDATES[update]["max_grad_norm"])
        optimizer.step()
    return table.detach()


def literal_arcface(whole: Batch, table: Tensor, scale: float) -> Tensor:
    """The default margin, 0.5, of cosines whose angle stays below pi - 0.5."""
    valid = whole.labels >= 0
    y, w = whole.labels[valid], whole.weights[valid]
    cosine = unit(whole.x[valid]) @ unit(table).T
    own = cosine.gather(1, y[:, None])
    assert bool((own.acos() < torch.pi - 0.5).all())
    moved = cosine.scatter(1, y[:, None], (own.acos() + 0.5).cos())
    each = torch.nn.functional.cross_entropy(scale * moved, y, reduction="none")
    return (w * each).sum() / w.sum()
