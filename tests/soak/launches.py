"""Short trainings of two ranks, each a launch of its own, and how the processes ended.

python tests/soak/launches.py 200    prints {exit status: launches}; any other than 0 is odd
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from places import ROOT

OPTIONS = (
    "--classes 53 --features 8 --embedding 4 --batch-size 16 --steps 3 --checkpoint-every 1"
    " --interval 0.5 --timeout 20"
)


def launch(runs: Path, number: int) -> tuple[int, str]:
    """(exit status, what was said); the launcher names a rank that a signal has ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "fused_losses.train.large", "--runs", str(runs), "--name", str(number)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, *OPTIONS.split()], capture_output=True, text=True, env=environment
    )
    return ended.returncode, ended.stderr


def main(launches: int) -> None:
    counts: Counter[int] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(launches):
            status, told = launch(Path(folder), number)
            counts[status] += 1
            if status:
                print(told[-3000:], file=sys.stderr)
            print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
