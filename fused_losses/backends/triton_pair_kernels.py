"""Triton kernels of the sweep over pairs (`fused_losses.pairs`), one tile of the matrix a program.

Each kernel makes the products and scores of its tile (`scores`), then the terms of one class after
the other (`term`), and ends in its own way: partial statistics, a tile of G, or a tile of attention
weights. No atomics, no locks, a fixed order of sums. Vectors of rows and columns are loaded after
the products: before them they cost registers across the whole loop. Offsets of rows are 64-bit; an
input that is None costs nothing.
"""

import triton
import triton.language as tl

from fused_losses.backends.triton.tile_math import narrow, products, row_offsets

# classes and statistics, as in `pair_inputs`
POSITIVE = tl.constexpr(0)
NEGATIVE = tl.constexpr(1)
VALUE = tl.constexpr(0)
TOTAL = tl.constexpr(1)
COUNT = tl.constexpr(2)
BEST = tl.constexpr(3)
# of a class in the backward: base, mean, rest, share
VECTORS = tl.constexpr(4)

# what changes from tile to tile or from batch to batch and must not compile anew
VARYING = [
    "positive_factor",
    "positive_center",
    "positive_reach",
    "negative_factor",
    "negative_center",
    "negative_reach",
    "excluded",
    "total_rows",
    "total_columns",
    "first_row",
    "row_end",
    "first_column",
    "column_end",
    "row_tiles",
]


# ---- scores, classes and terms ------------------------------------------------------------------
# A tile holds one number a pair across the passes of a kernel: s, -inf where the pair is left out.
# Masks kept beside it take as many registers again, and spilled on every chip.


@triton.jit
def spread(vector, AXIS: tl.constexpr):
    """A vector of rows (AXIS 1) or of columns (AXIS 0) against the other dimension."""
    return tl.expand_dims(vector, AXIS)


@triton.jit
def equal(x_vector, y_vector, rows, columns, row_end, column_end):
    """Where the integers of row and column are equal. [BM, BN]"""
    # not volatile: that loads each column's integer by an address of its own, and spills
    left = tl.load(x_vector + rows, mask=rows < row_end, other=0)
    right = tl.load(y_vector + columns, mask=columns < column_end, other=0)
    return left[:, None] == right[None, :]


@triton.jit
def taking_part(
    x_ids,
    y_ids,
    x_groups,
    y_groups,
    rows,
    columns,
    row_end,
    column_end,
    SKIP_SELF: tl.constexpr,
    TRIANGLE: tl.constexpr,
):
    """Which pairs are not left out, windows apart. [BM, BN]"""
    pair = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    if TRIANGLE:
        pair &= rows[:, None] < columns[None, :]
    elif SKIP_SELF:
        pair &= rows[:, None] != columns[None, :]
    if x_ids is not None:
        pair &= equal(x_ids, y_ids, rows, columns, row_end, column_end) == 0
    if x_groups is not None:
        pair &= equal(x_groups, y_groups, rows, columns, row_end, column_end)
    return pair


@triton.jit
def scores(
    x,
    y,
    scale,
    x_bias,
    y_bias,
    x_ids,
    y_ids,
    x_groups,
    y_groups,
    exclude,
    stride_x,
    stride_y,
    excluded,
    rows,
    columns,
    row_end,
    column_end,
    d,
    ROOT: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    TRIANGLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """s = psi(u) of a tile, -inf where a pair is left out."""
    x_rows = row_offsets(rows, row_end, None, stride_x)
    y_rows = row_offsets(columns, column_end, None, stride_y)
    u = products(x, y, x_rows, y_rows, d, BM, BN, BK, EVEN, BF16, DOT)
    u *= tl.load(scale)
    if x_bias is not None:
        u += tl.load(x_bias + rows, mask=rows < row_end, other=0.0)[:, None]
    if y_bias is not None:
        u += tl.load(y_bias + columns, mask=columns < column_end, other=0.0)[None, :]
    if ROOT:
        # written so that a NaN stays one
        u = tl.where(u >= 0.0, 0.0, -tl.sqrt(-u))
    pair = taking_part(
        x_ids,
        y_ids,
        x_groups,
        y_groups,
        rows,
        columns,
        row_end,
        column_end,
        SKIP_SELF,
        TRIANGLE,
    )
    s = tl.where(pair, u, float("-inf"))
    if exclude is not None:
        listed = exclude + rows.to(tl.int64) * excluded
        for k in range(0, excluded):
            column = tl.load(listed + k, mask=rows < row_end, other=-1)
            s = tl.where(column[:, None] == columns[None, :], float("-inf"), s)
    return s


@triton.jit
def root_slope(s):
    """ds/du of s = -sqrt(-u), 0 where u >= 0."""
    return tl.where(s < 0.0, -0.5 / s, 0.0)


@triton.jit
def term(
    s,
    x_labels,
    y_labels,
    rows,
    columns,
    row_end,
    column_end,
    factor,
    center,
    reach,
    KIND: tl.constexpr,
    REACH: tl.constexpr,
):
    """z of one class, -inf for the other pairs, and dz/ds."""
    member = s != float("-inf")
    if x_labels is not None:
        same = equal(x_labels, y_labels, rows, columns, row_end, column_end)
        member &= same == (KIND == POSITIVE)
    slope = factor
    if REACH:
        weight = reach + tl.where(factor < 0.0, -s, s)
        # an infinite reach leaves the weight out; a NaN score stays one
        slope *= tl.where(reach == float("inf"), 1.0, tl.where(weight < 0.0, 0.0, weight))
        slope = tl.where(member, slope, 0.0)
    return tl.where(member, slope * (s - center), float("-inf")), slope


@triton.jit
def inside(z, s, window, index, end, total, KIND: tl.constexpr, AXIS: tl.constexpr):
    """z, -inf where the score lies outside the window of one side for one class."""
    if window is not None:
        low = tl.load(window + 2 * KIND * total + index, mask=index < end, other=0.0)
        high = tl.load(window + (2 * KIND + 1) * total + index, mask=index < end, other=0.0)
        # written so that a NaN score takes part
        z = tl.where(s <= spread(low, AXIS), float("-inf"), z)
        z = tl.where(s >= spread(high, AXIS), float("-inf"), z)
    return z


@triton.jit
def below(first_row, first_column, row_tile, tile, BM: tl.constexpr, BN: tl.constexpr):
    """Whether a tile has no pair above the diagonal."""
    return first_column + (tile + 1) * BN - 1 <= first_row + row_tile * BM


# ---- statistics ---------------------------------------------------------------------------------


@triton.jit
def softplus(z):
    """log(1 + exp z) to the last digits also where it is tiny."""
    t = tl.exp(-tl.abs(z))
    # log(1 + t) = 2 artanh(r); r <= 1/3: eight terms reach float32
    r = t / (2.0 + t)
    q = r * r
    series = 1.0 / 15.0
    for k in tl.static_range(7):
        series = series * q + 1.0 / (13.0 - 2.0 * k)
    return tl.where(z < 0.0, 0.0, z) + 2.0 * r * series


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
    x,  # [N, D]
    y,  # [M, D]
    scale,  # [1] float32
    x_bias,  # [N] or None; so are all that follow
    y_bias,  # [M]
    x_labels,  # [N] int32
    y_labels,  # [M]
    x_ids,  # [N] int32
    y_ids,  # [M]
    x_groups,  # [N] int32
    y_groups,  # [M]
    exclude,  # [N, excluded] int32
    x_window,  # [4, N]
    y_window,  # [4, M]
    row_part,  # [4, classes, column tiles, block rows]
    column_part,  # [4, classes, row tiles, block columns], or None
    positive_factor,
    positive_center,
    positive_reach,
    negative_factor,
    negative_center,
    negative_reach,
    stride_x,
    stride_y,
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
    if TRIANGLE:
        if below(first_row, first_column, row_tile, tile, BM, BN):
            return
    rows = first_row + row_tile * BM + tl.arange(0, BM)
    columns = first_column + tile * BN + tl.arange(0, BN)
    s = scores(
        x,
        y,
        scale,
        x_bias,
        y_bias,
        x_ids,
        y_ids,
        x_groups,
        y_groups,
        exclude,
        stride_x,
        stride_y,
        excluded,
        rows,
        columns,
        row_end,
        column_end,
        d,
        ROOT,
        SKIP_SELF,
        TRIANGLE,
        BM,
        BN,
        BK,
        EVEN,
        BF16,
        DOT,
    )
    # without labels there are only negatives
    FIRST: tl.constexpr = NEGATIVE if x_labels is None else POSITIVE
    tiles = tl.cdiv(column_end - first_column, BN)
    height = row_end - first_row
    width = column_end - first_column
    for KIND in tl.static_range(FIRST, 2):
        z, _ = term(
            s,
            x_labels,
            y_labels,
            rows,
            columns,
            row_end,
            column_end,
            positive_factor if KIND == POSITIVE else negative_factor,
            positive_center if KIND == POSITIVE else negative_center,
            positive_reach if KIND == POSITIVE else negative_reach,
            KIND,
            REACH,
        )
        side_partials(
            row_part + ((KIND - FIRST) * tiles + tile) * height + rows - first_row,
            (2 - FIRST) * tiles * height,
            s,
            z,
            x_window,
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
                y_window,
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


# ---- gradients ----------------------------------------------------------------------------------


@triton.jit
def side_share(
    vectors,
    s,
    z,
    window,
    index,
    end,
    total,
    KIND: tl.constexpr,
    REDUCTION: tl.constexpr,
    AXIS: tl.constexpr,
):
    """dL/dz through one class's value and total of one side, 0 where a pair does not count."""
    at = vectors + KIND * VECTORS * total + index
    real = index < end
    z = inside(z, s, window, index, end, total, KIND, AXIS)
    rest = spread(tl.load(at + 2 * total, mask=real, other=0.0), AXIS)
    share = spread(tl.load(at + 3 * total, mask=real, other=0.0), AXIS)
    if REDUCTION == "lse":
        base = spread(tl.load(at, mask=real, other=0.0), AXIS)
        mean = spread(tl.load(at + total, mask=real, other=0.0), AXIS)
        e = tl.exp(z - base)
        g = rest * e + share * (e - mean)
    elif REDUCTION == "softplus":
        g = rest * tl.sigmoid(z) + share
    else:
        g = tl.where(z > 0.0, rest, 0.0) + share
    return tl.where(z == float("-inf"), 0.0, g)


@triton.jit
def store_tile(ds, g, rows, columns, first_row, first_column, row_end, column_end, stride_ds):
    at = ds + (rows - first_row).to(tl.int64)[:, None] * stride_ds
    at += (columns - first_column)[None, :]
    real = (rows < row_end)[:, None] & (columns < column_end)[None, :]
    tl.store(at, narrow(g, ds.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=VARYING)
def gradient_tiles(
    x,  # as in `statistics_tiles`, up to y_window
    y,
    scale,
    x_bias,
    y_bias,
    x_labels,
    y_labels,
    x_ids,
    y_ids,
    x_groups,
    y_groups,
    exclude,
    x_window,
    y_window,
    row_vectors,  # [2, VECTORS, N]
    column_vectors,  # [2, VECTORS, M], or None: columns have no statistics
    ds,  # [block rows, stride_ds] G, rounded to the dtype of the products that follow
    positive_factor,
    positive_center,
    positive_reach,
    negative_factor,
    negative_center,
    negative_reach,
    stride_x,
    stride_y,
    stride_ds,
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
    """One tile of G = dL/du for the library products."""
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    rows = first_row + row_tile * BM + tl.arange(0, BM)
    columns = first_column + tile * BN + tl.arange(0, BN)
    if TRIANGLE:
        if below(first_row, first_column, row_tile, tile, BM, BN):
            zero = tl.zeros([BM, BN], tl.float32)
            store_tile(
                ds, zero, rows, columns, first_row, first_column, row_end, column_end, stride_ds
            )
            return
    s = scores(
        x,
        y,
        scale,
        x_bias,
        y_bias,
        x_ids,
        y_ids,
        x_groups,
        y_groups,
        exclude,
        stride_x,
        stride_y,
        excluded,
        rows,
        columns,
        row_end,
        column_end,
        d,
        ROOT,
        SKIP_SELF,
        TRIANGLE,
        BM,
        BN,
        BK,
        EVEN,
        BF16,
        DOT,
    )
    FIRST: tl.constexpr = NEGATIVE if x_labels is None else POSITIVE
    total = tl.zeros([BM, BN], tl.float32)
    for KIND in tl.static_range(FIRST, 2):
        z, slope = term(
            s,
            x_labels,
            y_labels,
            rows,
            columns,
            row_end,
            column_end,
            positive_factor if KIND == POSITIVE else negative_factor,
            positive_center if KIND == POSITIVE else negative_center,
            positive_reach if KIND == POSITIVE else negative_reach,
            KIND,
            REACH,
        )
        g = side_share(row_vectors, s, z, x_window, rows, row_end, total_rows, KIND, REDUCTION, 1)
        if column_vectors is not None:
            g += side_share(
                column_vectors,
                s,
                z,
                y_window,
                columns,
                column_end,
                total_columns,
                KIND,
                REDUCTION,
                0,
            )
        total += g * slope
    if ROOT:
        total *= root_slope(s)
    store_tile(ds, total, rows, columns, first_row, first_column, row_end, column_end, stride_ds)


@triton.jit(do_not_specialize=[*VARYING, "unit"])
def attention_tiles(
    x,  # as in `statistics_tiles`, up to y_window
    y,
    scale,
    x_bias,
    y_bias,
    x_labels,
    y_labels,
    x_ids,
    y_ids,
    x_groups,
    y_groups,
    exclude,
    x_window,
    y_window,  # None: the rows' softmax asks nothing of the columns
    base,  # [2, N] lse in float32, and exp(that - lse) for what the rounding lost
    weights,  # [block rows, stride_ds] unit softmax(z), rounded; or None
    grad_out,  # [N, Dv] of the dtype of values, or None: no gradient
    values,  # [M, Dv], or None
    shift,  # [N] grad_lse - <grad_out, out>, or None
    ds,  # [block rows, stride_ds] G, rounded; or None
    unit,
    positive_factor,
    positive_center,
    positive_reach,
    negative_factor,
    negative_center,
    negative_reach,
    stride_x,
    stride_y,
    stride_grad_out,
    stride_values,
    stride_ds,
    excluded,
    total_rows,
    total_columns,
    first_row,
    row_end,
    first_column,
    column_end,
    d,
    width,
    row_tiles,
    REACH: tl.constexpr,
    ROOT: tl.constexpr,
    SKIP_SELF: tl.constexpr,
    TRIANGLE: tl.constexpr,
    KIND: tl.constexpr,  # the class of the pairs that are attended to
    EVEN_WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    BF16: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of the attention's weights and of its G, for the library products."""
    row_tile = tl.program_id(0) % row_tiles
    tile = tl.program_id(0) // row_tiles
    rows = first_row + row_tile * BM + tl.arange(0, BM)
    columns = first_column + tile * BN + tl.arange(0, BN)
    s = scores(
        x,
        y,
        scale,
        x_bias,
        y_bias,
        x_ids,
        y_ids,
        x_groups,
        y_groups,
        exclude,
        stride_x,
        stride_y,
        excluded,
        rows,
        columns,
        row_end,
        column_end,
        d,
        ROOT,
        SKIP_SELF,
        TRIANGLE,
        BM,
        BN,
        BK,
        EVEN,
        BF16,
        DOT,
    )
    z, slope = term(
        s,
        x_labels,
        y_labels,
        rows,
        columns,
        row_end,
        column_end,
        positive_factor if KIND == POSITIVE else negative_factor,
        positive_center if KIND == POSITIVE else negative_center,
        positive_reach if KIND == POSITIVE else negative_reach,
        KIND,
        REACH,
    )
    z = inside(z, s, x_window, rows, row_end, total_rows, KIND, 1)
    real = rows < row_end
    lse = tl.load(base + rows, mask=real, other=0.0)
    rest = tl.load(base + total_rows + rows, mask=real, other=0.0)
    p = tl.exp(z - lse[:, None]) * rest[:, None]
    if weights is not None:
        store_tile(
            weights,
            p * unit,
            rows,
            columns,
            first_row,
            first_column,
            row_end,
            column_end,
            stride_ds,
        )
    if ds is not None:
        p *= slope
        if ROOT:
            p *= root_slope(s)
        from_rows = row_offsets(rows, row_end, None, stride_grad_out)
        from_columns = row_offsets(columns, column_end, None, stride_values)
        g = products(
            grad_out, values, from_rows, from_columns, width, BM, BN, BK, EVEN_WIDTH, BF16, DOT
        )
        g += tl.load(shift + rows, mask=real, other=0.0)[:, None]
        g *= p
        store_tile(ds, g, rows, columns, first_row, first_column, row_end, column_end, stride_ds)
