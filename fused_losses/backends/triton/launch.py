"""What the Triton launchers share: one call's inputs as kernels want them, and the one launch.

Every launch goes through `launch`, so that a test can compile or execute exactly what a GPU gets.
"""

from __future__ import annotations

import os
from typing import Any

from fused_losses.backends.gpu.tiles import Tile


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def launch(kernel: Any, programs: int, args: tuple, constants: dict[str, Any], tile: Tile) -> None:
    if interpreted():
        import triton.language as tl

        # the interpreter of Triton 3.6 cannot use its own integers as loop bounds under numpy 2.4
        args = tuple(tl.constexpr(a) if isinstance(a, int) else a for a in args)
    kernel[(programs,)](*args, **constants, num_warps=tile.warps, num_stages=tile.stages)
