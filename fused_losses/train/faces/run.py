"""A whole run: every fold, trained with the fused head and with the reference, and the record."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from fused_losses.train.faces import report
from fused_losses.train.faces.backbone import build, embedding_size
from fused_losses.train.faces.config import TrainConfig
from fused_losses.train.faces.data import Pictures, check_folds, load, split
from fused_losses.train.faces.evaluation import FoldEmbeddings, evaluate
from fused_losses.train.faces.loop import (
    RESULT_KEYS,
    FoldTraining,
    check_result,
    fold_embeddings,
    warm_up,
)
from fused_losses.train.frame import checkpoint
from fused_losses.train.frame.files import RunFileError
from fused_losses.train.frame.memory import PeakMemory
from fused_losses.train.frame.preflight import (
    check_backend,
    check_machine,
    check_room,
    memory_of,
)
from fused_losses.train.frame.progress import Progress
from fused_losses.train.frame.reports import tell
from fused_losses.train.frame.runs import CHECKPOINT, Run, running

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
        must be this one, or ask for more steps or folds: then every fold goes on from its last
        step, at the learning rates of the new number of steps. overwrite: delete what an earlier
        run left.
    Raises `Interrupted` after SIGINT or SIGTERM, with a checkpoint written; ValueError
    (`OptionError`, `RunFileError`) for what cannot be run, before the folder is made or changed.
    """
    with running(
        config,
        Path(folder),
        written=(FOLDS, *report.FILES),
        ready=_ready,
        resume=resume,
        overwrite=overwrite,
    ) as run:
        return _train(run, quiet)


def _ready(config: TrainConfig) -> Pictures:
    """The pictures, once nothing is left that would end the run later."""
    check_machine(config.device, config.tensorboard)
    for one in variants(config).values():
        _backend_that_ran(one)
    pictures = load(config)
    check_folds(pictures, config)
    dim = embedding_size(build(config).to(config.device), config)
    room = memory_of(torch.device(config.device))
    check_room("classes", config.classes, dim, torch.float32, room)
    return pictures


def _train(run: Run[TrainConfig, Pictures], quiet: bool) -> dict[str, Any]:
    start = time.monotonic()
    config, folder, pictures = run.config, run.folder, run.made
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
            result = _finished(path, config.steps)
            if result is None:
                memory = PeakMemory(torch.device(config.device))
                training = FoldTraining(one, people, fold=fold, variant=name)
                ended = folder / FOLDS / f"{name}-{fold}.state.pt"
                what = f"fold {fold + 1}/{config.folds} {name:9}"
                training.run(run, ended, what, progress=progress, memory=memory)
                result = training.result(held_out)
                checkpoint.save(path, result)
                del training
            else:
                progress.skip(config.steps)
            finished[name].append(result)
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


def _finished(path: Path, steps: int) -> dict[str, Any] | None:
    """What is kept of a fold that has taken all its steps."""
    if not path.exists():
        return None
    result = checkpoint.load(path)
    missing = RESULT_KEYS - {*result} if isinstance(result, dict) else RESULT_KEYS
    if missing:
        raise RunFileError(f"{path}: no result of a fold; missing: {', '.join(sorted(missing))}")
    try:
        check_result(result)
    except (TypeError, ValueError) as error:
        raise RunFileError(f"{path}: no result of a fold ({error})") from error
    return result if len(result["losses"]) >= steps else None


def _untrained(
    config: TrainConfig, people: Pictures, held_out: Pictures, fold: int
) -> FoldEmbeddings:
    """The start of a fold's training, judged like its end."""
    start = FoldTraining(config.with_changes(classes=0), people, fold=fold)
    return start.embeddings(held_out)


def _backend_that_ran(config: TrainConfig) -> str:
    return check_backend(config.backend, config.device, config.precision, torch.float32)
