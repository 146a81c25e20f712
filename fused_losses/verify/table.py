"""The table of `fused-losses verify`: its steps, and the rows that a step gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.disturbance import LOWERED, Movement, distance, rounded_once
from fused_losses.base.examples import EXACT, TABLE, UNJUDGED, Example, ExampleInputs
from fused_losses.base.records import told
from fused_losses.verify.forms import KernelForm, LittleRoom, forms, within

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
    note: str = ""  # why there is no number

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


class Chosen(NamedTuple):
    """What of the table is checked; None: all."""

    ops: tuple[str, ...] | None = None  # names of rows, or of functions with all their rows
    backends: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None

    def takes(self, name: str) -> bool:
        return self.ops is None or name in self.ops or name.partition(", ")[0] in self.ops


ALL = Chosen()


class VerifyStep(NamedTuple):
    """One example at one shape on one device."""

    example: Example
    device: torch.device
    shape: VerifiedShape
    dtypes: tuple[torch.dtype, ...] = DTYPES
    room: LittleRoom | None = None  # less memory than usual for partial results
    backends: tuple[str, ...] = BACKENDS


class DeviceLost(RuntimeError):
    """A device takes no more work, as after an illegal address; row: the call that it was."""

    def __init__(self, row: Row) -> None:
        what = f"{row.op} on {row.backend}, {row.dtype}, {_by(row.shape)}"
        super().__init__(f"the device takes no more work after {what}: {row.note}")
        self.row = row


def judged(example: Example) -> bool:
    """Whether a formula can judge what a backend gives."""
    return example.bound != UNJUDGED and example.takes("backend")


def _parts(result: object) -> list[Tensor]:
    """What a call returns, of that which has gradients; a sum over nothing is -inf."""
    parts = result if isinstance(result, tuple) else (result,)
    parts = [part for part in parts if isinstance(part, Tensor) and part.requires_grad]
    return [torch.where(part == -torch.inf, 0, part) for part in parts]


def _slopes(part: Tensor) -> Tensor:
    """Fixed slopes: every element counts."""
    return _waves(part.shape, part.device).to(part.dtype)


# so that they are not disturbed, where the formula is, and are copied to a device once
@lru_cache(maxsize=16)
def _waves(shape: torch.Size, device: torch.device) -> Tensor:
    waves = (torch.arange(shape.numel(), dtype=torch.float64) * 0.7).cos().view(shape)
    return waves.to(device)


def _precisions(example: Example) -> tuple[str, ...]:
    lowers = example.takes("precision") or example.takes("screen")
    return example.precisions if lowers else ("fp32",)


def outcome(
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


def steps(
    on: Sequence[str] | None = None,
    shapes: Sequence[VerifiedShape] | None = None,
    chosen: Chosen = ALL,
) -> list[VerifyStep]:
    """What is checked, in order; without shapes also those that reach a GPU's other forms."""
    found = []
    for name in on or devices():
        device = torch.device(name)
        found += [
            VerifyStep(example, device, shape)
            for shape in shapes or SHAPES[device.type]
            for example in TABLE.values()
            if judged(example) and chosen.takes(example.name)
        ]
        if device.type == "cuda" and not shapes:
            found += [
                _reaching(form, device)
                for form in forms(torch.cuda.get_device_properties(device).multi_processor_count)
                if form.example in TABLE and chosen.takes(form.example)
            ]
    return found


def _reaching(form: KernelForm, device: torch.device) -> VerifyStep:
    example = TABLE[form.example]
    return VerifyStep(example, device, form.shape, (form.dtype,), form.room, (form.backend,))


def rows(
    seed: int = 0,
    on: Sequence[str] | None = None,
    shapes: Sequence[VerifiedShape] | None = None,
    chosen: Chosen = ALL,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[Row]:
    """The table, a row at a time: of value and gradients that which is nearest its bound.

    A call that raises is a row that fails. Raises `DeviceLost` where a device takes no more work.
    """
    planned = steps(on, shapes, chosen)
    for index, step in enumerate(planned):
        say(f"{index + 1} of {len(planned)}: {step.example.name}, {_by(step.shape)}")
        yield from of(step, chosen, seed)


def of(step: VerifyStep, chosen: Chosen = ALL, seed: int = 0) -> Iterator[Row]:
    """The rows of one step."""
    example, device, shape = step.example, step.device, step.shape
    n, m, d = shape
    # one batch is larger than one side of two; the reference of triplets takes its cube
    sizes = (n + m // 4 if example.alone else n, m, d)
    for dtype in step.dtypes:
        if chosen.dtypes and dtype not in chosen.dtypes:
            continue
        asked = [name for name in step.backends if name in (chosen.backends or BACKENDS)]
        calls = list(_calls(example, device, dtype, asked))
        if not calls:
            continue
        try:
            exact = ExampleInputs(*sizes, torch.float64, rounded=dtype, seed=seed, device=device)
            truth = Truth(example, exact)
        except Exception as error:  # there is nothing to judge by
            yield _failed(step, "reference", f"{_short(dtype)}/fp32", error)
            continue
        inputs = ExampleInputs(*sizes, dtype, seed=seed, device=device)
        for backend, precision in calls:
            what = f"{_short(dtype)}/{precision}"
            try:
                with within(step.room):
                    got = outcome(example, inputs, backend=backend, precision=precision)
                error, bound = truth.judge(got, precision)
                found = Row(example.name, _where(backend, device), what, shape, error, bound)
            except Exception as raised:
                found = _failed(step, backend, what, raised)
            # outside of the try: what the caller raises at a row is its own
            yield found


def _calls(
    example: Example, device: torch.device, dtype: torch.dtype, asked: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Of the backends that are asked for those that can take the example's call, and how."""
    for backend in asked:
        for precision in _precisions(example):
            # a screen of float64 rows may be narrow, too
            narrow = precision == "bf16" and example.takes("screen")
            held = torch.float32 if narrow else dtype
            if backend not in example.not_on and not backends.reasons_against(
                backend, device, held, precision
            ):
                yield backend, precision


class Truth:
    """The float64 formula of an example's inputs, and how far roundings move it."""

    def __init__(self, example: Example, exact: ExampleInputs) -> None:
        """exact: inputs in float64, rounded as a backend's are: that rounding is nobody's error."""
        self._right = lambda: outcome(example, exact, backend="reference")
        self._dtype, self._width = exact.rounded, exact.d
        self._exact = example.bound == EXACT
        self.parts = self._right()
        # mixed and bf16 narrow a factor alike
        self._moved: dict[float, Movement] = {}

    def judge(self, got: list[Tensor], precision: str = "fp32") -> tuple[float, float]:
        """Error and bound."""
        if self._exact:
            return _unequal(got, self.parts), 0.0
        lowered = LOWERED[precision]
        if lowered not in self._moved:
            self._moved[lowered] = Movement(
                self._right, self.parts, self._dtype, self._width, lowered=lowered
            )
        return _nearest_its_bound(got, self.parts, self._moved[lowered])


def _failed(step: VerifyStep, backend: str, what: str, error: Exception) -> Row:
    """A row of a call that raised; raises where the device takes no more work after it."""
    where = _where(backend, step.device)
    row = Row(step.example.name, where, what, step.shape, float("inf"), 0.0, told(error))
    if step.device.type == "cuda":
        try:
            torch.cuda.synchronize(step.device)
        except Exception as lost:
            raise DeviceLost(row) from lost
    return row


def _where(backend: str, device: torch.device) -> str:
    return backend if device.type == "cpu" else f"{backend} ({device})"


def _by(shape: VerifiedShape) -> str:
    return "x".join(map(str, shape))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
