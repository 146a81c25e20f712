"""A whole run: every fold, trained with the fused head and with the reference, and the record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fused_losses import backends
from fused_losses.train.faces import report
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.data import Pictures, load, split
from fused_losses.train.faces.evaluation import FoldEmbeddings, evaluate
from fused_losses.train.faces.loop import FoldTraining, fold_embeddings, warm_up
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.memory import PeakMemory
from fused_losses.train.frame.progress import Progress
from fused_losses.train.frame.reports import tell
from fused_losses.train.frame.runs import CHECKPOINT, StopSignals, running

FOLDS = "folds"


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
    files = (FOLDS, *report.FILES)
    with running(config, folder, written=files, resume=resume, overwrite=overwrite) as (_, stop):
        return _train(config, folder, stop, quiet)


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
                what = f"fold {fold + 1}/{config.folds} {name:9}"
                training.run(folder / CHECKPOINT, what, stop=stop, progress=progress, memory=memory)
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
    missing = report.write(folder, record, judged, finished)
    tell(progress, folder, report.FILES, missing, report.table(record))
    return record


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
