"""gpu_static.md: every kernel's figures, the gate's findings, and the peers' beside ours."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

from tools.gpu_static.calls import CALLS
from tools.gpu_static.gate import KIB, LIMITS, NARROW, SCALAR, faults, occupancy
from tools.gpu_static.machine_code import Figures, tool
from tools.gpu_static.record import NVIDIA

PEERS_FIGURES = Path(__file__).with_name("peers.csv")
# a shape of the peers: what it is, and our kernels for it as (call, kernel, rows, columns, D);
# bytes are operands that tiles read, where rows are given
SHAPES = {
    "S1 forward": (
        "margin-softmax forward: 1,024 rows, 1,000,000 classes, D = 512, bf16",
        [
            ("row_statistics D512", "forward_resident", 0, 0, 0),
            ("row_statistics D512", "forward_tiles", 1024, 1_000_000, 512),
        ],
    ),
    "S1 backward": (
        "margin-softmax backward: as forward; ours stores a chunk of G, and two library products "
        "read it",
        [("row_statistics D512", "gradient_tiles", 1024, 1_000_000, 512)],
    ),
    "S2 forward": (
        "contrastive forward: 32,768 x 32,768 pairs, D = 512, bf16",
        [
            ("pairs rows", "statistics_tiles", 32768, 32768, 512),
            ("pairs two sides", "statistics_tiles", 32768, 32768, 512),
        ],
    ),
    "S2 backward": (
        "contrastive backward: as forward; ours stores a chunk of G, and library products read it",
        [
            ("pairs rows", "gradient_tiles", 32768, 32768, 512),
            ("pairs two sides", "gradient_tiles", 32768, 32768, 512),
        ],
    ),
    "S3 forward": (
        "MaxSim forward: 64 queries of 32 tokens, 64 documents of 256 tokens, d = 128, bf16",
        [("maxsim D128", "token_maxima", 2048, 16384, 128)],
    ),
    "S3 backward": (
        "MaxSim backward: as forward",
        [
            ("maxsim D128", "document_gradients", 0, 0, 0),
            ("maxsim D128", "query_gradients", 0, 0, 0),
        ],
    ),
    "top-k": (
        "the k best columns: ours keeps up to 128 candidates a row, and certifies them afterwards",
        [
            ("topk few", "best_columns", 32768, 32768, 512),
            ("topk", "best_columns", 32768, 32768, 128),
        ],
    ),
}
Found = list[tuple[str, Figures]]


def _version(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"[Vv](\d+\.\d+\.\d+)", run.stdout)
    return found[1] if found else "unknown"


def versions(nvcc: str | None) -> str:
    import triton

    parts = [f"Triton {triton.__version__}", f"its ptxas {_version(tool('ptxas'), '--version')}"]
    blackwell = tool("ptxas-blackwell")
    if Path(blackwell).exists():
        parts[-1] += f" (sm_100 and later: {_version(blackwell, '--version')})"
    parts.append(f"nvcc {_version(nvcc, '--version')}" if nvcc else "no nvcc")
    return ", ".join(parts)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items()) or "none"


def _shared(f: Figures) -> str:
    columns = f" + {f.tensor_memory} col." if f.tensor_memory else ""
    return f"{round(f.shared / KIB, 1):g}{columns}"


def _resident(f: Figures) -> str:
    blocks = occupancy(f.arch, f.warps, f.registers, f.shared, f.tensor_memory)
    return f"{blocks} / {blocks * f.warps}"


def _cells(f: Figures) -> list[str]:
    return [
        str(f.registers),
        str(f.local),
        _shared(f),
        _resident(f),
        _counts(f.products),
        _counts(dict(sorted(f.loads.items(), key=_by_width))),
        _counts(f.atomics),
    ]


def _by_width(load: tuple[str, int]) -> int:
    name = load[0]
    return -(999 if name == "UTMALDG" else int(name.rsplit(".", 1)[1]))


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _merged(rows: Iterable[tuple[list[str], str, list[str]]]) -> list[list[str]]:
    """(before, target, after): targets that agree in all else share a row."""
    groups: dict[tuple, list[str]] = {}
    for before, arch, after in rows:
        groups.setdefault((*before, None, *after), []).append(arch.removeprefix("sm_"))
    return [
        [*key[: key.index(None)], ", ".join(archs), *key[key.index(None) + 1 :]]
        for key, archs in groups.items()
    ]


FIGURES = ("registers", "local", "shared KiB", "blocks / warps", "tensor cores", "loads", "atomics")


def _triton(found: Found) -> list[str]:
    out = []
    for operation in dict.fromkeys(call.operation for call in CALLS.values()):
        mine = [(name, f) for name, f in found if CALLS[name].operation == operation]
        mine = [(n.removeprefix(operation).strip() or "plain", f) for n, f in mine]
        rows = (
            ([name, f.kernel], f.arch, [f.tile, f"{f.warps} / {f.stages}", *_cells(f)])
            for name, f in sorted(mine, key=lambda one: (one[1].kernel, one[0], one[1].tile))
        )
        head = ("call", "kernel", "target", "tile", "warps / stages", *FIGURES)
        out += [f"### {operation}", "", *_table(head, _merged(rows)), ""]
    return out


def _cuda(found: list[Figures]) -> list[str]:
    rows = (
        ([f"`{f.kernel}`"], f.arch, [str(f.warps), *_cells(f)])
        for f in sorted(found, key=lambda f: f.kernel)
    )
    return _table(("kernel", "target", "warps", *FIGURES), _merged(rows))


def peers() -> list[dict[str, str]]:
    with PEERS_FIGURES.open(newline="") as file:
        return list(csv.DictReader(file))


def _ours(found: Found, shape: str) -> list[list[str]]:
    out = []
    for call, kernel, rows, columns, d in SHAPES[shape][1]:
        for name, f in found:
            if (name, f.kernel) != (call, kernel) or f.arch not in NVIDIA:
                continue
            sizes = [int(s) for s in f.tile.split("x")]
            read = ""
            if rows:
                read = f"{rows * columns * d * 2 * (1 / sizes[0] + 1 / sizes[1]) / 1e9:.3g} GB"
            cells = _cells(f)
            out.append(
                [f"**ours: {kernel}** ({call})", f.arch.removeprefix("sm_"), f.tile]
                + [f"{f.warps} / {f.stages}", *cells, read]
            )
    return out


def _theirs(shape: str) -> list[list[str]]:
    out = []
    for p in peers():
        if p["shape"] != shape:
            continue
        note = f" ({p['note']})" if p["note"] else ""
        columns = f" + {p['tensor_memory']} col." if p["tensor_memory"] != "0" else ""
        out.append(
            [p["kernel"] + note, p["arch"].removeprefix("sm_"), p["tile"]]
            + [f"{p['warps']} / {p['stages']}", p["registers"], p["spills"]]
            + [p["shared_kib"] + columns, f"{p['blocks']} / {p['resident_warps']}"]
            + [p["products"], p["loads"], p["atomics"], p["bytes"]]
        )
    return out


def _beside(found: Found) -> list[str]:
    out = []
    head = ("kernel", "target", "tile", "warps / stages", *FIGURES, "bytes")
    for shape, (text, _) in SHAPES.items():
        rows = _ours(found, shape) + _theirs(shape)
        out += [f"### {shape}", "", f"{text[0].upper()}{text[1:]}.", "", *_table(head, rows), ""]
    return out


INTRODUCTION = """# What the GPU kernels compile to

Written by `make gpu-static`, which needs no GPU: every figure is read from machine code, none was
timed. Made with {versions}.

Each Triton kernel is compiled as its launcher would launch it: the calls of
`tools/gpu_static/calls.py` between them take every entry of every tile table, in each kind of
products, with the fewest and the most optional inputs, for rows of whole vectors and of others. The
CUDA C++ kernels are those of the library that `setup.py` builds. Tiles are rows x columns x depth.
`local`: spills and other local memory. `shared`: a block's; of the CUDA kernels without what the
launch adds. `blocks / warps`: how many a multiprocessor holds at once. Instruction counts are
static: one in a loop counts once. A kernel that several calls share stands with the first.

| target | shared memory a block, KiB | a multiprocessor, KiB | warps | blocks |
| --- | --- | --- | --- | --- |
{targets}

{kernels} kernels times targets, {faults}.
"""

GATE = """## The gate

`make gpu-static` fails, and `test_gpu_static.py` with it on a selection, on

- a kernel that does not compile, or compiles to a trap stub (what too much tensor memory leaves);
- any spill or other local memory;
- more shared memory than a block may have, or more than 512 columns of tensor memory;
- matrix products in the source and no tensor-core instruction in the machine code;
- an atomic or a lock: none in Triton kernels, but the bits in shared memory by which sm_100 allots
  tensor memory; in CUDA kernels integer sums alone, whose order does not matter;
- a load of a tile (more than one row and column) in accesses narrower than 16 bytes, or than a
  thread's share of the tile: always where the load has no mask, and with a mask where the call's
  rows are whole vectors, N and M multiples of 16;
- a CUDA kernel whose widest load is below 16 bytes.

Exempt from the last two:

{exempt}
"""


PEERS_NOTE = """Peers' kernels, compiled the same way with Triton 3.6.0 (CuTe: nvidia-cutlass-dsl
4.8.1). Measured are their registers, spills, shared memory and instructions; derived are their
bytes: from L2 / through DRAM / the floor. Our bytes are what tiles read of the operands, derived;
the rest is in [roofline.md](roofline.md).
"""


def write(path: Path, triton: Found, cuda: list[Figures], nvcc: str | None) -> list[str]:
    """Writes the page; every fault found, one line each."""
    wrong = findings(triton, cuda)
    targets = [
        f"| {name} | {t.shared // KIB} | {t.shared_all // KIB} | {t.warps} | {t.blocks} |"
        for name, t in LIMITS.items()
    ]
    text = INTRODUCTION.format(
        versions=versions(nvcc),
        targets="\n".join(targets),
        kernels=len(triton) + len(cuda),
        faults=f"{len(wrong)} faults" if wrong else "no fault",
    ).splitlines()
    text += ["", *(f"- {line}" for line in wrong)] if wrong else []
    exempt = [f"- `{k}`: {why}." for k, why in (NARROW | SCALAR).items()]
    text += ["", *GATE.format(exempt="\n".join(exempt)).splitlines(), ""]
    text += ["## Beside the peers", ""]
    text += [*PEERS_NOTE.splitlines(), ""]
    text += _beside(triton)
    text += ["## Triton kernels", "", *_triton(triton), "## CUDA C++ kernels", ""]
    text += _cuda(cuda) if cuda else ["No library: nvcc was not found."]
    path.write_text("\n".join(text).rstrip() + "\n")
    return wrong


def findings(triton: Found, cuda: list[Figures]) -> list[str]:
    named = [(f"{call}: {f.kernel}", f, CALLS[call].aligned) for call, f in triton]
    named += [(f.kernel, f, True) for f in cuda]
    return [f"{name} on {f.arch}: {fault}" for name, f, ok in named for fault in faults(f, ok)]
