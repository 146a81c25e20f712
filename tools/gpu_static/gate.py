"""What a kernel may take of a GPU: the limits of each target, occupancy, and the gate's rules."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tools.gpu_static.machine_code import UNORDERED, Figures

KIB = 1024


@dataclass(frozen=True)
class Limits:
    """A GPU's limits: bytes of shared memory a block and a multiprocessor, warps, blocks."""

    shared: int
    shared_all: int
    warps: int
    blocks: int
    tensor_memory: int = 0  # columns


LIMITS = {
    "sm_80": Limits(163 * KIB, 164 * KIB, 64, 32),
    "sm_86": Limits(99 * KIB, 100 * KIB, 48, 16),
    "sm_89": Limits(99 * KIB, 100 * KIB, 48, 24),
    "sm_90": Limits(227 * KIB, 228 * KIB, 64, 32),
    "sm_100": Limits(227 * KIB, 228 * KIB, 64, 32, 512),
    "sm_120": Limits(99 * KIB, 100 * KIB, 48, 24),
    # a compute unit: 64 KiB of LDS, four units of 8 wavefronts
    "gfx942": Limits(64 * KIB, 64 * KIB, 32, 16),
}
PARTITIONS = 4  # of a multiprocessor, each with its own registers
REGISTERS = 16384  # of a partition
RESERVED = KIB  # of shared memory, a block


def occupancy(arch: str, warps: int, registers: int, shared: int, tensor_memory: int = 0) -> int:
    """Blocks of one kernel that a multiprocessor holds at once; 0: the kernel does not launch."""
    limit = LIMITS[arch]
    if shared > limit.shared or tensor_memory > limit.tensor_memory:
        return 0
    if arch.startswith("gfx"):
        a_unit = min(8, 512 // max(8, -(-registers // 8) * 8))
        blocks = [limit.blocks, PARTITIONS * a_unit // warps]
        if shared:
            blocks.append(limit.shared_all // shared)
        return min(blocks)
    a_warp = max(256, -(-registers * 32 // 256) * 256)
    resident = min(limit.warps, PARTITIONS * (REGISTERS // a_warp))
    blocks = [limit.blocks, resident // warps, limit.shared_all // (shared + RESERVED)]
    if tensor_memory:
        # columns are given out in powers of two, 32 at least
        blocks.append(limit.tensor_memory // max(32, 1 << (tensor_memory - 1).bit_length()))
    return min(blocks)


STUB = 64  # instructions
# Masked loads of tiles that stay narrow though rows are aligned, by kernel, and why.
NARROW = {
    "forward_rows": "partials [tiles, N]: any N, so that no batch size compiles anew; N x C / BN",
    "merge_tiles": "partials, as forward_rows",
    "merge_classes": "partials, as forward_rows",
    "token_sums": "a query's tokens begin anywhere",
    "near_distances": "off the main path: the rare pairs that are near",
    "near_gradients": "as near_distances",
}


# CUDA kernels without a 16-byte load, by a pattern of their names, and why.
SCALAR = {
    r"finish_bias": "sums of tiles, a column a thread: neighbours are neighbours",
    r"(adamw|sgd)_rows<1>": "rows that are no whole packs; <4> and <8> read packs",
    r"(query|document)_gradients<\w+, false>": "as above; <..., true> reads packs",
    r"token_sums": "a query's tokens begin anywhere",
    r"merge_columns<\w+>": "as finish_bias",
    r"exclude_pairs": "a few columns a row, anywhere",
}


def faults(f: Figures, aligned: bool = True) -> list[str]:
    """What the gate objects to; `aligned`: rows of the call are whole vectors."""
    if f.failure:
        return [f"does not compile: {f.failure}"]
    limit, out = LIMITS[f.arch], []
    # kernels with tensor memory trap where none is left; a stub does nothing else
    if f.trap and f.instructions < STUB:
        out.append(f"a trap stub of {f.instructions} instructions instead of the kernel")
    if f.tensor_memory > limit.tensor_memory:
        out.append(f"tensor memory: {f.tensor_memory} of {limit.tensor_memory} columns")
    if f.shared > limit.shared:
        out.append(f"shared memory: {f.shared} of {limit.shared} bytes")
    if f.local:
        out.append(f"spills or local memory: {f.local}")
    if f.multiplies and not f.products:
        out.append("matrix products without tensor cores")
    # a CUDA kernel may count in integers, and any may do so in shared memory (which tensor memory
    # is allotted by); the Triton kernels do without global ones
    triton = f.language == "triton"
    unordered = sorted(
        name
        for name in f.atomics
        if UNORDERED.search(name) or (triton and not name.startswith("ATOMS"))
    )
    if unordered:
        out.append(f"atomics or locks: {', '.join(unordered)}")
    if not triton and f.loads and f.widest < 128 and not _scalar(f.kernel):
        out.append(f"no load wider than {f.widest} bits")
    for load in f.tile_loads:
        excused = load.masked and (not aligned or f.kernel in NARROW)
        if load.bytes < load.possible and not excused:
            out.append(f"loads of {load.bytes} bytes, not {load.possible}: {load.place}")
    return out


def _scalar(kernel: str) -> bool:
    return any(re.fullmatch(rf"(\w+::)*({pattern})", kernel) for pattern in SCALAR)
