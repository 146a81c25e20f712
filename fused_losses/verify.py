"""`fused-losses verify`: every example on every backend that can run here, against float64 truth.

A person with a new machine runs this first; with --out the table is Markdown, to paste into an
issue. The bound of a row is what roundings can do at its inputs, whoever makes them: the float64
formula is run again with its roundings drawn anew (`base/disturbance.py`), and a result may be
four times as far from the truth as the largest of these movements (sixteen times with narrowed
products), and its own rounding. Movements are drawn until it is within, at most 32.
"""

from __future__ import annotations

import argparse
import platform
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.disturbance import LOWERED, Movement, distance, rounded_once
from fused_losses.base.examples import EXACT, TABLE, UNJUDGED, Example, ExampleInputs
from fused_losses.version import __version__

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("cpu", "triton", "cuda", "bounded")
VerifiedShape = tuple[int, int, int]  # rows, classes or columns, width
SMALL: VerifiedShape = (37, 173, 72)  # ragged for every tile
# a GPU also gets several tiles each way, in whole vectors and not
SHAPES: dict[str, tuple[VerifiedShape, ...]] = {
    "cpu": (SMALL,),
    "cuda": (SMALL, (256, 1024, 512), (130, 999, 320)),
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    backend: str
    dtype: str
    shape: VerifiedShape
    error: float
    bound: float
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


def _parts(result: object) -> list[Tensor]:
    """What a call returns, of that which has gradients; a sum over nothing is -inf."""
    parts = result if isinstance(result, tuple) else (result,)
    parts = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
    return [torch.where(part == -torch.inf, 0, part) for part in parts]


def _slopes(part: Tensor) -> Tensor:
    """Fixed slopes: every element counts."""
    return _waves(part.shape).to(part.device, part.dtype)


@lru_cache(maxsize=16)  # so that they are not disturbed, where the formula is
def _waves(shape: torch.Size) -> Tensor:
    return (torch.arange(shape.numel(), dtype=torch.float64) * 0.7).cos().view(shape)


def _precisions(example: Example) -> tuple[str, ...]:
    lowers = example.takes("precision") or example.takes("screen")
    return example.precisions if lowers else ("fp32",)


def _outcome(
    example: Example, inputs: ExampleInputs, backend: str, precision: str = "fp32"
) -> list[Tensor]:
    """What is compared: indices; or values and their gradients."""
    options = {"backend": backend, "precision": precision, "screen": precision}
    options = {name: value for name, value in options.items() if example.takes(name)}
    if example.bound == EXACT:
        result = example(inputs, **options)
        return [example.value(result) if example.value else result]
    leaves = [getattr(inputs, name).detach().requires_grad_() for name in example.leaves]
    vars(inputs).update(zip(example.leaves, leaves, strict=True))
    parts = _parts(example(inputs, **options))
    grads = torch.autograd.grad(parts, leaves, [_slopes(p) for p in parts], allow_unused=True)
    return [*(p.detach() for p in parts), *(grad for grad in grads if grad is not None)]


def devices() -> tuple[str, ...]:
    return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def rows(
    seed: int = 0,
    on: tuple[str, ...] | None = None,
    shapes: tuple[VerifiedShape, ...] | None = None,
) -> Iterator[Row]:
    """The table, a row at a time: of value and gradients that which is nearest its bound."""
    for device in on or devices():
        for shape in shapes or SHAPES[device]:
            for example in TABLE.values():
                if example.bound != UNJUDGED and example.takes("backend"):
                    yield from _of(example, seed, torch.device(device), shape)


def _of(example: Example, seed: int, device: torch.device, shape: VerifiedShape) -> Iterator[Row]:
    n, m, d = shape
    # one batch is larger than one side of two; the reference of triplets takes its cube
    sizes = (n + m // 4 if example.alone else n, m, d)
    for dtype in DTYPES:
        inputs = ExampleInputs(*sizes, dtype, seed=seed, device=device)
        # truth for the rounded inputs: the inputs' own rounding is nobody's error
        exact = ExampleInputs(*sizes, torch.float64, rounded=dtype, seed=seed, device=device)
        right = lambda exact=exact: _outcome(example, exact, backend="reference")
        truth = right()
        # mixed and bf16 narrow a factor alike
        moved = lru_cache(
            lambda lowered, right=right, truth=truth, dtype=dtype: Movement(
                right, truth, dtype, d, lowered=lowered
            )
        )
        for backend in BACKENDS:
            for precision in _precisions(example):
                # a screen of float64 rows may be narrow, too
                narrow = precision == "bf16" and example.takes("screen")
                told = torch.float32 if narrow else dtype
                if backend in example.not_on or backends.reasons_against(
                    backend, device, told, precision
                ):
                    continue
                got = _outcome(example, inputs, backend=backend, precision=precision)
                where = backend if device.type == "cpu" else f"{backend} ({device})"
                short = f"{str(dtype).removeprefix('torch.')}/{precision}"
                if example.bound == EXACT:
                    error, bound = _unequal(got, truth), 0.0
                else:
                    error, bound = _nearest_its_bound(got, truth, moved(LOWERED[precision]))
                yield Row(example.name, where, short, shape, error, bound)


def _unequal(got: list[Tensor], want: list[Tensor]) -> float:
    """Of what has one right answer, the share that is not it."""
    (found,), (right,) = got, want
    if found.shape != right.shape:
        return 1.0
    # numbers of few bits: a quotient of counts, rounded once; a NaN is near nothing
    near = (found.double() - right.double()).abs() <= 1e-6 * right.double().abs()
    return float((~near).double().mean())


def _nearest_its_bound(
    got: list[Tensor], want: list[Tensor], moved: Movement
) -> tuple[float, float]:
    """Relative error and bound, both in L2, of the part that is nearest its bound or beyond it."""
    sizes = [max(float(right.norm()), 1e-300) for right in want]
    errors = [distance(part, right) for part, right in zip(got, want, strict=True)]
    stored = [rounded_once(part, size) for part, size in zip(got, sizes, strict=True)]
    bounds = moved.bounds(errors, stored)
    found = [(e / s, b / s) for e, b, s in zip(errors, bounds, sizes, strict=True)]
    return max(found, key=lambda pair: pair[0] / max(pair[1], 1e-300))


def machine(on: tuple[str, ...]) -> str:
    """What the table was made on."""
    gpu = torch.cuda.get_device_name() if "cuda" in on else platform.machine()
    return f"fused_losses {__version__}, torch {torch.__version__}, {gpu}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: all that are here")
    parser.add_argument(
        "--shape",
        type=_shape,
        action="append",
        metavar="N,C,D",
        help="rows, classes, width; may be repeated (default: each op's own)",
    )
    parser.add_argument(
        "--out", type=Path, help="write the table as Markdown, too (default: no file)"
    )


def _shape(text: str) -> VerifiedShape:
    n, c, d = (int(part) for part in text.split(","))
    return n, c, d


def run(
    say: Callable[[str], None] = print,
    device: str | None = None,
    shapes: list[VerifiedShape] | None = None,
    out: Path | None = None,
) -> int:
    """Print the table; 0 if every row passes, 1 if one does not or the device is not there.

    Ctrl-C ends it with what was checked so far, and 130.
    """
    on = (device,) if device else devices()
    if not set(on) <= set(devices()):
        say(f"no {device} device: torch {torch.__version__} sees none")
        return 1
    say(machine(on))
    say(
        f"{'op':36s} {'backend':16s} {'dtype/precision':18s} {'shape':>14s} {'max error':>10s} "
        f"{'bound':>10s}"
    )
    found = []
    stopped = False
    try:
        for row in rows(on=on, shapes=tuple(shapes) if shapes else None):
            found.append(row)
            shape = "x".join(map(str, row.shape))
            say(
                f"{row.op:36s} {row.backend:16s} {row.dtype:18s} {shape:>14s} {row.error:10.1e} "
                f"{row.bound:10.1e} {_verdict(row)}"
            )
    except KeyboardInterrupt:  # what was checked stands
        stopped = True
    missing = [f"{name}: {state}" for name, state in backends.available().items() if state != "ok"]
    for line in missing:
        say(f"not checked: {line}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("\n".join(markdown(found, on, missing)) + "\n")
    failed = sum(not row.passed for row in found)
    say(f"{len(found) - failed} passed, {failed} failed")
    if stopped:
        say("stopped by Ctrl-C: what comes after these rows was not checked")
        return 128 + signal.SIGINT
    return 1 if failed or not found else 0


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
