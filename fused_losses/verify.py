"""`fused-losses verify`: every op on every backend that can run here, against float64 truth.

A person with a new machine runs this first; with --out the table is Markdown, to paste into an
issue. The bound of a row is the eager float error in the same dtype (times two, plus a floor): a
kernel may not be worse than plain PyTorch.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fused_losses import backends, functional
from fused_losses.class_losses import MLCD, ClassLoss, SFace, SphereFace2
from fused_losses.margins import ArcFace, CosFace, MVSoftmax
from fused_losses.primitives.distances import inputs as distances_inputs
from fused_losses.primitives.distances import op as distance_matrix
from fused_losses.primitives.maxsim.op import maxsim
from fused_losses.version import __version__

FLOOR = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}
LOWERED = 2e-2  # products in bf16 or tf32, relative L2 of the gradients
# near ties: rounded products may choose another token, another row, another side of a hinge
LOOSE = {"maxsim": 0.2}
# where a slope jumps a rounding may take a term across: of float32, and of lowered products
JUMPS = (
    "all_triplets",
    "batch_hard_triplet",
    "contrastive",
    "snr_contrastive",
    "ranked_list",
    "fast_ap",
    "histogram",
)
JUMP, LOWERED_JUMP = 5e-3, 0.2
K = 9  # neighbours
BACKENDS = ("cpu", "triton", "cuda", "bounded")
Shape = tuple[int, int, int]  # rows, classes or columns, width
SMALL: Shape = (37, 301, 72)  # ragged for every tile
# a GPU also gets several tiles each way, in whole vectors and not
SHAPES: dict[str, tuple[Shape, ...]] = {
    "cpu": (SMALL,),
    "cuda": (SMALL, (256, 1024, 512), (130, 999, 320)),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    backend: str
    dtype: str
    shape: Shape
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def _margin_softmax(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return functional.margin_softmax(x, w, y, margin=ArcFace(0.5), **options)


def _sampled(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    ids = torch.unique(torch.cat([y, torch.arange(0, w.shape[0], 3, device=y.device)]))
    return functional.margin_softmax(x, w, y, margin=CosFace(0.35), classes=ids, **options)


def _smoothed(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return functional.margin_softmax(x, w, y, label_smoothing=0.1, **options)


def _bent(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return functional.margin_softmax(x, w, y, margin=MVSoftmax("am"), scale=16.0, **options)


def _centres(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    """Three centres a class."""
    table = w[: len(w) // 3 * 3].unflatten(0, (-1, 3))
    return functional.margin_softmax(x, table, y % len(table), scale=16.0, **options)


def _class_loss(loss: ClassLoss) -> Callable[..., Tensor]:
    return lambda x, w, y, **options: functional.margin_softmax(x, w, y, margin=loss, **options)


def _several(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    labels = torch.stack([y, (y + 1) % len(w), torch.full_like(y, -100)], dim=1)
    return functional.margin_softmax(x, w, labels, margin=MLCD(16.0), **options)


def _linear(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return functional.linear_cross_entropy(x, w, y, **options).float()


# over pairs: x against w, or both as one batch with labels


def _batch(x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and labels: each label of x that of a row of w, several rows a label."""
    labels = torch.cat([y, torch.arange(w.shape[0], device=y.device)])
    return torch.cat([x, w]), labels % 29


def _over_pairs(fn: Callable[..., Tensor], **fixed: object) -> Callable[..., Tensor]:
    return lambda x, w, y, **options: fn(x, w, **fixed, **options)


def _over_a_batch(fn: Callable[..., Tensor], **fixed: object) -> Callable[..., Tensor]:
    return lambda x, w, y, **options: fn(*_batch(x, w, y), **fixed, **options)


def _info_nce(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    labels = {"labels": y % 29, "key_labels": torch.arange(w.shape[0], device=y.device) % 29}
    return functional.info_nce(
        x, w, **labels, symmetric=True, temperature=0.1, normalize=True, **options
    )


def _uniformity(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return functional.uniformity(_batch(x, w, y)[0], normalize=True, **options)


def _columns(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    rows, cols = functional.logsumexp_similarity(x, w, similarity="cosine", cols=True, **options)
    return rows.mean() + cols.mean()


def _attention(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    return functional.similarity_attention(x, w, w, **options).float().square().sum()


def _maxsim(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
    documents = w[: len(w) // 20 * 20].unflatten(0, (20, -1))
    return maxsim(x[None], documents, **options).sum()


# matrices of distances: against fixed slopes, so that every element counts


def _slopes(out: Tensor) -> Tensor:
    n, m = out.shape
    steps = torch.arange(n * m, device=out.device, dtype=out.dtype).view(n, m)
    return (steps * 0.7).cos()


def _distances(kind: str) -> Callable[..., Tensor]:
    """The matrix of a kind, for entries that its meaning asks for, and with its gradient a sum."""

    def op(x: Tensor, w: Tensor, y: Tensor, **options: object) -> Tensor:
        weights = None
        if kind in ("jensenshannon", "kl"):
            x, w = x.abs() + 0.01, w.abs() + 0.01
            x, w = (t / t.sum(dim=1, keepdim=True) for t in (x, w))
        elif kind == "scaled":
            weights = w.detach().square()
        out = distance_matrix.distance_matrix(x, w, weights, kind=kind, p=3.0, **options)
        return (out * _slopes(out)).sum()

    return op


def _counted(kind: str) -> Callable[..., Tensor]:
    """hamming and jaccard of signs, which have no gradient."""

    def op(x: Tensor, w: Tensor, y: Tensor, backend: str) -> Tensor:
        x, w = (torch.where(t > 0, t.sign(), 0) for t in (x, w))
        return distance_matrix.distance_matrix(x, w, kind=kind, backend=backend)

    return op


def _neighbours(kind: str, screen: str, own: bool = False) -> Callable[..., Tensor]:
    """Indices, which must be those of float64 whatever screens."""

    def op(x: Tensor, w: Tensor, y: Tensor, backend: str) -> Tensor:
        labels = dict(x_labels=torch.arange(len(w), device=w.device) % 29, match="different")
        given = (w, None) if own else (x, w)
        options = dict(skip_self=True, **labels) if own else {}
        return functional.pairwise_topk(*given, K, kind, screen=screen, backend=backend, **options)[
            1
        ]

    return op


def _mined(x: Tensor, w: Tensor, y: Tensor, backend: str) -> Tensor:
    """Anchors, positives and negatives, [3, T]."""
    return torch.stack(functional.mine_triplets(*_batch(x, w, y), backend=backend)[:3])


OPS: dict[str, Callable[..., Tensor]] = {
    "margin_softmax": _margin_softmax,
    "margin_softmax, classes": _sampled,
    "margin_softmax, smoothing": _smoothed,
    "margin_softmax, MV-Softmax": _bent,
    "margin_softmax, sub-centres": _centres,
    "margin_softmax, several labels": _several,
    "SFace": _class_loss(SFace()),
    "SphereFace2": _class_loss(SphereFace2(0.3)),
    "linear_cross_entropy": _linear,
    "info_nce": _over_pairs(functional.info_nce, temperature=0.1, normalize=True),
    "info_nce, labels, symmetric": _info_nce,
    "sigmoid_contrastive": _over_pairs(functional.sigmoid_contrastive, normalize=True),
    "supervised_contrastive": _over_a_batch(functional.supervised_contrastive, normalize=True),
    "nt_xent, pairs": _over_a_batch(functional.nt_xent, form="pairs", normalize=True),
    "soft_nearest_neighbor": _over_a_batch(functional.soft_nearest_neighbor, normalize=True),
    "multi_similarity": _over_a_batch(functional.multi_similarity, normalize=True),
    "circle": _over_a_batch(functional.circle, normalize=True),
    "lifted_structure": _over_a_batch(functional.lifted_structure, normalize=True),
    "proxy_anchor": lambda x, w, y, **options: functional.proxy_anchor(
        x, w, y, normalize=True, **options
    ),
    "kernel_mean": _over_pairs(functional.kernel_mean, bandwidth=8.0),
    "uniformity": _uniformity,
    "logsumexp_similarity": _columns,
    "similarity_attention": _attention,
    "maxsim": _maxsim,
    **{
        f"distances, {kind}": _distances(kind)
        for kind in distances_inputs.KINDS
        if kind not in distances_inputs.FLAT
    },
    "all_triplets": _over_a_batch(functional.all_triplets, normalize=True, margin=0.2),
    "all_triplets, smooth": _over_a_batch(functional.all_triplets, normalize=True, smooth=True),
    "batch_hard_triplet": _over_a_batch(functional.batch_hard_triplet, normalize=True),
    "contrastive": _over_a_batch(functional.contrastive, normalize=True, negative_margin=1.5),
    "snr_contrastive": _over_a_batch(functional.snr_contrastive, negative_margin=2.0),
    "tuplet_margin": _over_a_batch(functional.tuplet_margin, normalize=True, scale=8.0),
    "ranked_list": _over_a_batch(functional.ranked_list, normalize=True, alpha=1.5),
    "fast_ap": _over_a_batch(functional.fast_ap, normalize=True),
    "histogram": _over_a_batch(functional.histogram, normalize=True, bins=20),
}

# no products to round, and no Triton kernels
WITHOUT_PRODUCTS = {f"distances, {k}" for k in distances_inputs.KINDS} - {
    f"distances, {k}" for k in distances_inputs.PRODUCTS
}
# what has no gradient and one right answer: the error is the share of elements that are not it
EXACT: dict[str, Callable[..., Tensor]] = {
    **{f"topk, {kind}": _neighbours(kind, "fp32") for kind in ("dot", "euclidean", "cosine")},
    "topk, bf16 screen": _neighbours("euclidean", "bf16"),
    "topk, own rows": _neighbours("dot", "fp32", own=True),
    "batch-hard mining": _mined,
    **{f"distances, {kind}": _counted(kind) for kind in distances_inputs.FLAT},
}


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-300))


def _gradients(op: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor, **options: object):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = op(x, w, y, **options)
    loss.backward()
    return loss.detach(), x.grad, w.grad


def _inputs(seed: int, device: str, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, c, d = shape
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    w = torch.randn(c, d, generator=generator, dtype=torch.float64)
    y = torch.randint(0, c, (n,), generator=generator)
    return x.to(device), w.to(device), y.to(device)


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def rows(
    seed: int = 0, on: tuple[str, ...] | None = None, shapes: tuple[Shape, ...] | None = None
) -> Iterator[Row]:
    """The table, a row at a time: the worst of loss, dx and dw in relative L2."""
    for device in on or devices():
        for shape in shapes or SHAPES[device]:
            for name, op in OPS.items():
                yield from _of_op(name, op, *_inputs(seed, device, shape))
            for name, op in EXACT.items():
                yield from _exactly(name, op, *_inputs(seed, device, shape))


def _of_op(name: str, op: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor) -> Iterator[Row]:
    for dtype, floor in FLOOR.items():
        cast = (x.to(dtype), w.to(dtype), y)
        # truth for the rounded inputs: the inputs' own rounding is nobody's error
        truth = _gradients(op, cast[0].double(), cast[1].double(), y, backend="reference")
        eager = _gradients(op, *cast, backend="reference")
        eager_error = max(_relative(a, b) for a, b in zip(eager, truth, strict=True))
        for backend in BACKENDS:
            for precision in ("fp32", "tf32", "mixed", "bf16"):
                if backends.reasons_against(backend, x.device, dtype, precision):
                    continue
                if name in WITHOUT_PRODUCTS and (precision != "fp32" or backend == "triton"):
                    continue
                jumps = name in JUMPS
                bound = 2 * eager_error + (max(floor, JUMP) if jumps else floor)
                if precision != "fp32":
                    bound = max(bound, LOWERED_JUMP if jumps else LOOSE.get(name, LOWERED))
                got = _gradients(op, *cast, backend=backend, precision=precision)
                error = max(_relative(a, b) for a, b in zip(got, truth, strict=True))
                yield _row(name, backend, dtype, precision, x, w, error, bound)


def _row(
    name: str,
    backend: str,
    dtype: torch.dtype,
    precision: str,
    x: Tensor,
    w: Tensor,
    error: float,
    bound: float,
) -> Row:
    where = backend if x.device.type == "cpu" else f"{backend} ({x.device})"
    short = f"{str(dtype).removeprefix('torch.')}/{precision}"
    return Row(name, where, short, (len(x), *w.shape), error, bound)


def _exactly(
    name: str, op: Callable[..., Tensor], x: Tensor, w: Tensor, y: Tensor
) -> Iterator[Row]:
    precision = "bf16" if "bf16" in name else "fp32"
    for dtype in FLOOR:
        cast = (x.to(dtype), w.to(dtype), y)
        plain = EXACT[name.replace("bf16 screen", "euclidean")]
        want = plain(cast[0].double(), cast[1].double(), y, backend="reference")
        for backend in BACKENDS:
            # a screen of float64 rows may be narrow, too
            screened = torch.float32 if precision == "bf16" else dtype
            if backends.reasons_against(backend, x.device, screened, precision):
                continue
            if name in WITHOUT_PRODUCTS and backend == "triton":
                continue
            got = op(*cast, backend=backend)
            error = 1.0
            if got.shape == want.shape:
                # numbers of few bits: a quotient of counts, rounded once
                apart = (got.double() - want.double()).abs() > 1e-6 * want.double().abs()
                error = float(apart.double().mean())
            yield _row(name, backend, dtype, precision, x, w, error, 0.0)


def machine(on: tuple[str, ...]) -> str:
    """What the table was made on."""
    gpu = torch.cuda.get_device_name() if "cuda" in on else platform.machine()
    return f"fused_losses {__version__}, torch {torch.__version__}, {gpu}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all that are here")
    parser.add_argument("--shape", type=_shape, action="append", metavar="N,C,D",
                        help="rows, classes, width; may be repeated")  # fmt: skip
    parser.add_argument("--out", type=Path, help="write the table as Markdown, too")


def _shape(text: str) -> Shape:
    n, c, d = (int(part) for part in text.split(","))
    return n, c, d


def run(
    say: Callable[[str], None] = print,
    device: str | None = None,
    shapes: list[Shape] | None = None,
    out: Path | None = None,
) -> int:
    """Print the table; 0 if every row passes, 1 if one does not or the device is not there."""
    on = (device,) if device else devices()
    if not set(on) <= set(devices()):
        say(f"no {device} device: torch {torch.__version__} sees none")
        return 1
    say(machine(on))
    say(
        f"{'op':28s} {'backend':16s} {'dtype/precision':18s} {'shape':>14s} {'max error':>10s} "
        f"{'bound':>10s}"
    )
    found = []
    for row in rows(on=on, shapes=tuple(shapes) if shapes else None):
        found.append(row)
        shape = "x".join(map(str, row.shape))
        say(
            f"{row.op:28s} {row.backend:16s} {row.dtype:18s} {shape:>14s} {row.error:10.1e} "
            f"{row.bound:10.1e} {_verdict(row)}"
        )
    missing = [f"{name}: {state}" for name, state in backends.available().items() if state != "ok"]
    for line in missing:
        say(f"not checked: {line}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(markdown(found, on, missing)) + "\n")
    return 0 if all(row.passed for row in found) else 1


def _verdict(row: Row) -> str:
    return "pass" if row.passed else "FAIL"


def markdown(found: list[Row], on: tuple[str, ...], missing: list[str]) -> list[str]:
    """The table in short: the worst row of each op on a backend in a dtype, over the shapes."""
    failed = [row for row in found if not row.passed]
    lines = [
        f"{machine(on)}: {len(found)} rows, {len(failed)} failed.",
        "",
        "| op | backend | dtype/precision | worst error | bound | at | |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found:
        groups.setdefault((row.op, row.backend, row.dtype), []).append(row)
    for (op, backend, dtype), members in groups.items():
        # the row nearest to its bound, or beyond it; NaN is beyond
        worst = max(members, key=lambda r: (not r.passed, r.error - r.bound))
        shape = "x".join(map(str, worst.shape))
        lines.append(
            f"| {op} | {backend} | {dtype} | {worst.error:.1e} | {worst.bound:.1e} | {shape} "
            f"| {_verdict(worst)} |"
        )
    return [*lines, "", *(f"Not checked: {line}." for line in missing)]
