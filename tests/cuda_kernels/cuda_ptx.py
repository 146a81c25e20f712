"""Executes the PTX of the CUDA kernels, as nvcc makes it, in the emulator beside the project.

`executing` turns every launch of backend "cuda" on CPU tensors into one of the PTX kernel of the
same name, on the memory of the same tensors. Out-of-bounds and misaligned accesses, stores to what
is only read, shared and global races, and divergent barriers are faults.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import ROOT, SHARED

from fused_losses.backends.cuda import launch as cuda_launch

CSRC = ROOT / "csrc"
HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int64,
    ctypes.c_int,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def require() -> None:
    """Skips the module, saying why, where PTX cannot be made or executed."""
    if not (SHARED / "ptxsim").is_dir():
        pytest.skip("ptxsim is absent: the PTX is not executed here", allow_module_level=True)
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: there is no PTX of the CUDA kernels", allow_module_level=True)


@dataclass
class Module:
    """The PTX of one source; parsed when first used."""

    text: str

    @cached_property
    def entries(self) -> list[str]:
        return re.findall(r"\.entry\s+(\w+)\s*\(", self.text)

    @cached_property
    def parsed(self) -> Any:
        import ptxsim

        return ptxsim.load(self.text)


@cache
def modules(sources: tuple[Path, ...], arch: str, folder: Path) -> tuple[Module, ...]:
    def compiled(source: Path) -> Module:
        out = folder / f"{source.parent.name}-{source.stem}.{arch}.ptx"
        flags = ["-std=c++20", "-O3", "-lineinfo", f"-I{CSRC}", f"-I{CSRC / 'cuda'}"]
        flags.append(f'-DFUSED_LOSSES_ARCHITECTURES="{arch}"')
        target = f"-arch={arch.replace('sm', 'compute')}"
        subprocess.run(["nvcc", *flags, target, "-ptx", str(source), "-o", str(out)], check=True)
        return Module(out.read_text())

    with ThreadPoolExecutor(2) as pool:
        return tuple(pool.map(compiled, sources))


@dataclass
class Region:
    """Memory of one tensor or of several that overlap, and its place in the emulator."""

    begin: int
    bytes: int
    readonly: bool
    at: int = 0

    def numpy(self) -> np.ndarray:
        return np.frombuffer((ctypes.c_uint8 * self.bytes).from_address(self.begin), np.uint8)


def regions(tensors: list[torch.Tensor], readonly: list[bool]) -> list[Region]:
    found: list[Region] = []
    spans = zip(tensors, readonly, strict=True)
    spans = [Region(t.data_ptr(), cuda_launch.extent(t), r) for t, r in spans if t.numel()]
    for s in sorted(spans, key=lambda s: s.begin):
        last = found[-1] if found else None
        if last is not None and s.begin < last.begin + last.bytes:
            last.bytes = max(last.bytes, s.begin + s.bytes - last.begin)
            last.readonly &= s.readonly
        else:
            found.append(s)
    return found


@dataclass
class Executed:
    """What ran: for each kernel the instructions that some launch executed."""

    modules: tuple[Module, ...]
    instructions: dict[str, np.ndarray] = field(default_factory=dict)
    opcodes: dict[str, set[str]] = field(default_factory=dict)
    memory: list[Region] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def announce(self, tensors: list[torch.Tensor], readonly: list[bool]) -> None:
        self.memory = regions(tensors, readonly)

    def hook(
        self, kernel: bytes, blocks: int, threads: int, shared: int, arguments: int, size: int
    ) -> int:
        try:
            struct = ctypes.string_at(arguments, size)
            self.launch(kernel.decode(), blocks, threads, shared, struct)
        except BaseException as error:  # it may not pass through C++
            self.errors.append(error)
            return 1
        return 0

    def launch(self, kernel: str, blocks: int, threads: int, shared: int, struct: bytes) -> None:
        import ptxsim
        from ptxsim import core

        module = next((m for m in self.modules if kernel in m.entries), None)
        assert module is not None, f"no PTX of {kernel}"
        arena, memory = core.Arena(), self.memory
        for m in memory:
            # as aligned as it is here
            m.at = arena.reserve(m.bytes, 256, m.begin % 64, m.readonly, f"tensor of {m.bytes}")
        words = np.frombuffer(struct[: len(struct) // 8 * 8], np.uint64).copy()
        for m in memory:
            inside = (words >= m.begin) & (words <= m.begin + m.bytes)
            words[inside] += np.uint64((core.GBASE + m.at - m.begin) % 2**64)
        patched = words.tobytes() + struct[len(words) * 8 :]

        class Machine(core.Machine):
            def _memory(self, args: list, shared_bytes: int) -> None:
                before, core.Arena = core.Arena, lambda: arena
                try:
                    super()._memory(args, shared_bytes)
                finally:
                    core.Arena = before
                for m in memory:
                    data = m.numpy()
                    arena.mem[m.at : m.at + m.bytes] = data
                    self.bufs.append((m.at, data, core.Buf(data, m.readonly)))

        parsed = module.parsed
        function = parsed.funcs[kernel]
        if not function.code:
            ptxsim._p.link(parsed, function)
        options = dict(ptxsim.OPTIONS) | self.options
        report = Machine(parsed, function, blocks, threads, [patched], shared, options).run()
        assert not report.warnings, report.warnings
        executed = self.instructions.get(kernel, np.zeros_like(report.executed))
        self.instructions[kernel] = executed | report.executed
        self.opcodes.setdefault(kernel, set()).update(report.opcodes())

    def coverage(self) -> dict[str, float]:
        """The part of each kernel that ran; 0 for one that never did."""
        out = {name: 0.0 for m in self.modules for name in m.entries}
        return out | {name: float(ran.mean()) for name, ran in self.instructions.items()}


@contextmanager
def executing(
    sources: tuple[Path, ...], arch: str, folder: Path, **options: Any
) -> Iterator[Executed]:
    """Launches execute the sources' PTX; a fault of the emulator is raised as it is."""
    found = Executed(modules(sources, arch, folder), options=options)
    library, announce, path = cuda_launch.library(), cuda_launch.announce, list(sys.path)
    hook = HOOK(found.hook)
    sys.path.insert(0, str(SHARED))
    cuda_launch.announce = found.announce
    library.fused_losses_hook(hook)
    try:
        yield found
    except RuntimeError as error:
        if found.errors:
            raise found.errors[0] from error
        raise
    finally:
        library.fused_losses_hook(None)
        cuda_launch.announce = announce
        sys.path[:] = path
