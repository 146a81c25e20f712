"""Closed forms of the Triton kernels, by the kernel that is launched.

Those over classes are in `class_forms` and `divergence_forms`.
"""

from __future__ import annotations

from fused_losses.backends.gpu.device import ceil_div
from fused_losses.backends.triton import triton_target
from fused_losses.bench.roofline import (
    class_forms,  # noqa: F401 (enters them)
    divergence_forms,  # noqa: F401 (enters them)
)
from fused_losses.bench.roofline.work import Launch, form, tile_products
from fused_losses.primitives.distances import triton_kernels as triton_distance_kernels
from fused_losses.primitives.maxsim import triton_kernels as triton_maxsim_kernels
from fused_losses.primitives.pairs import (
    triton_attention,
    triton_backward,
    triton_near,
    triton_vectors,
)
from fused_losses.primitives.pairs import triton_forward as triton_pair_kernels
from fused_losses.primitives.topk import triton_kernels as triton_topk_kernels


def _pair_tiles(s: Launch) -> tuple[int, int, int]:
    """Products, biases and masks of pair kernels; their rows, columns and column tiles."""
    high, wide = s.row_end - s.first_row, s.column_end - s.first_column
    tiles = ceil_div(wide, s.BN)
    # below the diagonal a tile is left at once
    live = s.programs
    if s.TRIANGLE:
        live = sum(
            s.first_column + (t + 1) * s.BN - 1 > s.first_row + r * s.BM
            for t in range(tiles)
            for r in range(s.row_tiles)
        )
    share = live / s.programs
    if s.has("squares"):
        s.read(
            "squares", round(high * tiles * s.BN * share), 0, (high - 1) * s.stride_squares + wide
        )
    else:
        rows, columns = (s.first_row, high), (s.first_column, wide)
        tile_products(s, "x.rows", "y.rows", rows, columns, s.d, live)
    s.read("scale", live)
    kinds = 1 if s.KIND is not None or not s.has("x.labels") else 2
    for of, times in (("labels", kinds), ("bias", 1), ("ids", 1), ("groups", 1)):
        s.read(f"x.{of}", round(high * tiles * times * share))
        s.read(f"y.{of}", round(wide * s.row_tiles * times * share))
    s.read("exclude", round(high * s.excluded * tiles * share))
    s.read("x.window", round(2 * kinds * high * tiles * share))
    s.read("y.window", round(2 * kinds * wide * s.row_tiles * share))
    return high, wide, tiles


@form(triton_pair_kernels.statistics_tiles)
def statistics_tiles(s: Launch) -> None:
    high, wide, tiles = _pair_tiles(s)
    classes = s.row_part.shape[1]
    s.write("row_part", 4 * classes * high * tiles)
    s.write("column_part", 4 * classes * wide * s.row_tiles)
    s.work.scalar = (8 + 6 * s.has("column_part")) * classes * s.programs * s.BM * s.BN


@form(triton_pair_kernels.merge_tiles)
def pair_merge_tiles(s: Launch) -> None:
    s.read("part", 4 * s.CLASSES * s.groups * s.length)
    state = 4 * s.CLASSES * s.length
    s.read("state", state, 0, state)
    s.write("state", state, 0, state)


@form(triton_backward.gradient_tiles)
def pair_gradient_tiles(s: Launch) -> None:
    high, wide, tiles = _pair_tiles(s)
    kinds, vectors = 2 if s.has("x.labels") else 1, 4 if s.REDUCTION == "lse" else 2
    s.read("row_vectors", kinds * vectors * high * tiles, 0, kinds * vectors * high)
    s.read("column_vectors", kinds * vectors * wide * s.row_tiles, 0, kinds * vectors * wide)
    s.write("ds", high * wide)
    s.work.scalar = (8 + 6 * s.has("column_vectors")) * kinds * s.programs * s.BM * s.BN


@form(triton_near.split_tiles)
def pair_split_tiles(s: Launch) -> None:
    across = ceil_div(s.m, s.BN)
    for name in ("g", "squares"):
        s.read(name, s.n * across * s.BN, 0, (s.n - 1) * s.values[name].stride(0) + s.m)
    s.read("x_norms", s.n * across, 0, s.n)
    s.read("y_norms", s.m * s.row_tiles, 0, s.m)
    s.write("far", s.n * s.m, 0, (s.n - 1) * s.stride_far + s.m)
    for name in ("row_sums", "moments", "near_rows"):
        s.write(name, s.n * across)
    for name in ("column_sums", "near_columns"):
        s.write(name, s.m * s.row_tiles)
    s.work.scalar = 8 * s.programs * s.BM * s.BN


@form(triton_near.near_sums)
def pair_near_sums(s: Launch) -> None:
    """Where no pair is near."""
    s.read("near", s.n * ceil_div(s.m, s.BN) * s.depth_tiles)


@form(triton_attention.attention_tiles)
def attention_tiles(s: Launch) -> None:
    high, wide, tiles = _pair_tiles(s)
    s.read("base", 2 * high * tiles)
    s.write("weights", high * wide)
    if s.has("ds"):
        rows, columns = (s.first_row, high), (s.first_column, wide)
        tile_products(s, "grad_out", "values", rows, columns, s.width, s.programs)
        s.read("shift", high * tiles)
        s.write("ds", high * wide)
    s.work.scalar = 10 * s.programs * s.BM * s.BN


def _keys(s: Launch, rows: tuple[int, int], columns: tuple[int, int], tiles: int) -> None:
    """`tile_keys` of so many tiles."""
    tile_products(s, "x", "y", rows, columns, s.d, tiles)
    across, down = ceil_div(columns[1], s.BN), s.row_tiles
    s.read("center", tiles * s.d)
    for name in ("offset", "multiplier"):
        s.read(name, columns[1] * down)
    masks = [] if s.MATCH == "any" else ["labels"]
    for of in (*masks, "ids"):
        s.read(f"x_{of}", rows[1] * across)
        s.read(f"y_{of}", columns[1] * down)
    s.read("exclude", rows[1] * s.excluded * across)
    s.work.scalar = 5 * tiles * s.BM * s.BN


@form(triton_topk_kernels.best_columns)
def best_columns(s: Launch) -> None:
    last = s.m - (s.splits - 1) * s.span
    tiles = s.row_tiles * ((s.splits - 1) * ceil_div(s.span, s.BN) + ceil_div(last, s.BN))
    _keys(s, (0, s.n), (0, s.m), tiles)
    s.write("to", s.n * s.splits * s.keep)


@form(triton_topk_kernels.key_tiles)
def key_tiles(s: Launch) -> None:
    rows = s.first_row, s.row_end - s.first_row
    columns = s.first, min(s.programs // s.row_tiles * s.BN, s.m - s.first)
    _keys(s, rows, columns, s.programs)
    s.write("to", rows[1] * columns[1])


@form(triton_distance_kernels.row_squares)
def row_squares(s: Launch) -> None:
    s.read("x", s.programs * s.BM * s.d, 0, s.n * s.stride_x)
    s.write("squares", s.n)
    s.work.scalar = 2 * s.n * s.d


@form(triton_distance_kernels.distance_tiles)
def distance_tiles(s: Launch) -> None:
    tile_products(s, "x", "y", (0, s.n), (0, s.m), s.d, s.programs)
    s.read("x_squares", s.programs * s.BM, 0, s.n)
    s.read("y_squares", s.programs * s.BN, 0, s.m)
    s.write("near_rows", s.programs * s.BM)
    s.write("out", s.n * s.m)
    s.work.scalar = 5 * s.programs * s.BM * s.BN


@form(triton_distance_kernels.near_distances)
def near_distances(s: Launch) -> None:
    """Where no pair is near."""
    s.read("near_rows", s.programs * s.BM)


@form(triton_distance_kernels.product_gradients)
def product_gradients(s: Launch) -> None:
    parts = s.programs // s.depth_tiles
    splits = parts // s.row_tiles
    last = s.m - (splits - 1) * s.span
    swept = ((splits - 1) * ceil_div(s.span, s.BN) + ceil_div(last, s.BN)) * s.BN * s.row_tiles
    s.read("other", swept * s.d, 0, s.m * s.stride_other)
    s.read("grad", s.n * s.m * s.depth_tiles)
    if s.has("distances"):
        s.read("distances", s.n * s.m * s.depth_tiles)
        s.read("own_squares", s.n * splits * s.depth_tiles)
        s.read("other_squares", s.m * s.row_tiles * s.depth_tiles)
        s.read("own", parts * s.BM * s.d, 0, s.n * s.stride_own)
        s.write("near_range", 2 * parts)
    s.write("to", splits * s.n * s.d)
    s.multiply(swept * s.BM, s.depth_tiles * s.BK, s.own)
    s.work.scalar = 8 * swept * s.BM * s.depth_tiles


@form(triton_distance_kernels.near_gradients)
def near_gradients(s: Launch) -> None:
    """Where no pair is near."""
    s.read("near_range", 2 * s.programs)


@form(triton_maxsim_kernels.token_maxima)
def token_maxima(s: Launch) -> None:
    """Documents of one length."""
    documents = s.programs // s.row_tiles
    length = s.documents.shape[0] // s.count
    tiles = ceil_div(length, s.BN)
    depth = s.d if s.WHOLE else ceil_div(s.d, s.BK) * s.BK
    s.read("queries", s.programs * s.BM * s.d * (1 if s.WHOLE else tiles))
    at = s.first * length * s.stride_y
    s.read("documents", s.programs * tiles * s.BN * s.d, at, documents * length * s.stride_y)
    s.read("offsets", 2 * s.programs, 0, 2 * documents)
    s.write("best_out", documents * s.tokens, 0, documents * s.tokens)
    s.write("index", documents * s.tokens, 0, documents * s.tokens)
    s.multiply(s.programs * tiles * s.BM * s.BN, s.BK if s.WHOLE else depth, s.queries)
    s.work.scalar = 4 * s.programs * tiles * s.BM * s.BN


@form(triton_maxsim_kernels.token_sums)
def token_sums(s: Launch) -> None:
    s.read("best", s.chunk * s.tokens, 0, s.chunk * s.tokens)
    s.read("offsets", 2 * s.programs)
    s.write("scores", s.query_count * s.chunk)


def _choices(s: Launch, times: int) -> None:
    for name, each in (("index", s.count), ("owners", s.count), ("grad", s.count)):
        s.read(name, s.tokens * each * times)


@form(triton_maxsim_kernels.query_gradients)
def query_gradients(s: Launch) -> None:
    """Where every token has chosen."""
    _choices(s, s.depth_tiles)
    s.read("offsets", s.programs * s.count)
    s.read("documents", s.tokens * s.count * s.d)
    s.write("dqueries", s.tokens * s.d)
    s.work.scalar = 2 * s.tokens * s.count * s.d


@form(triton_maxsim_kernels.document_gradients)
def document_gradients(s: Launch) -> None:
    """Documents of one length, where every token has chosen."""
    length = s.ddocuments.shape[0] // s.count
    tiles = s.count * ceil_div(length, s.BN) * s.depth_tiles
    each = ceil_div(length, s.BN) * s.depth_tiles
    _choices(s, each)
    s.read("tile_documents", s.programs)
    s.read("tile_ends", tiles)
    s.read("offsets", 2 * tiles)
    s.read("unscale", tiles)
    swept = tiles // s.depth_tiles * ceil_div(s.tokens, s.BM) * s.BM
    s.read("queries", swept * s.d, 0, s.tokens * s.stride_x)
    s.write("ddocuments", s.ddocuments.shape[0] * s.d)
    s.multiply(swept * s.BN, s.depth_tiles * s.BK, s.queries)


@form(triton_vectors.finish_vectors)
def finish_vectors(s: Launch) -> None:
    length = 2 * s.total
    statistics = 3 if s.LSE else 2
    s.read("state", statistics * length)
    s.write("state", (statistics - 1) * length)
    s.work.scalar = (12 if s.LSE else 2) * length


@form(triton_vectors.gradient_vectors)
def gradient_vectors(s: Launch) -> None:
    length = 2 * s.total
    s.read("grad", 2 * length)
    s.read("state", 3 * length if s.LSE else 0)
    s.read("gain", s.programs)
    s.write("out", 4 * length)
    s.work.scalar = (24 if s.LSE else 4) * length


@form(triton_target.target_labels)
def target_labels(s: Launch) -> None:
    s.read("labels", s.n)
    s.write("out", s.n)
    s.write("fine", 1)


@form(triton_target.target_losses)
def target_losses(s: Launch) -> None:
    s.read("labels", 2 * s.n if s.MEAN else s.n, 0, s.n)
    for name in ("lse", "target"):
        s.read(name, s.n)
    s.write("slopes", 2 * s.n)
    s.write("loss", 1)
    s.work.scalar = 40 * s.n
