"""`fused-losses bench --breakdown`: where a step's time goes, by samples and the system's counts.

A step's time on T threads is T times its wall clock. Of what the process's threads did not use of
it the system says how long they waited for a core; the rest they were idle: asleep at a barrier, or
in the parts of one thread. What they used is split by samples of perf (a clock's ticks of running
threads, ~1,000 a second) by where each stood: in the kernels by the line table of the extension,
the functions that the compiler has put into one another unfolded by addr2line; in the system by its
own functions; elsewhere by library. Without perf, or without line tables, what they would split is
told in one sum, and why.
"""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fused_losses.backends.cpu import capability as cpu
from fused_losses.bench.micro.cases import Case
from fused_losses.bench.table import CASES, Shape

USUAL = ("margin_softmax", "info_nce")
ROWS = ("fused fp32", "fused bf16")
TASKS = Path("/proc/self/task")
HERTZ = 997  # no multiple of the system's own ticks
LINES = "FUSED_LOSSES_LINES=1 pip install . keeps the line tables"

PRODUCTS = "products, with the stores of their sums"
EXPONENTIALS = "exponentials"
PACKING = "packing: rows and G into a product's order"
SCORES = "the rest of the scores: maxima, masks, sums, G"
FAULTS = "faults of fresh pages"
UNMAPPED = "pages given back"
SYSTEM = "the rest of the system: waking, scheduling"
SPINNING = "threads that spin in OpenMP"
LIBC = "copies and zeroing (libc)"
OUTSIDE = "PyTorch and Python"
IDLE = "idle threads"
WAITING = "threads that waited for a core"
HELPERS = "the extension's steps around its kernels"
KERNELS = "the kernels, not split"
USER = "in the process, not split"

# by the names of functions: the first that a sample stands in, or is unfolded into, decides
BY_NAME = (
    (PRODUCTS, re.compile(r"^(multiply|multiply_\w+|add_(rows|columns|dx|dw)|prefetch_sums|"
                          r"add_lanes|_mm512_dpbf16_ps|(load|store|zero)_(tile|sums))$")),
    (EXPONENTIALS, re.compile(r"^(exp|exp2|expf?|log|log1p|softplus|sigmoid)$")),
    (PACKING, re.compile(r"^(pack_\w+|narrow_rows?|interleave\w*|turn_rows|transpose\w*|dense_rows|"
                         r"read_rows?|write_rows?|write_part|gather|block_of|put|finish|"
                         r"_mm512_cvtne\w+)$")),
)  # fmt: skip
IN_SYSTEM = (
    (FAULTS, re.compile(r"page_fault")),
    (UNMAPPED, re.compile(r"munmap|exit_mmap|zap_pte|madvise")),
)


class Sample(NamedTuple):
    """Where a running thread stood, the innermost frame first: address, function, file."""

    frames: tuple[tuple[int, str, str], ...]


def parsed(text: str) -> Iterator[Sample]:
    """The output of `perf script -F tid,ip,sym,dso`."""
    line = re.compile(r"^\s+([0-9a-f]+) (.*) \((.*)\)$")
    frames: list[tuple[int, str, str]] = []
    for row in text.splitlines():
        found = line.match(row)
        if found:
            frames.append((int(found[1], 16), found[2], found[3]))
        elif frames:
            yield Sample(tuple(frames))
            frames = []
    if frames:
        yield Sample(tuple(frames))


def bare(function: str) -> str:
    """The name alone, without namespaces, templates, arguments and what it returns."""
    function = function.replace("operator()", "call")
    flat, depth = [], 0
    for at in function:
        depth -= at == ">"
        if depth == 0 and at != ">":
            flat.append(at)
        depth += at == "<"
    name = "".join(flat).replace("<", "").partition("(")[0]
    return name.rpartition("::")[2].rpartition(" ")[2].strip()


def of_kernel(unfolded: Sequence[tuple[str, str]]) -> str:
    """What functions with their files are at, the innermost first; the scores have the rest."""
    names = [bare(function) for function, _ in unfolded]
    if any("/bind/" in file for _, file in unfolded):
        return HELPERS
    for part, pattern in BY_NAME[:1]:
        # a sum's store stands in a lambda within the product
        if any(pattern.match(name) for name in names):
            return part
    for name in names:
        for part, pattern in BY_NAME[1:]:
            if pattern.match(name):
                return part
    return SCORES


def text_offset(library: Path) -> int:
    """What the addresses of a library's code are above their places in its file."""
    told = subprocess.run(["readelf", "-lW", library], capture_output=True, text=True, check=True)
    for row in told.stdout.splitlines():
        cells = row.split()
        if cells[:1] == ["LOAD"] and "E" in "".join(cells[6:-1]):
            return int(cells[2], 16) - int(cells[1], 16)
    return 0


def unfolded(library: Path, places: Sequence[int]) -> dict[int, list[tuple[str, str]]]:
    """Functions with files of each place in the library, the innermost first, where known."""
    above = text_offset(library)
    asked = "\n".join(f"{at + above:#x}" for at in places)
    command = ["addr2line", "-a", "-i", "-f", "-C", "-e", str(library)]
    told = subprocess.run(command, input=asked, capture_output=True, text=True, check=True).stdout
    found: dict[int, list[tuple[str, str]]] = {}
    rows = iter(told.splitlines())
    names: list[tuple[str, str]] = []
    for row in rows:
        if row.startswith("0x"):
            names = found.setdefault(int(row, 16) - above, [])
            continue
        file = next(rows, "??")
        if not file.startswith("??"):
            names.append((row, file))
    return found


def parts_of(samples: Sequence[Sample], library: Path | None) -> Counter[str]:
    """How many samples stood in each part. library: the extension with its line tables."""
    name = "_C." if library is None else library.name
    mine = [s.frames[0][0] for s in samples if name in s.frames[0][2]]
    lines = {} if library is None else unfolded(library, sorted(set(mine)))
    found: Counter[str] = Counter()
    for sample in samples:
        address, function, file = sample.frames[0]
        if name in file:
            functions = lines.get(address)
            unknown = KERNELS if library is None else HELPERS
            found[of_kernel(functions) if functions else unknown] += 1
        elif "kernel" in file or address >> 63:
            chain = " ".join(f for _, f, _ in sample.frames)
            found[next((part for part, at in IN_SYSTEM if at.search(chain)), SYSTEM)] += 1
        elif "gomp" in file or "iomp" in file:
            found[SPINNING] += 1
        elif "libm." in file or "libm-" in file:
            found[EXPONENTIALS if bare(function).startswith(("exp", "__exp")) else OUTSIDE] += 1
        elif "libc." in file and re.search(r"mem(set|cpy|move)", function):
            found[LIBC] += 1
        else:
            found[OUTSIDE] += 1
    return found


def sampled(run: Callable[[], None], folder: Path) -> tuple[list[Sample], str]:
    """Samples of this process while `run` runs, or none and why."""
    if shutil.which("perf") is None:
        run()
        return [], "perf is not installed"
    data = folder / "perf.data"
    command = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(HERTZ), "-g", "-o", str(data)]
    command += ["-p", str(os.getpid())]
    recorder = subprocess.Popen(
        command, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        time.sleep(1.0)  # until it listens; or has refused, and the steps run without it
        run()
    finally:
        recorder.send_signal(signal.SIGINT)
        _, told = recorder.communicate()
    if not data.is_file():
        return [], f"perf record: {' '.join(told.split()) or 'no data'}"
    script = ["perf", "script", "-i", str(data), "-F", "tid,ip,sym,dso"]
    read = subprocess.run(script, capture_output=True, text=True, check=False)
    samples = list(parsed(read.stdout))
    return samples, "" if samples else f"perf script: {' '.join(read.stderr.split()) or 'empty'}"


def waited() -> float | None:
    """Seconds that this process's threads have waited for a core, ready to run; None: not told."""
    try:
        told = [(task / "schedstat").read_text().split() for task in TASKS.iterdir()]
    except OSError:
        return None
    return sum(int(cells[1]) for cells in told) / 1e9


def library() -> tuple[Path | None, str]:
    """The extension, if its kernels have line tables and addr2line is there; else why not."""
    built = cpu.extension()
    if built is None:
        return None, "the extension is not built"
    path = Path(built.__file__)
    missing = [tool for tool in ("addr2line", "readelf") if shutil.which(tool) is None]
    if missing:
        return None, f"{missing[0]} (binutils) is not installed"
    told = subprocess.run(["readelf", "-SW", path], capture_output=True, text=True, check=True)
    if ".debug_line" not in told.stdout:
        return None, f"the extension has no line tables: {LINES}"
    return path, ""


def measured(
    title: str,
    step: Callable[[], object],
    flops: float,
    steps: int,
    shown: tuple[Path | None, str],
) -> dict[str, Any]:
    """The parts of a step of so many FLOPs of products, over `steps` of them after one more."""
    threads = torch.get_num_threads()
    step()
    times: list[float] = []
    used = [0.0, 0.0]
    late: list[float | None] = [None, None]
    faults = [0]

    def run() -> None:
        late[0] = waited()
        before, at = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        for _ in range(steps):
            step()
            times.append(time.perf_counter() - at)
            at = time.perf_counter()
        after = resource.getrusage(resource.RUSAGE_SELF)
        used[:] = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
        late[1] = waited()
        faults[:] = [after.ru_minflt - before.ru_minflt]

    with tempfile.TemporaryDirectory() as folder:
        samples, why = sampled(run, Path(folder))
    wall, busy = sum(times), sum(used)
    whole = max(threads * wall, busy)
    path, no_lines = shown
    parts: list[dict[str, Any]] = []

    def tell(name: str, seconds: float, how: str, ran: bool = True) -> None:
        part = {"name": name, "ms": 1e3 * seconds / steps, "share": seconds / whole, "how": how}
        parts.append(part | {"of_what_ran": seconds / busy if ran and busy else None})

    if samples:
        counts = parts_of(samples, path)
        of_system = any(s.frames[0][0] >> 63 for s in samples)
        shared = busy if of_system else used[0]
        for name, count in counts.most_common():
            share = count / len(samples)
            error = math.sqrt(share * (1 - share) / len(samples)) * shared / whole
            how = f"{count:,} of {len(samples):,} samples, standard error {error:.1%}"
            tell(name, share * shared, f"{how}; {no_lines}" if name == KERNELS else how)
        if not of_system:
            tell(SYSTEM, used[1], "getrusage; perf may not look into the system here")
    else:
        tell(USER, used[0], f"getrusage; {why}")
        tell("in the system, not split", used[1], f"getrusage; {why}")
    rest, how = whole - busy, f"{threads} threads' wall clock less what getrusage says they used"
    if late[0] is None or late[1] is None:
        tell(f"{IDLE}, or waiting for a core", rest, how, ran=False)
    else:
        # other threads than the T may have waited too, and one that ends takes its account with it
        queued = min(max(late[1] - late[0], 0.0), rest)
        tell(WAITING, queued, "/proc/self/task/*/schedstat", ran=False)
        tell(IDLE, rest - queued, f"{how} and waited for", ran=False)
    return {
        "title": title,
        "threads": threads,
        "steps": steps,
        "ms": 1e3 * statistics.median(times),
        "flops": flops,
        "faults": faults[0] / steps,
        "samples": len(samples),
        "parts": parts,
    }


def cases(
    names: Sequence[str], shapes: Callable[[str], Sequence[Shape]], steps: int,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The breakdown of each case's rows in float32 and, where the CPU has it, bfloat16."""
    shown = library()
    for name in names:
        for shape in shapes(name):
            case = CASES[name].make(*shape, device="cpu", rivals="none")
            rows = [r for r in case.ours if r in ROWS] or case.ours[:1]
            for row in rows:
                say(f"breakdown: {case.title}, {row}")
                step = partial(_step, case, row)
                yield measured(f"{case.title}, {row}", step, case.flops, steps, shown)


def _step(case: Case, row: str) -> None:
    case.clear()
    case.providers[row]()


def summary(found: dict[str, Any]) -> str:
    """The step's time, and what its products reach while they run."""
    told = (
        f"{found['ms']:,.1f} ms a step (median of {found['steps']}) on {found['threads']} threads; "
        f"{found['flops'] / found['ms'] / 1e6:,.1f} GFLOP/s of products"
    )
    products = next((part["ms"] for part in found["parts"] if part["name"] == PRODUCTS), 0.0)
    if products:
        told += f", {found['flops'] / products / 1e6:,.1f} a thread in the products themselves"
    return f"{told}; {found['faults']:,.0f} page faults a step."


def percent(share: float | None) -> str:
    """Nothing where there is none."""
    return "" if share is None else f"{share:.1%}"


def table(found: dict[str, Any]) -> list[str]:
    """Markdown."""
    lines = [
        f"## {found['title']}",
        "",
        summary(found),
        "",
        "| part | of the threads' time | of what ran | ms of a thread a step | how it was got |",
        "|---|---|---|---|---|",
    ]
    return [
        *lines,
        *(
            f"| {part['name']} | {percent(part['share'])} | {percent(part['of_what_ran'])} "
            f"| {part['ms']:.2f} | {part['how']} |"
            for part in found["parts"]
        ),
        "",
    ]
