"""The gate of `make gpu-static` on a selection of kernels and targets, and what it must catch.

No GPU is needed: the host code runs on tensors without data, each distinct kernel that it launches
is compiled, and the machine code is read.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

from fused_losses import primitives
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.primitives.class_rules import triton_tiles as triton_class_tiles
from fused_losses.primitives.distances import triton as triton_distances
from fused_losses.primitives.divergence import triton_tiles as triton_divergence_tiles
from fused_losses.primitives.maxsim import triton as triton_maxsim
from fused_losses.primitives.pairs import triton_tiles as triton_pair_tiles
from fused_losses.primitives.row_statistics import triton_tiles
from fused_losses.primitives.topk import triton as triton_topk
from tools.gpu_static import cuda_library, gate, machine_code, page, sweep
from tools.gpu_static.calls import CALLS, compilations, selection
from tools.gpu_static.machine_code import Figures
from tools.gpu_static.record import AMD, NVIDIA, SIZES, Compilation, launches, on, specialise

pytest.importorskip("triton")

from triton._utils import find_paths_if
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

if triton_launch.interpreted():
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("gpu_static")]

TABLE_ROWS = ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942")


@pytest.fixture(scope="module")
def found() -> page.Found:
    return sweep.sweep(selection())


@pytest.mark.gate
@pytest.mark.parametrize("arch", NVIDIA + AMD)
def test_triton_kernels(found: page.Found, arch: str) -> None:
    mine = [(call, f) for call, f in found if f.arch == arch]
    assert mine and page.findings(mine, []) == []


def test_cuda_kernels() -> None:
    library = cuda_launch.FOLDER / cuda_launch.ON_DEVICE
    if not library.is_file():
        pytest.skip("the CUDA C++ kernels are not built: no nvcc")
    kernels = cuda_library.sweep(library)
    assert {f.arch for f in kernels} == set(NVIDIA)
    assert page.findings([], kernels) == []


# ---- that the calls are all there is -------------------------------------------------------------


def test_every_kernel_is_compiled() -> None:
    package = Path(primitives.__file__).parents[1]
    kernels = set()  # name and source: two files may have helpers of one name
    for file in package.rglob("triton_*.py"):
        parts = file.relative_to(package.parent).with_suffix("").parts
        module = importlib.import_module(".".join(parts))
        kernels |= {(n, f.src) for n, f in vars(module).items() if isinstance(f, JITFunction)}
    # what no other calls is launched
    names = {name for name, _ in kernels}
    called = {
        name
        for name in names
        if any(re.search(rf"\b{name}\(", source) for other, source in kernels if other != name)
    }
    assert {key.name for key in compilations("sm_90")} == names - called


class Taken(dict):
    """A tile table that notes what is taken from it."""

    def __init__(self, table: dict) -> None:
        super().__init__(table)
        self.taken: set = set()

    def __getitem__(self, key: Any) -> Any:
        self.taken.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 (this is get)


# what `same` and `wide` fill in, and no call can ask for: (kernel, products)
NEVER = {
    # the screen of a top-k has no tf32
    *(("best", "tf32"), ("best_uneven", "tf32"), ("keys", "tf32")),
    # a backward of MaxSim multiplies in the precision of its rows
    *((f"documents{kind}", p) for kind in ("", "_uneven") for p in ("tf32", "rounded")),
}


@pytest.mark.parametrize("row", TABLE_ROWS)
def test_every_tile_is_taken(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that no call reaches would never be compiled."""
    noted = []
    for tables in (triton_tiles.TABLES, triton_pair_tiles.TABLES, triton_class_tiles.TABLES):
        noted.append(Taken(tables[row].tiles))
        monkeypatch.setitem(tables, row, replace(tables[row], tiles=noted[-1]))
    for module in (triton_topk, triton_distances, triton_maxsim):
        noted.append(Taken(module.TILES[row]))
        monkeypatch.setitem(module.TILES, row, noted[-1])
    noted.append(Taken(triton_divergence_tiles.TILES[row]))
    monkeypatch.setitem(triton_divergence_tiles.TILES, row, noted[-1])
    compilations(row)
    left = {key for table in noted for key in set(table) - table.taken} - NEVER
    # tf32 is refused on AMD
    assert {key for key in left if row not in AMD or key[1] != "tf32"} == set()


# ---- what decides nothing that is compiled -------------------------------------------------------


def keys(name: str, arch: str, **changes: Any) -> list[Compilation]:
    return launches(arch, CALLS[name].steps(**changes))


@pytest.mark.parametrize("arch", TABLE_ROWS)
@pytest.mark.parametrize(
    "name, widths",
    [
        ("pairs everything", (64, 128, 768, 1024)),
        ("pairs attention", (64, 128, 768, 1024)),
        ("pairs fp32", (64, 128, 768, 1024)),
        ("distances", (256, 768, 1024)),
        ("topk", (256, 768, 1024)),
    ],
)
def test_width_decides_nothing(name: str, widths: tuple[int, ...], arch: str) -> None:
    """So that the machine code of one width stands for every one."""
    want = keys(name, arch)
    assert all(keys(name, arch, d=d) == want for d in widths)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("row_statistics D512", dict(n=1000)),
        ("class_rules best", dict(n=1000, many=7, centers=16)),
        ("class_rules soft", dict(n=1000, softness=0.3)),
        ("pairs everything", dict(exclude=16)),
        ("pairs everything", dict(reach=3.0, n=4100, m=9000)),
        ("topk", dict(n=1000, m=70001, keep=100)),
        ("distances", dict(n=1024, m=512)),
        ("maxsim D128", dict(shape=(33, 17, 29, 301))),
    ],
)
def test_sizes_decide_nothing(name: str, changes: dict[str, Any]) -> None:
    """Another batch, margin schedule, k or list of exclusions does not compile anew."""
    assert keys(name, "sm_90", **changes) == keys(name, "sm_90")


@pytest.mark.parametrize(
    "name",
    ("row_statistics D128 everything", "class_rules soft sphereface2", "pairs everything", "topk"),
)
def test_specialisation_is_that_of_triton(name: str) -> None:
    """Of groups of arguments, too."""
    target = make_backend(GPUTarget("cuda", 90, 32))
    ran = []

    def with_data(argument: Any) -> Any:
        whole = isinstance(argument, torch.Tensor)
        return torch.empty(64, dtype=argument.dtype) if whole else argument

    def launch(kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        key = specialise(kernel, args, constants, tile)
        bind = create_function_from_signature(kernel.signature, kernel.params, target)
        _, found, _ = bind(*triton_launch.changed(args, with_data), **constants)
        kinds = [kind for kind, _ in found]
        assert kinds == [kind for _, kind in key.signature]
        divided = find_paths_if([value for _, value in found], lambda _, v: v == "D")
        assert set(divided) == set(key.attributes)
        ran.append(key.name)

    with on("sm_90", launch):
        CALLS[name].steps()()
    assert ran


@pytest.mark.parametrize(
    "name",
    [
        "row_statistics D512 everything",
        "row_statistics D128 rounded",
        "class_rules soft sphereface2",
        "pairs everything",
        "pairs triangle",
        "pairs attention",
        "distances",
        "topk",
        "topk stored fp32 D100",
        "maxsim D128",
        "maxsim D768",
    ],
)
def test_offsets_are_64_bit(name: str) -> None:
    """No offset of a row is a 32-bit product: those of tensors multiply in 64 bits only."""
    for key in keys(name, "sm_90"):
        text = machine_code.compiled("sm_90", key).asm["ttir"]
        products = re.findall(r"arith\.muli .*?: (\S+)", text)
        assert not [p for p in products if p.startswith("tensor") and p.endswith("xi32>")], key


# ---- occupancy, and the peers' table -------------------------------------------------------------


def test_occupancy_is_that_of_the_peers_table() -> None:
    """Two tables that were made apart agree on how many blocks a multiprocessor holds."""
    compared = 0
    for peer in page.peers():
        if "x" not in peer["tile"] or "CuTe" in peer["kernel"]:
            continue
        shared = round(float(peer["shared_kib"]) * gate.KIB)
        numbers = (int(peer[k]) for k in ("warps", "registers"))
        got = gate.occupancy(peer["arch"], *numbers, shared, int(peer["tensor_memory"]))
        assert got == int(peer["blocks"]), peer
        compared += 1
    assert compared > 50


def test_occupancy_by_hand() -> None:
    # 128 registers: 4 warps a partition, two blocks of 8; 99 KiB leave room for one block
    assert gate.occupancy("sm_80", 8, 128, 64 * gate.KIB) == 2
    assert gate.occupancy("sm_86", 8, 128, 64 * gate.KIB) == 1
    assert gate.occupancy("sm_120", 8, 64, 0) == 4  # 32 of 48 warps: 4 partitions of 8
    assert gate.occupancy("sm_89", 4, 16, 0) == 12
    assert gate.occupancy("sm_86", 8, 64, 100 * gate.KIB) == 0
    assert gate.occupancy("sm_100", 4, 64, 0, 200) == 2  # 256 columns are given out


def test_the_page_has_every_kernel() -> None:
    text = (ROOT / "docs" / "generated" / "gpu_static.md").read_text()
    assert "no fault" in text
    for keys in selection().values():
        for key in keys:
            assert f"| {key.name} |" in text, key.name


def test_the_selection_has_every_kernel_and_tile() -> None:
    """And whatever else a kernel of the tested calls is compiled with, on some target."""
    chosen = selection()

    def tiles(keys: Iterable[Compilation]) -> set[tuple]:
        found = ((key, dict(key.constants)) for key in keys)
        return {(k.name, *map(c.get, SIZES), k.warps, k.stages) for k, c in found}

    def values(keys: Iterable[Compilation]) -> set[tuple]:
        return {(k.name, c) for k in keys for c in k.constants if isinstance(c[0], str)}

    every = {arch: compilations(arch, tested=True) for arch in chosen}
    assert {*chosen} == {*NVIDIA, *AMD}
    assert all(tiles(chosen[arch]) == tiles(every[arch]) for arch in every)
    assert values(chain(*chosen.values())) == values(chain(*every.values()))
    assert sum(map(len, chosen.values())) < 0.6 * sum(map(len, every.values()))


# ---- planted faults ------------------------------------------------------------------------------

ROWS = dict(a="*bf16", b="*bf16", out="*fp32", stride="i32", d="i32")
WIDE_ROWS = ROWS | dict(a="*fp32", b="*fp32")
THREE = dict(a="*bf16", b="*bf16", c="*bf16", out="*fp32", d="i32")
VECTORS = dict(a="*fp32", out="*fp32")


def tile(rows: int, columns: int, depth: int, mask: bool = False) -> dict[str, Any]:
    return dict(BM=rows, BN=columns, BK=depth, PRECISION="ieee", MASK=mask)


# target, kernel, types, constants, warps, stages, whether 16 divides the strides, what is said
PLANTED = {
    "sound": ("sm_90", "product", ROWS, tile(64, 64, 64), 4, 3, True, ()),
    "sound and masked": ("sm_80", "product", ROWS, tile(64, 64, 64, True), 4, 3, True, ()),
    "too many stages": ("sm_90", "product", ROWS, tile(128, 128, 64), 8, 9, True, ("shared",)),
    "fits sm_80": ("sm_80", "product", ROWS, tile(128, 128, 64), 8, 5, True, ()),
    "too many for sm_86": ("sm_86", "product", ROWS, tile(128, 128, 64), 8, 5, True, ("shared",)),
    "scalar loads": ("sm_90", "product", ROWS, tile(64, 64, 64), 4, 3, False, ("loads of 2",)),
    "scalar masked loads": (
        *("sm_80", "product", ROWS, tile(64, 64, 64, True), 4, 3, False),
        ("loads of 2",),
    ),
    "no tensor cores": (
        *("sm_80", "product", WIDE_ROWS, tile(32, 32, 32), 4, 3, True),
        ("without tensor cores",),
    ),
    "spills": ("sm_80", "wide", VECTORS, dict(BM=64, BN=128), 1, 1, True, ("spills",)),
    "tensor memory": (
        *("sm_100", "accumulators", THREE, dict(BM=128, BN=256, BK=32), 8, 2, True),
        ("trap stub", "tensor memory", "without tensor cores"),
    ),
    "atomic sum": ("sm_90", "added", VECTORS, dict(BN=128), 4, 1, True, ("atomics",)),
    "atomic sum on AMD": ("gfx942", "added", VECTORS, dict(BN=128), 4, 1, True, ("atomics",)),
    "lock": ("sm_80", "locked", VECTORS | dict(lock="*i32"), dict(BN=128), 4, 1, True, ("CAS",)),
    "does not compile": ("sm_80", "product", ROWS, tile(48, 64, 64), 4, 3, True, ("compile",)),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault(name: str) -> None:
    arch, kernel, types, constants, warps, stages, whole, said = PLANTED[name]
    signature = (*types.items(), *((constant, "constexpr") for constant in constants))
    divided = [(i,) for i, kind in enumerate(types.values()) if whole or kind.startswith("*")]
    key = Compilation(
        f"gpu_static_faults.{kernel}",
        signature,
        tuple(constants.items()),
        tuple(divided),
        warps,
        stages,
    )
    (figures,) = machine_code.figures(arch, [key])
    found = gate.faults(figures)
    assert bool(found) == bool(said), found
    for words in said:
        assert any(words in fault for fault in found), (words, found)


CUDA_FAULTS = """
extern "C" __global__ void __launch_bounds__(128) sound(const float4* x, float4* y, int* count) {
  const float4 v = x[threadIdx.x];
  y[threadIdx.x] = v;
  atomicAdd(count, v.x > 0);
}
extern "C" __global__ void __launch_bounds__(128) scalar(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(128) added(const float4* x, float* y) {
  atomicAdd(y, x[threadIdx.x].x + x[threadIdx.x].y + x[threadIdx.x].z + x[threadIdx.x].w);
}
extern "C" __global__ void __launch_bounds__(128) indexed(const float4* x, float4* y, int n) {
  float4 kept[16];
  for (int i = 0; i < 16; ++i) kept[(i * n) & 15] = x[i * 128 + threadIdx.x];
  for (int i = 0; i < 16; ++i) y[i * 128 + threadIdx.x] = kept[i];
}
extern "C" __global__ void __launch_bounds__(128) taken(const float4* x, float4* y, int* lock) {
  while (atomicCAS(lock, 0, 1)) {}
  y[0].x += x[threadIdx.x].x * x[threadIdx.x].y + x[threadIdx.x].z * x[threadIdx.x].w;
  atomicExch(lock, 0);
}
"""


@pytest.fixture(scope="module")
def planted_cuda(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Figures]]:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: no CUDA C++ is compiled here")
    folder = tmp_path_factory.mktemp("cuda")
    (folder / "faults.cu").write_text(CUDA_FAULTS)
    codes = ("sm_80", "compute_80")
    command = ["nvcc", "-fatbin", *(f"-gencode=arch=compute_80,code={code}" for code in codes)]
    out = folder / "faults.fatbin"
    subprocess.run([*command, str(folder / "faults.cu"), "-o", str(out)], check=True)
    yield {f.kernel: f for f in cuda_library.sweep(out, ("sm_80",))}


@pytest.mark.parametrize(
    "kernel, said",
    [
        ("sound", None),
        ("scalar", "no load wider than 32 bits"),
        ("added", "atomics or locks"),
        ("indexed", "spills or local memory"),
        ("taken", "CAS"),
    ],
)
def test_planted_cuda_fault(
    planted_cuda: dict[str, Figures], kernel: str, said: str | None
) -> None:
    figures = planted_cuda[kernel]
    assert figures.warps == 4
    found = gate.faults(figures)
    assert (found == []) if said is None else (len(found) == 1 and said in found[0]), found
