"""A whole run: every fold, trained with the fused head and with the reference, and the record."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fused_losses import backends
from fused_losses.base.files import write_atomically
from fused_losses.train.faces import report
from fused_losses.train.faces.config import TrainConfig, differences
from fused_losses.train.faces.data import Pictures, load, split
from fused_losses.train.faces.evaluation import FoldEmbeddings, evaluate
from fused_losses.train.faces.loop import FoldTraining, Interrupted, fold_embeddings, warm_up
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.memory import PeakMemory
from fused_losses.train.frame.progress import Progress

CONFIG, CHECKPOINT, FOLDS, LOCK = "config.json", "checkpoint.pt", "folds", "lock"
# what --overwrite deletes, so that it never takes a file of the user's
WRITTEN = (CONFIG, CHECKPOINT, CHECKPOINT + ".part", FOLDS, *report.FILES)


class StopSignals:
    """SIGINT and SIGTERM ask for a stop after the step under way; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def _note(self, number: int, frame: object) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __call__(self) -> int | None:
        """The signal that asks for a stop, if one came."""
        return self.received

    @contextlib.contextmanager
    def watching(self) -> Iterator[StopSignals]:
        former = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            # only the main thread may set handlers; elsewhere the caller's stay
            with contextlib.suppress(ValueError):
                former[number] = signal.signal(number, self._note)
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def variants(config: TrainConfig) -> dict[str, TrainConfig]:
    """The heads that are trained: the one asked for, and the one to compare it with."""
    named = {"trained": config}
    if config.compare and config.backend != "reference":
        # the truth knows no reduced products and keeps all logits anyway
        truth = {"backend": "reference", "precision": "fp32", "memory_budget": 0}
        named["reference"] = config.with_changes(**truth)
    return named


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run `config` in `folder` and return what its result.json says.

    resume: go on where a former process stopped, with bitwise the same losses; its configuration
        must be this one. overwrite: delete what an earlier run left.
    Raises `Interrupted` after SIGINT or SIGTERM, with a checkpoint written.
    """
    folder = Path(folder)
    with locked(folder):
        config = _prepare(config, folder, resume=resume, overwrite=overwrite)
        random_state, threads = checkpoint.random_state(), torch.get_num_threads()
        torch.set_num_threads(config.threads)
        try:
            with StopSignals().watching() as stop:
                return _train(config, folder, stop, quiet)
        finally:
            checkpoint.set_random_state(random_state)
            torch.set_num_threads(threads)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Two processes must not write one run; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"{folder}: another process is training there") from None
        yield


def _prepare(config: TrainConfig, folder: Path, *, resume: bool, overwrite: bool) -> TrainConfig:
    """The configuration to run, recorded in the folder; a folder in the wrong state is refused."""
    if resume and overwrite:
        raise ValueError("resume and overwrite exclude each other")
    saved = TrainConfig.load(folder / CONFIG) if (folder / CONFIG).exists() else None
    if saved is not None and resume:
        # the split over threads orders sums: bitwise the same losses need the same number
        config = config.with_changes(threads=config.threads or saved.threads)
        unlike = differences(saved, config)
        if unlike:
            told = "\n  ".join(unlike)
            raise ValueError(f"{folder}: cannot resume, the configuration differs\n  {told}")
        return config
    left = [path for path in folder.iterdir() if path.name not in (LOCK, CONFIG + ".part")]
    if left and saved is None and not overwrite and not resume:
        raise ValueError(f"{folder}: holds files that are not a run; choose another name")
    if saved is not None and not overwrite:
        raise ValueError(f"{folder}: holds a run; go on with --resume, or start with --overwrite")
    if saved is not None:
        # the configuration last: killed in between, this is still known for a run
        for path in sorted(left, key=lambda path: path.name == CONFIG):
            if path.is_dir() and path.name in WRITTEN:
                shutil.rmtree(path)
            elif path.name in WRITTEN:
                path.unlink()
    config = config.with_changes(threads=config.threads or torch.get_num_threads())
    write_atomically(folder / CONFIG, lambda file: file.write(config.to_json().encode()))
    return config


def _train(config: TrainConfig, folder: Path, stop: StopSignals, quiet: bool) -> dict[str, Any]:
    start = time.monotonic()
    pictures = load(config)
    heads = variants(config)
    progress = Progress(config.folds * len(heads) * config.steps, quiet=quiet)
    progress.say(
        f"{len(pictures.names)} people, {len(pictures)} pictures; {config.folds} folds x "
        f"{' and '.join(heads)} x {config.steps} steps on {config.device}"
    )
    (folder / FOLDS).mkdir(exist_ok=True)
    untrained, finished = [], {name: [] for name in heads}
    warm_up(config, split(pictures, 0, config.seed)[0])
    for fold in range(config.folds):
        people, held_out = split(pictures, fold, config.seed)
        for name, one in heads.items():
            path = folder / FOLDS / f"{name}-{fold}.pt"
            if path.exists():
                progress.skip(config.steps)
            else:
                memory = PeakMemory(torch.device(config.device))
                training = FoldTraining(one, people, fold=fold, variant=name)
                _continue(training, folder / CHECKPOINT, stop, progress, memory)
                checkpoint.save(path, training.result(held_out))
                del training
            finished[name].append(checkpoint.load(path))
        untrained.append(_untrained(config, people, held_out, fold))
    (folder / CHECKPOINT).unlink(missing_ok=True)

    judged = {
        name: evaluate([fold_embeddings(result) for result in results], seed=config.seed)
        for name, results in finished.items()
    }
    judged["untrained"] = evaluate(untrained, seed=config.seed)
    ran = {name: _backend_that_ran(one) for name, one in heads.items()}
    record = report.record(config, judged, finished, backends_run=ran)
    record["wall_s"] = round(time.monotonic() - start, 2)
    for trouble in report.write(folder, record, judged, finished):
        progress.say(trouble)
    progress.say(report.table(record))
    progress.say(f"written to {folder}: {', '.join(report.FILES)}")
    return record


def _continue(
    training: FoldTraining, path: Path, stop: StopSignals, progress: Progress, memory: PeakMemory
) -> None:
    """Train the fold to its end, from the checkpoint where that is of this fold and head."""
    if path.exists():
        state = checkpoint.load(path)
        # the checkpoint of a finished fold outlives it until the next one's first
        if (state["fold"], state["variant"]) == (training.fold, training.variant):
            training.load(state)
            progress.skip(training.done)
    what = f"fold {training.fold + 1}/{training.config.folds} {training.variant:9}"
    training.run(path, stop=stop, after_step=lambda loss: progress.step(what, loss), memory=memory)


def _untrained(
    config: TrainConfig, people: Pictures, held_out: Pictures, fold: int
) -> FoldEmbeddings:
    """The start of a fold's training, judged like its end."""
    start = FoldTraining(config.with_changes(classes=0), people, fold=fold)
    return start.embeddings(held_out)


def _backend_that_ran(config: TrainConfig) -> str:
    asked = None if config.backend == "auto" else config.backend
    device = torch.device(config.device)
    return backends.choose(asked, device, torch.float32, config.precision)[0]


__all__ = ["Interrupted", "train"]
