"""Triton kernels of the sweep over pairs (`op`), one tile of the matrix a program.

Each kernel makes the products and scores of its tile (`scores`), then the terms of one class after
the other (`term`), and ends in its own way: partial statistics, a tile of G, or a tile of attention
weights. No atomics, no locks, a fixed order of sums. Vectors of rows and columns are loaded after
the products: before them they cost registers across the whole loop. Offsets of rows are 64-bit; an
input that is None costs nothing.
"""

import triton
import triton.language as tl

from fused_losses.primitives.pairs.gpu import Block
from fused_losses.primitives.pairs.triton_terms import (
    BEST,
    COUNT,
    NEGATIVE,
    POSITIVE,
    TOTAL,
    VALUE,
    VARYING,
    below,
    inside,
    scores,
    softplus,
    spread,
    term,
)

# ---- scores, classes and terms ------------------------------------------------------------------
# A tile holds one number a pair across the passes of a kernel: s, -inf where the pair is left out.
# Masks kept beside it take as many registers again, and spilled on every chip.


# ---- statistics ---------------------------------------------------------------------------------


@triton.jit
def side_partials(
    part,  # [4, tiles, local]: first entry of this tile and class
    step,  # between the statistics
    s,
    z,
    window,
    index,  # of this side's rows or columns
    end,
    total,
    KIND: tl.constexpr,
    REDUCTION: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Partial statistics of one class for one side."""
    real = index < end
    z = inside(z, s, window, index, end, total, KIND, AXIS)
    high = tl.max(z, AXIS)
    tl.store(part + BEST * step, high, mask=real)
    if REDUCTION == "lse":
        # where there is no pair: subtract 0 from its scores instead
        f = tl.exp(z - spread(tl.where(high == float("-inf"), 0.0, high), AXIS))
    elif REDUCTION == "softplus":
        f = softplus(z)
    else:
        f = tl.where(z < 0.0, 0.0, z)
    tl.store(part + VALUE * step, tl.sum(f, AXIS), mask=real)
    member = z != float("-inf")
    tl.store(part + TOTAL * step, tl.sum(tl.where(member, z, 0.0), AXIS), mask=real)
    tl.store(part + COUNT * step, tl.sum(tl.where(member, 1.0, 0.0), AXIS), mask=real)


@triton.jit(do_not_specialize=VARYING)
def statistics_tiles(
    x,  # `Side` of the rows
    y,  # `Side` of the columns
    scale,  # [1] float32
    exclude,  # [N, excluded] int32, or None
    squares,  # [block rows, stride_squares] |x - y|^2, to score instead of products; or None
    stride_squares,
    row_part,  # [4, classes, column tiles, block rows]
    column_part,  # [4, classes, row tiles, block columns], or None
    positive,  # `Rule`
    negative,  # `Rule`
    excluded,
    total_rows,
    total_columns,
    first_row,
    row_end,
    first_column,
    column_end,
    d,
    row_tiles,
    REACH: tl.constexpr,
    ROOT: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    TRIANGLE: tl.constexpr,
    REDUCTION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """Partial statistics of one tile of a block, for its rows and its columns."""
    # the row tile runs fastest, so that all row tiles of a column tile find it in L2
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    block = Block(first_row, row_end, first_column, column_end)
    if TRIANGLE:
        if below(first_row, first_column, row_tile, tile, BM, BN):
            return
    rows = first_row + row_tile * BM + tl.arange(0, BM)
    columns = first_column + tile * BN + tl.arange(0, BN)
    s = scores(
        x,
        y,
        scale,
        exclude,
        squares,
        stride_squares,
        excluded,
        rows,
        columns,
        row_tile,
        tile,
        block,
        d,
        ROOT,
        SKIP_SELF,
        TRIANGLE,
        BK,
        EVEN,
        BF16,
        DOT,
    )
    # without labels there are only negatives
    FIRST: tl.constexpr = NEGATIVE if x.labels is None else POSITIVE
    height = row_end - first_row
    width = column_end - first_column
    tiles = tl.cdiv(width, BN)
    for KIND in tl.static_range(FIRST, 2):
        rule = positive if KIND == POSITIVE else negative
        z, _ = term(s, x, y, rows, columns, block, rule, KIND, REACH)
        side_partials(
            row_part + ((KIND - FIRST) * tiles + tile) * height + rows - first_row,
            (2 - FIRST) * tiles * height,
            s,
            z,
            x.window,
            rows,
            row_end,
            total_rows,
            KIND,
            REDUCTION,
            1,
        )
        if column_part is not None:
            side_partials(
                column_part
                + ((KIND - FIRST) * row_tiles + row_tile) * width
                + columns
                - first_column,
                (2 - FIRST) * row_tiles * width,
                s,
                z,
                y.window,
                columns,
                column_end,
                total_columns,
                KIND,
                REDUCTION,
                0,
            )


@triton.jit(do_not_specialize=["total", "first", "length", "other_first", "groups", "blocks"])
def merge_tiles(
    part,  # [4, classes, groups, length]
    state,  # [4, 2, total] float64: VALUE is sum exp(z - best) for lse
    total,
    first,
    length,
    other_first,
    groups,
    blocks,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,  # the owners are the columns of the tiles
    TRIANGLE: tl.constexpr,
    LSE: tl.constexpr,
    OWN: tl.constexpr,  # owners in a tile
    OTHER: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    """Adds a block's partials to the statistics, in ascending order, in float64."""
    local = ((tl.program_id(0) % blocks) * BM + tl.arange(0, BM)).to(tl.int64)
    kind = tl.program_id(0) // blocks
    real = local < length
    # without labels the one class is that of the negatives
    to = state + (kind + 2 - CLASSES) * total + first + local
    step = 2 * total
    mass = tl.load(to + VALUE * step, mask=real, other=0.0)
    moment = tl.load(to + TOTAL * step, mask=real, other=0.0)
    count = tl.load(to + COUNT * step, mask=real, other=0.0)
    high = tl.load(to + BEST * step, mask=real, other=float("-inf"))
    part_step = CLASSES * groups * length
    for start in range(0, groups, BT):
        group = (start + tl.arange(0, BT)).to(tl.int64)
        there = (group < groups)[:, None] & real[None, :]
        if TRIANGLE:
            # tiles below the diagonal were not computed
            if COLUMNS:
                there &= (
                    below(other_first, first, group[:, None], local[None, :] // OWN, OTHER, OWN)
                    == 0
                )
            else:
                there &= (
                    below(first, other_first, local[None, :] // OWN, group[:, None], OWN, OTHER)
                    == 0
                )
        at = part + (kind * groups + group)[:, None] * length + local[None, :]
        part_mass = tl.load(at + VALUE * part_step, mask=there, other=0.0).to(tl.float64)
        part_high = tl.load(at + BEST * part_step, mask=there, other=float("-inf"))
        part_high = part_high.to(tl.float64)
        new_high = tl.maximum(high, tl.max(part_high, 0))
        if LSE:
            shift = tl.where(new_high == float("-inf"), 0.0, new_high)
            mass *= tl.exp(high - shift)
            part_mass *= tl.exp(part_high - shift[None, :])
        mass += tl.sum(part_mass, 0)
        high = new_high
        part_moment = tl.load(at + TOTAL * part_step, mask=there, other=0.0)
        moment += tl.sum(part_moment.to(tl.float64), 0)
        part_count = tl.load(at + COUNT * part_step, mask=there, other=0.0)
        count += tl.sum(part_count.to(tl.float64), 0)
    tl.store(to + VALUE * step, mass, mask=real)
    tl.store(to + TOTAL * step, moment, mask=real)
    tl.store(to + COUNT * step, count, mask=real)
    tl.store(to + BEST * step, high, mask=real)
