"""The command line of the large-class trainer; every rank runs it, started by torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import traceback

from torch.distributed.elastic.multiprocessing.errors import record

from fused_losses.base.records import BY_CTRL_C
from fused_losses.centers.watch import EXIT_CODE, RankFailure
from fused_losses.train.frame.commands import line_of
from fused_losses.train.frame.memory import is_memory
from fused_losses.train.frame.options import OptionError, add_options, given_options
from fused_losses.train.frame.runs import RunError, run_folder, runs_folder
from fused_losses.train.frame.steps import Interrupted
from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.loop import train

DESCRIPTION = """\
Train an embedding with a sharded large-class head, one process a GPU (or a share of the CPU):

  torchrun --standalone --nproc-per-node 2 --max-restarts 10 -m fused_losses.train.large

A run that was killed goes on from its latest checkpoint when it is started again, on any number
of processes; after SIGTERM or Ctrl-C, which write one, from where it was. Writes config.json,
log.jsonl (one line a step) and checkpoints to RUNS/NAME. Exit status: 0, 2 for a run that cannot
be or whose loss is not finite, 128 + the signal that stopped it, 86 where another rank is lost."""


def parser() -> argparse.ArgumentParser:
    """Every field of `LargeConfig` as an option, and where the run lies."""
    options = argparse.ArgumentParser(
        prog="python -m fused_losses.train.large",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("--name", required=True, help="folder of the run")
    options.add_argument("--runs", default="runs", help="folder of all runs (default: runs)")
    add_options(options.add_argument_group("the run"), LargeConfig)
    return options


def main(argv: list[str] | None = None) -> int:
    """0, 2 for a run that cannot be, 128 + the signal that stopped it; others end the process."""
    try:
        return _main(argv) or 0  # an int: `record` says that it might be None
    except KeyboardInterrupt:
        print("\nstopped at once; the newest checkpoint is kept", file=sys.stderr, flush=True)
        os._exit(BY_CTRL_C)
    except Exception as error:
        known = isinstance(error, OSError) or is_memory(error)
        status = _refuse(error) if known else 1
        if not known:
            traceback.print_exc()
        sys.stderr.flush()
        # not by the interpreter's exit: it joins the checkpoints' threads, which may wait for ranks
        # that are gone
        os._exit(EXIT_CODE if isinstance(error, RankFailure) else status)


@record  # torchrun then shows the first error of all ranks
def _main(argv: list[str] | None) -> int:
    args = parser().parse_args(argv)
    try:
        folder = run_folder(runs_folder(args.runs), args.name)
        config = LargeConfig(**given_options(args, LargeConfig))
    except ValueError as error:
        return _refuse(error)
    try:
        train(config, folder)
    except (RunError, OptionError) as error:
        return _refuse(error)
    except Interrupted as stopped:
        if os.environ.get("RANK", "0") == "0":
            print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 128 + stopped.signal
    return 0


def _refuse(error: Exception) -> int:
    print(f"fused_losses.train.large: {line_of(error)}", file=sys.stderr)
    return 2
