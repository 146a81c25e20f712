"""The top-k on the CUDA C++ kernels (csrc/cuda/topk/): products screen, double decides.

Columns go by in blocks: their lengths, a library product into a tile that stays in L2, and an
epilogue that moves whatever beats the worst of a row's list into it. The bank is read from DRAM
once; a score costs 8 bytes in L2, written and read, and what the product reads. Lists beyond MANY
go through stored keys. The candidates' scores, and those of every column where a bound cannot
certify a row, are computed in double from the rows as they are. The host never learns which rows:
nothing here waits for the device, but for rows or lists beyond SHARED_BYTES (`judge`).

Memory beyond the outputs: 8 bytes a candidate and a part, TILE_BYTES once or, with stored keys, a
few times, a block of the bank where it is widened, PARTIAL_BYTES; never N x M. No time was
measured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.gpu.library_products import product
from fused_losses.primitives.topk import bounds
from fused_losses.primitives.topk import certified as certified_topk
from fused_losses.primitives.topk.bounds import BF16, IEEE, on_tensor_cores
from fused_losses.primitives.topk.certified import Judge, Screen
from fused_losses.primitives.topk.inputs import MATCHES, TOPK_KINDS, TopkInputs

TILE_BYTES = 16 << 20  # of products: with a block of the bank, in the L2 of an A100 and later
HOST_TILE_BYTES = 1 << 20  # in the host execution: several tiles of few rows
TILE_ROWS = 2048
BANK_BYTES = 8 << 20  # of a block of the bank
STORED_COLUMNS = 8192  # of a tile whose keys are stored, at least
PARTIAL_BYTES = 32 << 20  # of the lists of all splits
# as in the kernels
FEW, MANY = 4, 256  # candidates of a row in registers, in shared memory
EMPTY = -0x7F800001 << 32  # the key -inf, at the column past all others
LANES, NEIGHBOURS, WARPS = 32, 4, 4
SHARED_BYTES = 96 << 10  # that every GPU has
LONGEST_PARTS = 1024
MOST_PARTS = 8  # of a row's list
SPLIT = 2048  # columns of a split of a row at least
ELEMENTS = {**cuda_launch.ELEMENTS, torch.float64: 4}


def select(p: TopkInputs) -> tuple[Tensor, Tensor]:
    """As `fused_losses.primitives.topk.op.select`; a screen's codes are not read: y itself is."""
    if 0 in (*p.x.shape[:1], *p.y.shape[:1], p.k):
        return certified_topk.nothing(p)
    with torch.no_grad():
        p = _dense(p)
        return certified_topk.judged(p, *screened(p), judge(p))


def workspace(p: TopkInputs) -> int:
    """Bytes beyond inputs and outputs, at most."""
    kept = p.k + max(16, p.k // 2)
    lists = max(PARTIAL_BYTES, 64 * p.x.shape[0] * kept)
    return certified_topk.certified_bytes(p) + lists + 3 * TILE_BYTES + 2 * BANK_BYTES


def _dense(p: TopkInputs) -> TopkInputs:
    """Rows whose elements are neighbours, and vectors of the types that the kernels read."""
    rows = [t if t.stride(1) == 1 else t.contiguous() for t in (p.x, p.y)]
    labels = (None, None) if p.match == "any" else (p.x_labels, p.y_labels)
    integers = [
        None if t is None else t.int().contiguous() for t in (*labels, p.x_ids, p.y_ids, p.exclude)
    ]
    scale = None if p.y_scale is None else p.y_scale.float().contiguous()
    return p._replace(
        x=rows[0],
        y=rows[1],
        y_scale=scale,
        x_labels=integers[0],
        y_labels=integers[1],
        x_ids=integers[2],
        y_ids=integers[3],
        exclude=integers[4],
    )


def _pairs(p: TopkInputs) -> dict[str, Tensor | int | bool | None]:
    """What leaves a pair out, as the kernels' arguments."""
    excluded = 0 if p.exclude is None else p.exclude.shape[1]
    return dict(
        x_labels=p.x_labels,
        y_labels=p.y_labels,
        x_ids=p.x_ids,
        y_ids=p.y_ids,
        exclude=p.exclude if excluded else None,
        excluded=excluded,
        match=MATCHES.index(p.match),
        skip_self=p.skip_self,
    )


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


# ---- the screen ---------------------------------------------------------------------------------


def screened(p: TopkInputs) -> tuple[Screen, Tensor, Tensor]:
    """Candidates: keys [N, keep] float32 descending, and columns [N, keep] int32."""
    (n, d), m = p.x.shape, p.y.shape[0]
    # 16-bit rows are multiplied as they are, exactly; others in float32, near the origin
    exact = p.x.dtype.itemsize == 2 and p.y.dtype in (p.x.dtype, torch.int8)
    rounded = torch.bfloat16 if p.screen == "bf16" and not exact else None
    low = p.x.dtype if exact else torch.float32
    center = None if exact else certified_topk.center_of(p)
    wide_center = None if center is None else center.double()
    x = certified_topk.turned(p, certified_topk.moved(p.x, center, low))
    keep = min(m, FEW) if p.k == 1 and rounded is None else certified_topk.kept(p)
    options: dict[str, Any] = dict(dtype=torch.float32, device=p.x.device)
    longest = torch.zeros(LONGEST_PARTS, dtype=torch.float64, device=p.x.device)
    tall = min(n, TILE_ROWS)
    most = HOST_TILE_BYTES if cuda_launch.on_host() else TILE_BYTES
    wide = most // (4 * tall)
    if keep > MANY:
        # beside a tile lie its keys, and each is sorted with the list that there is
        wide = max(keep, STORED_COLUMNS)
        tall = max(1, min(n, most // (8 * wide)))
    else:
        wide = min(wide, BANK_BYTES // (max(d, 1) * low.itemsize))
    wide = min(max(wide, 2 * LANES * NEIGHBOURS), m)
    wide = ceil_div(wide, NEIGHBOURS) * NEIGHBOURS
    tile = torch.empty((tall, wide), **options)
    multiplier = None
    if p.kind == "cosine" or p.y_scale is not None:
        multiplier = torch.empty(wide, **options)
    offset = torch.empty(wide, **options) if p.kind == "sqeuclidean" else None
    lists = _Lists(p, keep, tile, multiplier, offset)
    multiplied = x.to(rounded or low)
    for first in range(0, m, wide):
        block = slice(first, min(first + wide, m))
        _bank(p.y[block], p, block, wide_center, multiplier, offset, longest)
        y = certified_topk.moved(p.y[block], center, low).to(multiplied.dtype)
        for top in range(0, n, tall):
            rows = slice(top, min(top + tall, n))
            out = tile[: rows.stop - top, : block.stop - first]
            product(multiplied[rows], y.T, "fp32", out=out)
            lists.add(rows, block)
    squares = torch.empty(n, dtype=torch.float64, device=p.x.device)
    _squares(p.x, wide_center, squares)
    products = BF16 if rounded else IEEE
    if low != torch.float32 or rounded:
        products = products if cuda_launch.on_host() else on_tensor_cores(products)
    error = bounds.of_scores(p, squares.sqrt(), longest.max(), torch.float32, products)
    screen = Screen(x, center, multiplier, offset, squares, error, keep)
    return screen, *certified_topk.unpacked(lists.sorted())


def _bank(
    y: Tensor,
    p: TopkInputs,
    block: slice,
    center: Tensor | None,
    multiplier: Tensor | None,
    offset: Tensor | None,
    longest: Tensor,
) -> None:
    """Lengths of a block of the bank, which brings it into L2."""
    cuda_launch.launch(
        "topk_bank",
        y=y,
        center=center,
        scale=None if p.y_scale is None else p.y_scale[block],
        multiplier=multiplier,
        offset=offset,
        longest=longest,
        squares=None,
        stride=y.stride(0),
        rows=y.shape[0],
        d=y.shape[1],
        parts=len(longest),
        type=ELEMENTS[y.dtype],
        group=0,
        kind=TOPK_KINDS.index(p.kind),
        largest=p.largest,
    )


def lengths(p: TopkInputs, center: Tensor | None, multiplier: Tensor, offset: Tensor) -> Tensor:
    """|y_j - center| of a whole bank by one launch: the longest, and what the screen makes of them.

    multiplier and offset [M] float32, 1 and 0, are written where the kind of scores asks for them.
    """
    p = _dense(p)
    longest = torch.zeros(LONGEST_PARTS, dtype=torch.float64, device=p.x.device)
    wanted = multiplier if p.kind == "cosine" or p.y_scale is not None else None
    moves = offset if p.kind == "sqeuclidean" else None
    at = None if center is None else center.double()
    _bank(p.y, p, slice(0, p.y.shape[0]), at, wanted, moves, longest)
    return longest.max()


def squared_lengths(x: Tensor, center: Tensor | None, to: Tensor) -> None:
    """to = |x_i - center|^2 in double."""
    _squares(x, None if center is None else center.double(), to)


def _squares(x: Tensor, center: Tensor | None, to: Tensor) -> None:
    """to = |x_i - center|^2 in double."""
    cuda_launch.launch(
        "topk_bank",
        y=x,
        center=center,
        scale=None,
        multiplier=None,
        offset=None,
        longest=None,
        squares=to,
        stride=x.stride(0),
        rows=x.shape[0],
        d=x.shape[1],
        parts=16 * LONGEST_PARTS,
        type=ELEMENTS[x.dtype],
        group=0,
        kind=0,
        largest=True,
    )


class _Lists:
    """The best of each row so far, packed, in the order of their keys."""

    def __init__(
        self,
        p: TopkInputs,
        keep: int,
        tile: Tensor,
        multiplier: Tensor | None,
        offset: Tensor | None,
    ) -> None:
        n, (tall, wide) = p.x.shape[0], tile.shape
        self.keep, self.tile = keep, tile
        self.arguments = dict(
            product=tile, multiplier=multiplier, offset=offset, stride=wide, **_pairs(p)
        )
        self.keys = None
        if keep > MANY:
            self.keys = torch.empty(tile.shape, dtype=torch.int64, device=tile.device)
        # parts of a row's columns, a warp each, where there are too few rows to fill the GPU
        enough = 4 * WARPS * gpu_device.processors(tile.device) // tall
        self.parts = max(1, min(enough, wide // (2 * LANES * NEIGHBOURS), MOST_PARTS))
        if self.keys is not None:
            self.parts = 1
        span = ceil_div(wide, self.parts)
        self.span = ceil_div(span, NEIGHBOURS) * NEIGHBOURS
        self.best = torch.full((n, self.parts, keep), EMPTY, dtype=torch.int64, device=tile.device)

    def add(self, rows: slice, block: slice) -> None:
        """The tile is of these rows and columns."""
        height, width = rows.stop - rows.start, block.stop - block.start
        cuda_launch.launch(
            "topk_screen",
            best=self.best,
            keys=self.keys,
            rows=height,
            columns=width,
            first_row=rows.start,
            first=block.start,
            span=self.span,
            parts=self.parts,
            keep=self.keep,
            slots=max(_power_of_two(self.keep), LANES),
            **self.arguments,
        )
        if self.keys is not None:
            every = torch.cat([self.best[rows, 0], self.keys[:height, :width]], 1)
            self.best[rows, 0] = every.topk(self.keep, dim=1)[0]

    def sorted(self) -> Tensor:
        if self.parts == 1:
            return self.best[:, 0]
        return self.best.flatten(1).topk(self.keep, dim=1)[0]


# ---- the judge ----------------------------------------------------------------------------------


def judge(p: TopkInputs) -> Judge:
    """The kernels, or torch for lists and rows that shared memory does not hold."""
    lists = 16 * (2 * _power_of_two(p.k) + WARPS * LANES)
    places = 8 * (ceil_div(p.x.shape[1], 512) + 1) * 512
    return IN_KERNELS if lists + places <= SHARED_BYTES else certified_topk.IN_TORCH


def _listed(p: TopkInputs, index: Tensor) -> tuple[Tensor, Tensor]:
    keys = torch.empty((p.x.shape[0], p.k), dtype=torch.float64, device=p.x.device)
    found = torch.empty_like(keys, dtype=torch.int64)
    _exact(p, keys, found, listed=index.int().contiguous())
    return keys, found


def _unsure_rows(p: TopkInputs, unsure: Tensor, keys: Tensor, found: Tensor) -> None:
    # the device alone knows how many there are
    rows = unsure.to(torch.uint8).argsort(descending=True, stable=True)
    _exact(p, keys, found, rows=rows, count=unsure.sum())


IN_KERNELS = Judge(_listed, _unsure_rows)


def _exact(
    p: TopkInputs,
    keys: Tensor,  # [N, k] float64
    found: Tensor,  # [N, k] int64
    listed: Tensor | None = None,  # [N, keep] int32 columns, -1: none; None: every column
    rows: Tensor | None = None,  # [N] int64, of which `count` [] are done; None: every row
    count: Tensor | None = None,
) -> None:
    """The k best of these columns by their scores in double."""
    p = _dense(p)
    (n, d), m = p.x.shape, p.y.shape[0]
    columns = m if listed is None else listed.shape[1]
    parts, splits = None, 1
    if listed is None:
        # one row alone should fill the GPU
        fitting = PARTIAL_BYTES // (16 * n * p.k)
        splits = max(1, min(fitting, ceil_div(m, SPLIT), 8 * gpu_device.processors(p.x.device)))
        if splits > 1:
            parts = torch.empty((n, splits, p.k, 2), dtype=torch.int64, device=p.x.device)
    squares = None
    if p.kind == "cosine":
        squares = torch.empty(n, dtype=torch.float64, device=p.x.device)
        _squares(p.x, None, squares)
    cuda_launch.launch(
        "topk_exact",
        x=p.x,
        y=p.y,
        y_scale=p.y_scale,
        x_square=squares,
        listed=listed,
        rows=rows,
        count=count,
        parts=parts,
        keys=keys,
        index=found,
        stride_x=p.x.stride(0),
        stride_y=p.y.stride(0),
        n=n,
        d=d,
        columns=columns,
        span=ceil_div(columns, splits),
        splits=splits,
        k=p.k,
        slots=_power_of_two(p.k),
        width=min(_power_of_two(columns), WARPS * LANES),
        group=0,  # as is the next, set where the types are known
        places=0,
        x_type=ELEMENTS[p.x.dtype],
        y_type=ELEMENTS[p.y.dtype],
        kind=TOPK_KINDS.index(p.kind),
        largest=p.largest,
        **_pairs(p),
    )
