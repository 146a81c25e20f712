"""The promises of docs/reliability.md, each with its command and what its last run said.

    python -m tools.trust run [PART ...] [--with WORDS]
    python -m tools.trust page

`run` runs the parts in turn (`make trust`, which takes hours; `make trust PART="soak calls"`: these
alone), records each in docs/generated/trust.json as soon as it has ended, and writes the page,
docs/generated/trust.md. Without names it leaves out what succeeded on today's sources, so that a
run that was stopped goes on. Parts that record their own steps (fuzz, calls, the mutants of C++ and
of Triton) go on within, too. --with (`make trust PART=soak WITH="HOURS=1"`) adds words to the
commands, and the page says so. `page` only writes the page. Needs neither git nor torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from typing import NamedTuple, TypedDict

from tools.proofs import ROOT, content_hash_of

RECORD = ROOT / "docs" / "generated" / "trust.json"
PAGE = RECORD.with_suffix(".md")
LOGS = ROOT / "runs" / "trust"
FOLDERS = ("csrc", "fused_losses")  # what is promised of


def last(pattern: str) -> Callable[[str], str]:
    """Of an output its last line of this kind."""

    def says(output: str) -> str:
        lines = [line.strip() for line in output.splitlines()]
        return next((line for line in reversed(lines) if re.fullmatch(pattern, line)), "")

    return says


def faults(output: str) -> str:
    """The sum over all sources."""
    counted = re.findall(r": (\d+) of (\d+) faults.* noticed", output)
    seen, of = (sum(int(pair[k]) for pair in counted) for k in (0, 1))
    some = last(r".* faults, 1 place in \d+, .*")(output)
    share = some and re.findall(r", 1 place in \d+", some)[0]
    return f"{seen:,} of {of:,} faults{share} noticed ({100 * seen / of:.1f} %)" if of else ""


def hostile(output: str) -> str:
    line = last(r"\{.*\}")(output)
    counts = json.loads(line).values() if line else ()
    tried, refused = (sum(pair[k] for pair in counts) for k in (0, 1))
    return f"{tried:,} files of {len(counts)} kinds, {refused:,} refused" if counts else ""


def soaked(output: str) -> str:
    told = re.findall(r'"((?:episodes|losses|attempts)[\w ]*)": (\d+)', output)
    return ", ".join(f"{name} {int(number):,}" for name, number in told)


PYTEST = last(r"\d+ (?:passed|failed|error).*")


class Part(NamedTuple):
    """A promise, the command that looks for what would break it, and what its output says."""

    name: str
    promise: str
    command: str
    says: Callable[[str], str] = PYTEST


PARTS = (
    Part(
        "cpu-mutants",
        "the C++ kernels' tests notice faults planted in them; the others have a reason each",
        "make cpu-mutants",
        faults,
    ),
    Part(
        "dispatch-mutants",
        "the tests of dispatch notice faults planted in what chooses who runs",
        "make dispatch-mutants",
        last(r"dispatch: \d+ of \d+.*"),
    ),
    Part(
        "triton-mutants",
        "the cases notice faults planted in the Triton kernels, in Triton's interpreter",
        "make triton-mutants",
        faults,
    ),
    Part(
        "cuda-mutants",
        "the cases notice a fault planted in the CUDA kernels, executed on the host",
        "make cuda-mutants",
    ),
    Part(
        "cpu-sanitize-address",
        "the C++ kernels' tests touch no memory that is not theirs and nothing undefined",
        "make cpu-sanitize-address",
        last(r"\d+% tests passed.*"),
    ),
    Part(
        "cpu-sanitize-thread",
        "threads of the C++ kernels do not race",
        "make cpu-sanitize-thread",
        last(r"\d+% tests passed.*"),
    ),
    Part(
        "cpu-valgrind",
        "the C++ kernels' tests read nothing that was never written, and free what they take",
        "make cpu-valgrind",
        last(r"valgrind: .*"),
    ),
    Part(
        "cuda-sanitize",
        "the same of the CUDA kernels, executed on the host",
        "make cuda-sanitize",
    ),
    Part(
        "fuzz",
        "drawn calls on hard data stay within bounds made at their very inputs",
        "make fuzz SEED=70001 DRAWS=20",
        last(r"\d[\d,]* calls, seeds.*"),
    ),
    Part(
        "hostile",
        "mutated files give their data or one error: no crash, hang, growth or code",
        "make hostile TRIES=2000 SEED=3",
        hostile,
    ),
    Part(
        "soak",
        "trainings that are killed, stopped, starved and damaged lose and repeat nothing",
        "make soak HOURS=2",
        soaked,
    ),
    Part(
        "launches",
        "200 launches of two ranks end with status 0",
        "make launches LAUNCHES=200",
        last(r'\{"\d+": \d+.*\}'),
    ),
    Part(
        "determinism",
        "the same bits in every run and on 1, 2 and 7 threads, but for classes that say so",
        "make determinism",
    ),
    Part(
        "compiles",
        "`torch.compile` traces every module of the catalogue whole",
        "make compiles",
    ),
    Part(
        "concurrency",
        "8 threads, forked and spawned workers, exceptions in users' functions; 10,000 opens",
        "make concurrency OPENS=10000",
    ),
    Part(
        "elements",
        "banks of 2.2e9 elements: right in their last rows, little memory held",
        "make elements ELEMENTS=2200000000",
    ),
    Part(
        "calls",
        "10,000 calls of each loss leave no memory and no file",
        "make calls CALLS=10000",
        last(r"\d+ losses, .*"),
    ),
    Part(
        "walks",
        "2,000 walks over a head agree with a dense model",
        "make walks WALKS=2000",
    ),
    Part(
        "dependencies",
        "pickles are executed, and files of torch.save read, only where the page says",
        "make dependencies",
    ),
)


class Result(TypedDict):
    """What a part's last run said."""

    command: str
    status: int
    said: str
    seconds: int
    contents: str
    date: str


def recorded() -> dict[str, Result]:
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def contents() -> str:
    """A hash of the files that a verdict is about."""
    return content_hash_of(
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in (".py", ".cpp", ".h", ".cu", ".c")
    )


def run(part: Part, more: str = "") -> Result:
    """Runs the part's command, with these words behind it; what it says is kept in runs/trust."""
    command = f"{part.command} {more}".strip()
    LOGS.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    with (LOGS / f"{part.name}.log").open("w") as log:
        done = subprocess.run(
            shlex.split(command), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=os.environ
        )
    return Result(
        command=command,
        status=done.returncode,
        said=part.says((LOGS / f"{part.name}.log").read_text(errors="replace")),
        seconds=round(time.monotonic() - begin),
        contents=contents(),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )


def row(part: Part, result: Result | None) -> str:
    start = f"| {part.name} | {part.promise} | `{part.command}` |"
    if result is None:
        return f"{start} not run | |"
    ended = "" if result["status"] == 0 else f"failed (status {result['status']}): "
    which = "" if result["command"] == part.command else f" (of `{result['command']}`)"
    seconds = result["seconds"]
    took = f"{seconds} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    return (
        f"{start} {ended}{result['said']}{which} | {result['date']}, {took}, {result['contents']} |"
    )


def text() -> str:
    known = recorded()
    rows = "\n".join(row(part, known.get(part.name)) for part in PARTS)
    return f"""# What is promised, how it is looked for, and what the last run said

Written by `make trust`, from `trust.json`; a part alone: `make trust PART=NAME`. What each looks
for, and what it has found, stands in [reliability](../reliability.md). The last column has the day,
how long it took, and a hash over `csrc/` and `fused_losses/` as they were (`python -m tools.trust
hash` prints today's).

| part | promise | command | the last run said | when, on what |
|---|---|---|---|---|
{rows}
"""


def write_page() -> None:
    PAGE.write_text(text(), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="trust", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("page")
    verbs.add_parser("hash")
    runs = verbs.add_parser("run")
    names = [part.name for part in PARTS]
    runs.add_argument("parts", nargs="*", choices=[*names, []], default=[])
    runs.add_argument("--with", dest="more", default="")
    given = parser.parse_args()
    if given.verb == "hash":
        print(contents())
        return 0
    failed = []
    for part in PARTS if given.verb == "run" else ():
        known = recorded().get(part.name)
        now = {"status": 0, "contents": contents(), "command": part.command}
        done = known is not None and all(known[key] == now[key] for key in now)
        if part.name in given.parts or not (given.parts or done):
            print(f"{part.name}: {part.command} {given.more}", flush=True)
            result = run(part, given.more)
            print(f"{part.name}: status {result['status']}: {result['said']}", flush=True)
            failed += [part.name] if result["status"] else []
            RECORD.write_text(json.dumps(recorded() | {part.name: result}, indent=2) + "\n")
            write_page()
    write_page()
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
