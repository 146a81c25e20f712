"""A soak: hours of trainings that are killed, starved of disk and damaged, and must not notice.

make soak HOURS=2    goes on until then; runs/soak/summary.json is of the moment

An episode is a training of two ranks by options that are drawn: undisturbed first, in two
processes that live as long as the soak (their memory is sampled) and against a dense table, then in
attempts that faults end. Every loss of every attempt has to be that of the undisturbed training,
bit by bit, and every attempt has to go on from the newest whole checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import random
import shutil
import signal
import time
from collections import Counter
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import linear_regression
from typing import Any

import processes
from episodes import EVERY, HANG, INTERVAL, TIMEOUT, WORLD, Episode, harassed, undisturbed
from faults import Attempt, Disk
from places import ROOT

LOST = -int(signal.SIGKILL)
STOPPED = 128 + int(signal.SIGTERM)
LIMIT = max(TIMEOUT, HANG) + 4 * INTERVAL  # after which the watch has ended whom another has left
JOINED = 5.0  # seconds after which all ranks of a launch have met
# how each fault may end a rank; anything else is odd
ENDS: dict[str, set[int]] = {
    "none": {0},
    "kill one": {LOST, 86, 0},
    "kill both": {LOST, 0},
    "kill while saving": {LOST, 86, 0},
    "terminate": {0, STOPPED, -15, 86},
    "freeze": {LOST, 86, 0},
    "full disk": {0, 1, 2, 86},
    "full disk, kill": {LOST, 0, 1, 2, 86},
    "read-only disk": {0, 1, 2, 86},
    "damage": {LOST, 0},
}


class Soak:
    """Counts, and everything that is odd, in files of a folder."""

    def __init__(self, folder: Path, seed: int, steps: int, share: float) -> None:
        self.folder, self.seed, self.steps, self.share = folder, seed, steps, share
        self.chance, self.counts = random.Random(seed), Counter()
        self.stopped: set[int] = set()  # episodes that a signal has stopped between checkpoints
        self.began, self.samples, self.dense = time.time(), [[], []], 0.0
        self.context: ForkServerContext = mp.get_context("forkserver")
        mp.set_forkserver_preload([*processes.PRELOAD, "episodes"])
        self.pipes, self.truth = [], []
        folder.mkdir(parents=True, exist_ok=True)
        for rank in range(WORLD):
            ours, theirs = self.context.Pipe()
            process = self.context.Process(
                target=undisturbed, args=(rank, str(folder), theirs), daemon=True
            )
            process.start()
            self.pipes.append(ours)
            self.truth.append(process)

    def note(self, what: str, **details: Any) -> None:
        self.counts[what] += 1
        with open(self.folder / "events.jsonl", "a") as file:
            at = round(time.time() - self.began, 1)
            file.write(json.dumps({"at": at, "what": what, **details}) + "\n")
        self._summarise()

    def _summarise(self) -> None:
        summary = {
            "hours": round((time.time() - self.began) / 3600, 3),
            "seed": self.seed,
            "counts": dict(sorted(self.counts.items())),
            "furthest of a loss from the dense table's, relative": self.dense,
            "ranks that live on": [_slope(samples) for samples in self.samples],
        }
        part = self.folder / "summary.part"
        part.write_text(json.dumps(summary, indent=1) + "\n")
        part.rename(self.folder / "summary.json")

    # ---- an episode ------------------------------------------------------------------------------

    def episode(self) -> None:
        seed = self.chance.randrange(2**31)
        episode = Episode(seed, self.steps, self.share)
        for pipe in self.pipes:
            pipe.send(episode)
        found = [pipe.recv() for pipe in self.pipes]
        hours = (time.time() - self.began) / 3600
        for samples, one in zip(self.samples, found, strict=True):
            samples.append((hours, one["mib"], one["files"], one["threads"]))
        self.dense = max(self.dense, found[0]["dense"])
        for path in self.folder.glob("truth-*"):
            shutil.rmtree(path)
        if found[0]["losses"] != found[1]["losses"] or found[0]["dense"] > 1e-9:
            self.note("ODD: undisturbed", seed=seed, dense=found[0]["dense"])
        self.counts["steps, undisturbed"] += self.steps
        self.note("episodes", seed=seed, trainer=episode.trainer)

        told, disk = self.folder / f"told-{seed}", Disk(self.folder / f"disk-{seed}", mib=4)
        told.mkdir()
        try:
            started, odd = 0, self.counts.total()
            while not self._attempt(episode, disk, told, started):
                started += 1
                if started > 60:
                    self.note("ODD: an episode without an end", seed=seed)
                    break
            self._compare(episode, disk, told, found[0]["losses"])
        finally:
            disk.close()
        if not any(key.startswith("ODD") for key in self.counts) or odd == self.counts.total():
            shutil.rmtree(told)

    def _attempt(self, episode: Episode, disk: Disk, told: Path, number: int) -> bool:
        """Whether it came to the last step."""
        fault = self.chance.choice([*ENDS] if number < 12 else ["none"])
        whole = disk.complete()
        if fault == "damage" and len(whole) > 1:
            self.note("damage", seed=episode.seed, what_is_damaged=disk.damage(self.chance))
            whole = disk.complete()
        newest = int(whole[-1].name[5:]) if whole else 0
        attempt = Attempt(self.context, harassed, WORLD, episode, disk, told)
        self.counts["launches"] += 1
        seconds = self.chance.choice((self.chance.uniform(0, 3), self.chance.uniform(3, 15)))
        if fault != "none" and attempt.pause(seconds):
            self._strike(fault, attempt, disk, episode)
        limit = LIMIT + (600 if attempt.codes.count(None) == WORLD else 0)
        if not attempt.ended(limit):
            self.note("ODD: hung", seed=episode.seed, fault=fault, codes=attempt.codes)
        if not {code for code in attempt.codes if code is not None} <= ENDS[fault]:
            self.note(
                "ODD: end", seed=episode.seed, fault=fault, codes=attempt.codes,
                errors=attempt.errors(),
            )  # fmt: skip
        lines = attempt.lines(0)
        begun = [line["resumed"] for line in lines if "resumed" in line]
        if begun and begun[0] != newest:
            self.note("ODD: resumed", seed=episode.seed, expected=newest, found=begun[0])
        if newest and begun:
            self.counts["resumes"] += 1
        self.counts["saves refused"] += sum("refused" in line for line in lines)
        finished = attempt.codes == [0] * WORLD
        return finished and disk.complete()[-1:] == [
            path for path in disk.complete() if path.name == f"step-{episode.steps:08d}"
        ]

    def _strike(self, fault: str, attempt: Attempt, disk: Disk, episode: Episode) -> None:
        # who waits for a rank that never joined is ended by a launcher, of which there is none here
        met = ("kill one", "terminate", "freeze", "read-only disk")
        if fault in met and not attempt.pause(JOINED):
            return
        kill, one = signal.SIGKILL, [self.chance.choice(attempt.alive or [0])]
        if one == [0]:
            return
        self.note(fault, seed=episode.seed) if fault != "damage" else None
        if fault == "kill one":
            attempt.signal(kill, one)
        elif fault in ("kill both", "damage"):
            attempt.signal(kill, attempt.alive)
        elif fault == "kill while saving":
            deadline = time.monotonic() + 30
            while not any(disk.folder.rglob("*.part")) and time.monotonic() < deadline:
                time.sleep(0.0005)
            attempt.signal(kill, self.chance.choice((one, attempt.alive)))
        elif fault == "terminate":
            self.stopped.add(episode.seed)
            attempt.signal(signal.SIGTERM, self.chance.choice((one, attempt.alive)))
        elif fault == "freeze":
            if not attempt.pause(10):  # before the second step a rank may take half an hour
                return
            attempt.signal(signal.SIGSTOP, one)
            rest = attempt.pause(LIMIT)
            if rest:
                self.note("ODD: nobody noticed a rank that is stopped", seed=episode.seed)
            attempt.signal(kill, one)
        elif fault.startswith("full disk"):
            with disk.full(room=self.chance.choice((0, 4096, 20_000, 60_000))):
                attempt.pause(self.chance.uniform(3, 12))
                if fault.endswith("kill"):
                    attempt.signal(kill, self.chance.choice((one, attempt.alive)))
                    attempt.ended(LIMIT)
        elif fault == "read-only disk":
            try:
                with disk.read_only():
                    attempt.pause(self.chance.uniform(3, 12))
            except TimeoutError:  # a log that is open
                self.counts["read-only disk, refused by the system"] += 1

    def _compare(self, episode: Episode, disk: Disk, told: Path, losses: list[float]) -> None:
        if episode.trainer:
            path = disk.folder / "run" / "log.jsonl"
            read = [json.loads(line) for line in path.read_text().splitlines()]
            found = [(line["step"], line["loss"]) for line in read]
            if [step for step, _ in found] != list(range(self.steps)):
                self.note("ODD: a log with other steps", seed=episode.seed)
        else:
            read = [
                json.loads(line)
                for path in told.glob("*.jsonl")
                for line in path.read_text().splitlines()
                if line.endswith("}")
            ]
            found = [(r["step"], float.fromhex(r["loss"])) for r in read if "step" in r]
        # a checkpoint at a step where the undisturbed run has none lets rows of a sample catch up
        most = 1e-9 if episode.sampled and episode.seed in self.stopped else 0.0
        differ = [step for step, loss in found if not abs(loss - losses[step]) <= most]
        self.counts["losses compared"] += len(found)
        self.counts["losses that differ"] += len(differ)
        if differ:
            self.note("ODD: losses", seed=episode.seed, first=min(differ), number=len(differ))
        left = [path.name for path in disk.folder.rglob("*.part")]
        if left:
            self.note("ODD: parts are left", seed=episode.seed, parts=left)

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.truth:
            process.join(20)


def _slope(samples: list[tuple[float, ...]]) -> dict[str, Any]:
    """What a rank holds, and by how much that grows; the first quarter warms up."""
    later = samples[len(samples) // 4 :]
    if len(later) < 3:
        return {}
    hours, *held = zip(*later, strict=True)
    found: dict[str, Any] = {"samples": len(later)}
    for name, values in zip(("MiB", "files", "threads"), held, strict=True):
        found[name] = [values[0], values[-1]]
        found[f"{name} an hour"] = round(linear_regression(hours, values).slope, 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20 * EVERY, help="of an episode")
    parser.add_argument("--share", type=float, default=0.04, help="of a core, for each rank")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "soak")
    args = parser.parse_args()
    soak = Soak(args.folder, args.seed, args.steps, args.share)
    try:
        while time.time() < soak.began + 3600 * args.hours:
            soak.episode()
    finally:
        soak.close()
    print((args.folder / "summary.json").read_text())


if __name__ == "__main__":
    main()
