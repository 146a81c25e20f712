"""What a kernel takes of a GPU, read from its machine code: NVIDIA's disassembled, AMD's assembly.

Counts are static: an instruction of a loop counts once.
"""

from __future__ import annotations

import importlib
import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from fused_losses.backends.gpu.tiles import Tile
from fused_losses.backends.triton import launch as triton_launch
from tools.gpu_static.record import SIZES, Compilation

TARGETS = {"gfx942": ("hip", "gfx942", 64)}
# the tensor cores of one generation after another
PRODUCTS = re.compile(r"(?:HMMA|IMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA|QMMA|OMMA|v_s?mfma\w*)$")
LOADS = ("LDG", "LDGSTS", "UTMALDG")
# a lock or a sum of floats in whichever order; sums of integers are the same in any
UNORDERED = re.compile(r"CAS|EXCH|\.F(?:16|32|64)|F32x\d|BF16|F16x2")
LANES = 32


@dataclass(frozen=True)
class TileLoad:
    """One load of a tile of a matrix: how wide its accesses are, and how wide they could be."""

    place: str  # file:line
    masked: bool
    bytes: int  # the narrowest access
    possible: int  # 16, or less where a thread's share of the tile is less


@dataclass
class Figures:
    kernel: str
    arch: str
    language: str = "triton"
    tile: str = ""
    warps: int = 0
    stages: int = 0
    registers: int = 0
    local: int = 0  # bytes of stack and local memory, and accesses to them
    shared: int = 0  # bytes a block
    tensor_memory: int = 0  # columns
    instructions: int = 0
    products: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)  # of global memory, "LDG.128" -> how many
    atomics: dict[str, int] = field(default_factory=dict)
    multiplies: bool = False  # the source has matrix products
    trap: bool = False
    tile_loads: list[TileLoad] = field(default_factory=list)
    failure: str = ""  # why there is no machine code

    @property
    def widest(self) -> int:
        """Bits of the widest load of global memory."""
        return max((width(name) for name in self.loads), default=0)


def width(load: str) -> int:
    if load == "UTMALDG":
        return 128
    return int(load.rsplit(".", 1)[1])


def tool(name: str) -> str:
    """A tool of NVIDIA's as Triton's own wheel has it."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def dump(file: str, *flags: str) -> str:
    command = [tool("cuobjdump"), "-sass", "--dump-resource-usage", *flags, file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def code(cubin: bytes) -> bytes:
    """The instructions of the one kernel of an ELF file."""
    (headers,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    sections = [
        struct.unpack_from("<IIQQQQ", cubin, headers + i * size)  # name, ..., offset, size
        for i in range(count)
    ]
    at = sections[names][4]
    found = [s for s in sections if cubin.startswith(b".text.", at + s[0])]
    ((*_, begin, length),) = found
    return cubin[begin : begin + length]


def disassembled(arch: str, kernels: list[bytes]) -> list[Counter[str]]:
    """How often each kernel has each instruction. One run for all: half a second starts it."""
    with tempfile.NamedTemporaryFile(suffix=".raw") as file:
        file.write(b"".join(kernels))
        file.flush()
        # Triton compiles for what is this generation's alone
        name = f"SM{arch[3:]}{'a' * (int(arch[3:]) >= 90)}"
        command = [tool("nvdisasm"), "-ndf", "-b", name, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ends = list(accumulate(map(len, kernels)))
    out: list[Counter[str]] = [Counter() for _ in kernels]
    for found in INSTRUCTION.finditer(text):
        out[bisect_right(ends, int(found[1], 16))][found[2]] += 1
    return out


def functions(text: str) -> Iterator[tuple[str, str]]:
    """The kernels of a dump of SASS, each with its instructions."""
    for part in re.split(r"^\s*Function : ", text, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        yield name.strip(), body


def usage(text: str) -> dict[str, dict[str, int]]:
    """Of every kernel of a dump: REG, STACK, SHARED, LOCAL."""
    found = re.findall(r"^ Function (\S+):\n\s*(REG:.*)$", text, flags=re.MULTILINE)
    return {
        name: {key: int(value) for key, value in re.findall(r"\b([A-Z]+):(\d+)", line)}
        for name, line in found
    }


INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*(?:\.\w+)*)", re.M)


def opcodes(sass: str) -> Counter[str]:
    return Counter(name for _, name in INSTRUCTION.findall(sass))


def read(figures: Figures, found: Counter[str], resources: dict[str, int]) -> Figures:
    """Fills in what the instructions and the resource usage of one kernel say."""
    kinds = Counter()
    for name, count in found.items():
        kinds[name.split(".")[0]] += count
    figures.instructions = sum(n for name, n in kinds.items() if name != "NOP")
    figures.registers = resources["REG"]
    figures.local = resources["STACK"] + resources["LOCAL"] + kinds["STL"] + kinds["LDL"]
    figures.products = {k: n for k, n in sorted(kinds.items()) if PRODUCTS.match(k)}
    for name, count in sorted(found.items()):
        kind = name.split(".")[0]
        if kind in LOADS:
            label = kind if kind == "UTMALDG" else f"{kind}.{_bits(name)}"
            figures.loads[label] = figures.loads.get(label, 0) + count
        elif kind in ("ATOM", "ATOMG", "ATOMS", "RED", "REDG", "UTMAREDG"):
            figures.atomics[name] = count
    figures.trap = kinds["BPT"] > 0
    return figures


def _bits(name: str) -> int:
    parts = name.split(".")[1:]
    for part in parts:
        if part in ("64", "128", "256"):
            return int(part)
        if part in ("U8", "S8"):
            return 8
        if part in ("U16", "S16"):
            return 16
    return 32


# ---- Triton --------------------------------------------------------------------------------------


def compiled(arch: str, key: Compilation) -> Any:
    """The kernel compiled for a target; Triton's own cache keeps it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    module, name = key.kernel.rsplit(".", 1)
    attrs = {place: [["tt.divisibility", 16]] for place in key.attributes}
    function = getattr(importlib.import_module(module), name)
    source = ASTSource(function, dict(key.signature), dict(key.constants), attrs)
    target = TARGETS.get(arch) or ("cuda", int(arch[3:]), LANES)
    options = triton_launch.options(Tile(0, 0, 0, key.warps, key.stages))
    return triton.compile(source, target=GPUTarget(*target), options=options)


def figures(arch: str, keys: Iterable[Compilation]) -> list[Figures]:
    """Compiles specialisations and reads them."""
    out: list[Figures] = []
    cubins: dict[int, bytes] = {}
    for key in keys:
        constants = dict(key.constants)
        sizes = [constants[name] for name in SIZES if name in constants]
        tile = "x".join(map(str, sizes))
        out.append(Figures(key.name, arch, tile=tile, warps=key.warps, stages=key.stages))
        try:
            binary = compiled(arch, key)
        except Exception as error:  # whatever the compiler raises is a finding
            out[-1].failure = f"{type(error).__name__}: {str(error)[-400:]}"
            continue
        read_binary(out[-1], binary)
        if "cubin" in binary.asm:
            cubins[len(out) - 1] = binary.asm["cubin"]
    found = disassembled(arch, [code(cubin) for cubin in cubins.values()]) if cubins else []
    for (i, cubin), instructions in zip(cubins.items(), found, strict=True):
        read(out[i], instructions, resources(cubin))
    return out


def resources(cubin: bytes) -> dict[str, int]:
    """What the one kernel of a binary takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (found,) = usage(text).values()
    return found


def read_binary(out: Figures, binary: Any) -> None:
    """Fills in what Triton says of what it compiled; of AMD's, also what its assembly does."""
    out.shared = binary.metadata.shared
    out.multiplies = "tt.dot" in binary.asm["ttir"]
    if "amdgcn" in binary.asm:
        _read_amd(out, binary.asm["amdgcn"])
        return
    out.tensor_memory = getattr(binary.metadata, "tmem_size", 0) or 0
    out.tile_loads = tile_loads(binary.asm["ttir"], binary.asm["ptx"], LANES * out.warps)


def _read_amd(out: Figures, text: str) -> None:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", text)
        assert found is not None, name
        return int(found[1])

    out.registers = number("vgpr_count")
    # scalar registers spill into lanes of vector registers, not to memory
    out.local = number("vgpr_spill_count") + number("private_segment_fixed_size")
    found = Counter(re.findall(r"^\s+([a-z]\w+)\b", text, flags=re.MULTILINE))
    out.instructions = sum(found.values())
    widths = dict(dwordx4=128, dwordx3=96, dwordx2=64, dword=32, ushort=16, ubyte=8, sbyte=8)
    for name, count in sorted(found.items()):
        if PRODUCTS.match(name):
            out.products[name] = count
        elif load := re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+?)(?:_d16\w*)?$", name):
            label = f"load.{widths.get(load[1], 16)}"
            out.loads[label] = out.loads.get(label, 0) + count
        elif "_atomic_" in name or "_cmpswap" in name:
            out.atomics[name] = count


# ---- how wide the loads of tiles are -------------------------------------------------------------

LOCATION = re.compile(r"^(#loc\w*) = loc\((.*)\)$", re.MULTILINE)
ITEM = {"f64": 8, "i64": 8, "f32": 4, "i32": 4, "bf16": 2, "f16": 2, "i16": 2, "i8": 1, "i1": 1}


def _chain(locations: dict[str, str], name: str) -> tuple[str, ...]:
    """Where an instruction stands, from the innermost function outwards: file:line:column."""
    text = locations.get(name, name)
    if call := re.fullmatch(r"callsite\((#loc\w*) at (#loc\w*)\)", text):
        return _chain(locations, call[1]) + _chain(locations, call[2])
    if place := re.fullmatch(r'"([^"]*)":(\d+):(\d+)', text):
        return (f"{Path(place[1]).name}:{place[2]}:{place[3]}",)
    if named := re.fullmatch(r'"[^"]*"\((#loc\w*)\)', text):
        return _chain(locations, named[1])
    return (text,)


def _place(line: str, files: dict[str, str]) -> tuple[str, ...]:
    """Where a `.loc` says that it is: Triton 3.9 and later name two places of a chain at most."""
    if inlined := re.search(r"\.loc\s+(\d+) (\d+) (\d+), .*inlined_at (\d+) (\d+) (\d+)", line):
        numbers = inlined.groups()
        return tuple(f"{files.get(numbers[i])}:{':'.join(numbers[i + 1 : i + 3])}" for i in (0, 3))
    return tuple(re.findall(r"[\w.]+:\d+:\d+", line.partition("//")[2]))


def _accesses(ptx: str) -> dict[tuple[str, ...], int]:
    """The narrowest access to global memory, in bytes, of each place of the source."""
    named = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', ptx, flags=re.MULTILINE)
    files = {number: Path(name).name for number, name in named}
    narrowest: dict[tuple[str, ...], int] = {}
    here: tuple[str, ...] = ()
    within = False
    for line in ptx.splitlines():
        if "inline asm" in line:
            within = "begin" in line
        elif re.match(r"\s*\.loc\s[^/]*//", line):
            # Triton 3.9 counts the lines of the text within as if they were the source's
            here = here if within else _place(line, files)
        elif copy := re.search(
            r"\bcp\.async\.c[ga]\.\S+ \[[^\]]*\], \[[^\]]*\], (0x\w+|\d+)", line
        ):
            narrowest[here] = min(narrowest.get(here, 99), int(copy[1], 0))
        elif load := re.search(r"\bld\.(?:volatile\.)?global\S*?(?:\.v(\d))?\.[busf](\d+)\b", line):
            size = int(load[1] or 1) * int(load[2]) // 8
            narrowest[here] = min(narrowest.get(here, 99), size)
        elif "cp.async.bulk.tensor" in line:
            narrowest[here] = min(narrowest.get(here, 99), 16)
    return narrowest


def tile_loads(ttir: str, ptx: str, threads: int) -> list[TileLoad]:
    """The loads of tiles that have more than one row and column."""
    locations = dict(LOCATION.findall(ttir))
    accesses, out = _accesses(ptx), {}
    pattern = r"tt\.load (.*?) : tensor<(\d+)x(\d+)x!tt\.ptr<(\w+)>> loc\((#loc\w*)\)"
    for operands, rows, columns, item, location in re.findall(pattern, ttir):
        if min(int(rows), int(columns)) == 1:
            continue
        chain = _chain(locations, location)
        share = int(rows) * int(columns) * ITEM[item] // threads
        got = accesses.get(chain, accesses.get(chain[:2], 0))
        load = TileLoad(
            " < ".join(c.rsplit(":", 1)[0] for c in chain),
            "," in operands.split("{")[0],
            got,
            max(ITEM[item], min(16, share)),
        )
        out[chain] = load
    return list(out.values())
