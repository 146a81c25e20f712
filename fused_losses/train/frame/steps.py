"""The way through a training's steps: learning rates, checkpoints, and a stop when one is asked."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fused_losses.base.validation import describe
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.files import RunFileError
from fused_losses.train.frame.memory import PeakMemory
from fused_losses.train.frame.options import Config
from fused_losses.train.frame.progress import Progress
from fused_losses.train.frame.runs import CHECKPOINT, Run

C = TypeVar("C", bound=Config)


class Interrupted(Exception):
    """The run was asked to stop by a signal; its checkpoint is written."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"stopped by signal {signal}; resume goes on from here")
        self.signal = signal


def learning_rate_factor(step: int, config: Config) -> float:
    """The share of the peak rate at `step`: a linear rise, then the schedule down to 0."""
    rise = round(config.warmup * config.steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(1, config.steps - rise)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if config.schedule == "linear" else 1.0


def set_rates(peaks: Iterable[tuple[Optimizer, float]], factor: float) -> None:
    """Each optimiser's rate: its peak times the factor."""
    for optimizer, peak in peaks:
        for group in optimizer.param_groups:
            group["lr"] = peak * factor


def go_through(
    first: int,
    last: int,
    step: Callable[[int], object],
    *,
    due: Callable[[int], bool],
    save: Callable[[int], object],
    asked: Callable[[], int | None] = lambda: None,
) -> None:
    """Steps [first, last), with `save(steps done)` where that is `due`.

    asked: the signal that wants the run to stop, if one came: then the state is saved, and
    `Interrupted` raised.
    """
    for number in range(first, last):
        step(number)
        signal = asked()
        if signal or due(number + 1):
            save(number + 1)
        if signal:
            raise Interrupted(signal)


def numbers(state: dict[str, Any], key: str) -> list[float]:
    """A curve that a state holds: finite float64 values [n]."""
    value = state[key]
    if not isinstance(value, Tensor) or value.dim() != 1 or value.dtype != torch.float64:
        got = describe(value) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{key}: expected float64 values [n], got {got}")
    if not value.isfinite().all():
        raise ValueError(f"{key}: expected finite values, got others")
    return value.tolist()


class Training(ABC, Generic[C]):
    """Everything that a step changes, and what a checkpoint must hold."""

    peaks: tuple[tuple[Optimizer, float], ...]  # optimisers and their peak learning rates

    def __init__(self, config: C, **which: object) -> None:
        """which: tells it from the other trainings of its run, in a checkpoint."""
        self.config, self.which = config, which
        self.device = torch.device(config.device)
        self.losses: list[float] = []
        self.step_ms: list[float] = []
        self.peak_mib = 0.0
        self.memory_by = ""

    @abstractmethod
    def update(self, step: int) -> float:
        """Train on the batch of a step; the loss before the update."""

    @property
    def done(self) -> int:
        return len(self.losses)

    def step(self) -> float:
        """The next step, timed and noted; its loss."""
        start, number = time.perf_counter(), self.done
        set_rates(self.peaks, learning_rate_factor(number, self.config))
        loss = self.update(number)
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss is {loss} at step {number + 1}: lower lr, head_lr or scale"
            )
        self.losses.append(loss)
        self.step_ms.append(1e3 * (time.perf_counter() - start))
        return loss

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {
            **self.which,
            # as tensors: a long curve must not slow the write of every step
            "losses": torch.tensor(self.losses, dtype=torch.float64),
            "step_ms": torch.tensor(self.step_ms, dtype=torch.float64),
            "peak_mib": self.peak_mib,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state."""
        losses, step_ms = numbers(state, "losses"), numbers(state, "step_ms")
        peak = state["peak_mib"]
        if len(step_ms) != len(losses):
            raise ValueError(f"step_ms: expected {len(losses)}, one a loss, got {len(step_ms)}")
        if not isinstance(peak, int | float) or not math.isfinite(peak):
            raise TypeError(f"peak_mib: expected a finite number, got {str(peak)[:40]}")
        self.losses, self.step_ms, self.peak_mib = losses, step_ms, peak

    def state_bytes(self) -> int:
        """By which `checkpoint.Schedule` says how often the state is written."""
        return checkpoint.state_bytes(self.state())

    def run(
        self,
        run: Run[C, Any],
        ended: Path,
        what: str,
        *,
        progress: Progress,
        memory: PeakMemory,
    ) -> None:
        """To the last step, from the run's checkpoint where that is of this training.

        ended: where its state is kept after the last step, from which more steps can follow. what:
            its name in the progress bar.
        """
        path = run.folder / CHECKPOINT
        # the checkpoint of a finished training outlives it until the next one's first
        if not self._go_on(path):
            self._go_on(ended)
        progress.skip(self.done)
        run.log.begin(self.done, **self.which)
        schedule = checkpoint.Schedule(self.config.checkpoint_every)
        before, size = self.peak_mib, 0
        self.memory_by = memory.method

        def step(number: int) -> None:
            loss = self.step()
            self.peak_mib = max(before, memory.mib())
            rate = self.peaks[0][0].param_groups[0]["lr"]
            run.log.write(number, loss, rate, self.step_ms[-1] / 1e3)
            progress.step(what, loss)

        def due(done: int) -> bool:
            nonlocal size
            size = size or self.state_bytes()
            return schedule.due(done, size)

        def save(_: int) -> None:
            run.lock.check()
            run.log.sync()  # a checkpoint's steps are in the log before it exists
            checkpoint.save(path, self.state())
            schedule.written()

        go_through(self.done, self.config.steps, step, due=due, save=save, asked=run.stop)
        run.lock.check()
        checkpoint.save(ended, self.state())

    def _go_on(self, path: Path) -> bool:
        """Whether the state at `path` is of this training, which then has it."""
        if not path.exists():
            return False
        state = checkpoint.load(path)
        try:
            if any(state[key] != value for key, value in self.which.items()):
                return False
            self.load(state)
        except Exception as error:  # what a state holds instead may fail in any way
            told = str(error).partition("\n")[0]
            raise RunFileError(
                f"{path}: no state of this training ({type(error).__name__}: {told}); without "
                "the file it starts anew"
            ) from error
        return True
