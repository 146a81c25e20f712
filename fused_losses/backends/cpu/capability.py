"""The compiled C++ kernels (csrc/cpu), reached through the ops that the extension registers."""

from __future__ import annotations

import importlib
from functools import lru_cache
from types import ModuleType

import torch

_BUILD_HINT = "the C++ extension is not built: run `pip install .` with a C++20 compiler"


@lru_cache
def _load() -> ModuleType | ImportError:
    """The compiled module, or why it cannot be imported. Importing it registers its ops."""
    try:
        return importlib.import_module("fused_losses._C")
    except ImportError as error:
        return error


def extension() -> ModuleType | None:
    """The compiled module, or None where it was not built."""
    loaded = _load()
    return None if isinstance(loaded, ImportError) else loaded


def unavailable() -> str | None:
    loaded = _load()
    return f"{_BUILD_HINT} ({loaded})" if isinstance(loaded, ImportError) else None


def reasons_against(device: torch.device, dtype: torch.dtype, precision: str) -> list[str]:
    reasons = []
    if device.type != "cpu":
        reasons.append(f"tensors are on {device}, the cpu kernels need them on the CPU")
    if precision == "tf32":
        reasons.append("precision='tf32': a CPU has no tf32 products; use 'fp32' or 'bf16'")
    if precision in ("bf16", "mixed"):
        if dtype == torch.float64:
            reasons.append(f"precision={precision!r}: float64 inputs are multiplied in float64")
        elif not extension().has_bf16():
            reasons.append(
                f"precision={precision!r}: this CPU (capability {extension().capability()}) has "
                "no AVX512_BF16 products; use 'fp32'"
            )
    return reasons


# ---- the sweep over pairs, as csrc/cpu/pair_blocks.h and pair_gradients.h cut it -----------------

TILE_COLUMNS, BLOCK_COLUMNS, BLOCK_ROWS, DEPTH_CHUNK = 192, 1152, 1920, 512
TILE_BYTES = 384 << 10  # of X in a tile
QUERY_BYTES = 256 << 10  # of MaxSim's packed query tokens, a thread


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def pair_extra_bytes(
    n: int, m: int, d: int, dtype: torch.dtype, precision: str = "fp32", width: int = 0
) -> int:
    """Peak memory of forward and backward beyond inputs and the gradients of both sides.

    width: of the values, in an attention. The backward's plan, with everything asked for; the
    forward's is smaller.
    """
    size = 8 if dtype == torch.float64 else 4
    panel = 256 // size  # of the widest vectors
    score_pair = 2 if precision == "bf16" else 1  # elements in a word
    gradient_pair = 2 if precision in ("bf16", "mixed") else 1
    tile_rows = min(max(TILE_BYTES // (max(d, 1) * 4) // 12 * 12, 24), 192)
    tall = min(BLOCK_ROWS // tile_rows, -(-n // tile_rows)) * tile_rows
    wide = min(BLOCK_COLUMNS, _up(m, panel))
    words = -(-n // gradient_pair)
    turned = (-(-words // DEPTH_CHUNK) | 1) * DEPTH_CHUNK

    def operands(features: int) -> int:
        """Elements that a block's products read and write, for rows of so many features."""
        depth = -(-features // score_pair)
        left = n * depth if score_pair == 2 else 0
        right = wide * depth + -(-wide // gradient_pair) * _up(features, panel)
        return left + right + features * (turned + wide)

    elements = operands(d) + tall * wide + 8 * (n + m)
    elements += -(-wide // TILE_COLUMNS) * tall + -(-tall // tile_rows) * wide
    if width:
        elements += operands(width) + tall * wide + n * width + 2 * n
    elements += torch.get_num_threads() * (5 * tile_rows * TILE_COLUMNS + tile_rows + 320)
    # 16-bit inputs are widened, and their gradients come in float32
    widened = 8 * ((n + m) * d + (n + m) * width) if dtype.itemsize == 2 else 0
    return elements * size + widened


def maxsim_extra_bytes(
    query_tokens: int, document_tokens: int, d: int, dtype: torch.dtype, precision: str = "fp32"
) -> int:
    """The same of MaxSim, besides the index that its forward keeps."""
    narrowed = 2 * document_tokens * d if precision == "bf16" else 0
    widened = 8 * (query_tokens + document_tokens) * d if dtype.itemsize == 2 else 0
    return torch.get_num_threads() * max(QUERY_BYTES, 256 * d) + narrowed + widened


# ---- matrices of distances, as csrc/cpu/distance_*.h cut them ------------------------------------

PRODUCTS = ("dot", "sqeuclidean", "euclidean")
FACTORS = 2 * 68 * 256  # elements of a thread's tiles, of the gradient of a sum over coordinates


def distance_extra_bytes(
    n: int,
    m: int,
    d: int,
    dtype: torch.dtype,
    kind: str,
    precision: str = "fp32",
    gradient: bool = True,
) -> int:
    """Peak memory beyond inputs, result and their gradients; of the forward alone if so wanted."""
    threads, size = torch.get_num_threads(), 8 if dtype == torch.float64 else 4
    panel = 256 // size
    widened = (8 if gradient else 4) * (n + m) * d if dtype.itemsize == 2 else 0
    vectors = (n + _up(m, panel)) * size
    if kind not in PRODUCTS:
        forward = threads * 2 * d * panel * size
        backward = (FACTORS + d * panel) * threads * size + n * d * size * (kind == "canberra")
        return max(forward, backward if gradient else 0) + vectors + widened
    narrowed = 2 * n * d if precision == "bf16" else 0
    if not gradient:
        return threads * 2 * d * panel * size + vectors + narrowed + widened
    # near pairs of a block stand apart
    near = min(n, BLOCK_ROWS + 192) * min(m, BLOCK_COLUMNS) * size
    return pair_extra_bytes(n, m, d, dtype, precision) + near + vectors


# ---- the k best columns, as csrc/cpu/topk.h cuts them -------------------------------------------

CANDIDATE_BYTES, CANDIDATES_BYTES, MOST_QUERIES = 16, 16 << 20, 8192
BANK_BYTES = 256 << 10  # of the bank in a tile


def topk_extra_bytes(
    n: int, d: int, k: int, dtype: torch.dtype, triangle: bool, late: bool = False
) -> int:
    """Peak memory of `selection.select` beyond its inputs and what it returns.

    triangle: rows against themselves without i == j, of which half the pairs are taken. late:
    codes screen, and candidates wait to be scored.
    """
    panel = 64
    kept = max(2 * k, k + 64) if late else k
    padded = _up(max(n, 1), panel)
    queries = max(CANDIDATES_BYTES, 4 * n * d) // (kept * CANDIDATE_BYTES) // panel * panel
    triangle = triangle and padded <= queries
    queries = padded if triangle else min(max(queries, panel), min(padded, MOST_QUERIES))
    tile = min(max(BANK_BYTES // (max(d, 1) * 4), 24), 384)
    shared = queries * (4 * d + kept * CANDIDATE_BYTES + 25) + 4096
    shared += 20 * queries + 4 * n * d if triangle else 0
    each = 4 * queries + 4 * panel * d + 16 * (tile + kept + d + 256)
    rows = 0 if triangle else 4 * tile * d
    widened = 4 * n * d if dtype.itemsize == 2 else 0
    return shared + torch.get_num_threads() * (each + rows) + widened
