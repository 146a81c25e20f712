"""Mutated files for every reader, under limits of memory and time; run as a program of its own.

Prints one JSON object: reader -> [tried, refused]. Any exception but the reader's own ends it, and
so do code, files and processes that come of the data, and descriptors that stay open.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from hostile_readers import Reader, all_readers
from mutations import mutated

MEMORY = 1 << 30  # bytes beyond what the imports take
SECONDS = 5.0  # of this process, a file
WALL_SECONDS = 120  # the same, where it waits for what never comes
# what no reader does
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen")


class Watch:
    """An audit hook: what a file makes Python do while it is read."""

    def __init__(self, home: Path) -> None:
        self.home, self.on = str(home), False
        self.seen: list[str] = []
        sys.addaudithook(self.note)

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event.startswith(FORBIDDEN):
            self.seen.append(f"{event} {arguments}")
        writes = event == "open" and set(str(arguments[1])) & set("wax+")
        if writes and not str(arguments[0]).startswith(self.home):
            self.seen.append(f"open {arguments}")


def try_one(name: str, reader: Reader, whole: bytes, seed: int, number: int, watch: Watch) -> bool:
    """Whether the reader refuses what this seed makes of its file."""
    draw = random.Random(f"{seed} {name} {number}")
    reader.path.write_bytes(
        reader.instead(whole, draw) if reader.instead else reader.then(mutated(whole, draw))
    )
    refused, start = False, time.process_time()
    faulthandler.dump_traceback_later(WALL_SECONDS, exit=True)
    watch.on = True
    try:
        reader.read()
    except reader.errors as error:
        refused = bool(str(error))
        assert refused, "an error without a text"
    finally:
        watch.on = False
        faulthandler.cancel_dump_traceback_later()
    assert not watch.seen, watch.seen
    took = time.process_time() - start
    assert took < SECONDS, f"{took} s"
    return refused


def run(tries: int, seed: int, kinds: list[str]) -> dict[str, list[int]]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    counts = {}
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(Path(folder))
        made = all_readers(Path(folder))
        for reader in made.values():
            reader.read()  # as they are they can be read
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for name, reader in made.items():
            if kinds and not any(kind in name for kind in kinds):
                continue
            whole, refused = reader.path.read_bytes(), 0
            opened = len(os.listdir("/proc/self/fd"))
            for number in range(tries):
                try:
                    refused += try_one(name, reader, whole, seed, number, watch)
                except BaseException:
                    print(f"{name}: seed {seed}, number {number}", file=sys.stderr)
                    raise
            reader.path.write_bytes(whole)
            assert len(os.listdir("/proc/self/fd")) <= opened, f"{name}: files stay open"
            counts[name] = [tries, refused]
    return counts


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])))
