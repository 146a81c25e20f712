"""Closed forms of the Triton kernels of row statistics and of class rules."""

from __future__ import annotations

from fused_losses.backends.gpu.device import ceil_div
from fused_losses.bench.roofline.work import Launch, form, tile_products
from fused_losses.primitives.class_rules import triton_backward as triton_class_gradients
from fused_losses.primitives.class_rules import triton_forward as triton_class_kernels
from fused_losses.primitives.row_statistics import triton_backward as triton_gradients
from fused_losses.primitives.row_statistics import triton_forward as triton_kernels


def _columns(s: Launch, columns: int, times: int) -> None:
    """`column_values`"""
    for name in ("inverse", "ids", "bias", "weight"):
        s.read(f"of_class.{name}", columns * times)


@form(triton_kernels.forward_tiles)
def forward_tiles(s: Launch) -> None:
    tiles, columns = s.programs // s.row_tiles, s.count - s.first
    tile_products(s, "x", "w", (0, s.n), (s.first, columns), s.d, s.programs)
    s.read("of_class.ids", s.programs * s.BN)
    _columns(s, columns, s.row_tiles)
    s.read("of_row.positions", s.n * tiles)
    s.read("of_row.bend", 4 * s.n * tiles, 0, 4 * s.n)
    for name in ("peak", "total", "best", "moment"):
        s.write(f"part.{name}", s.n * tiles, 0, s.n * tiles)
    s.work.scalar = 6 * s.programs * s.BM * s.BN


@form(triton_kernels.forward_resident)
def forward_resident(s: Launch) -> None:
    splits, columns = s.programs // s.row_tiles, s.count - s.first
    rows, d = 2 * s.BM, s.DEPTH * s.BK
    last = columns - (splits - 1) * s.span
    swept = ((splits - 1) * ceil_div(s.span, s.BN) + ceil_div(last, s.BN)) * s.BN * s.row_tiles
    s.read("x", s.programs * rows * d, 0, s.n * s.stride_x)
    s.read("w", swept * d, s.first * s.stride_w, columns * s.stride_w)
    s.read("of_class.ids", swept)
    s.read("of_class.inverse", columns * s.row_tiles)
    s.read("of_row.positions", s.n * splits)
    for name in ("peak", "total", "best"):
        s.write(f"part.{name}", s.n * splits, 0, s.n * splits)
    s.multiply(swept * rows, d, s.x)
    s.work.scalar = 6 * swept * rows


@form(triton_kernels.inverse_norms)
def inverse_norms(s: Launch) -> None:
    rows = s.programs * s.BN
    s.read("w", rows * s.d, 0, s.count * s.stride_w)
    s.read("classes", rows)
    s.write("inverse", s.count)
    s.work.scalar = 2 * rows * s.d


def _merge(s: Launch) -> None:
    for name in ("peak", "total", "best", "moment"):
        s.read(f"part.{name}", s.groups * s.n, 0, s.groups * s.n)


@form(triton_kernels.merge_tiles)
def merge_tiles(s: Launch) -> None:
    _merge(s)
    for name in ("peak", "total", "best", "moment"):
        s.write(f"to.{name}", s.n)


@form(triton_kernels.forward_rows)
def forward_rows(s: Launch) -> None:
    _merge(s)
    rows = s.programs * s.BM
    s.read("positions", s.n)
    s.read("classes", 2 * rows, 0, 2 * rows)
    s.read("x", rows * s.d, 0, s.n * s.stride_x)
    s.read("w", rows * s.d, 0, s.n * s.stride_w)
    for name in ("lse", "target", "weighted", "hardest", "hardest_score"):
        s.write(name, s.n)
    s.work.scalar = 4 * rows * s.d


def _row_vectors(s: Launch, times: int) -> None:
    for name in ("positions", "lse", "grad_lse", "grad_target", "grad_weighted"):
        s.read(f"of_row.{name}", s.n * times)
    s.read("of_row.bend", 4 * s.n * times, 0, 4 * s.n)


@form(triton_gradients.gradient_tiles)
def gradient_tiles(s: Launch) -> None:
    tiles, columns = s.programs // s.row_tiles, s.count - s.first
    tile_products(s, "x", "w", (0, s.n), (s.first, columns), s.d, s.programs)
    s.read("of_class.ids", s.programs * s.BN)
    _columns(s, columns, s.row_tiles)
    s.read("of_class.rest", columns * s.row_tiles)
    _row_vectors(s, tiles)
    s.write("ds", s.n * columns)
    s.write("bias_sum", columns * s.row_tiles)
    s.work.scalar = 6 * s.programs * s.BM * s.BN


@form(triton_gradients.finish_weight)
def finish_weight(s: Launch) -> None:
    rows, columns = s.programs * s.BN, s.count - s.first
    times = 2 if s.has("inverse") else 1
    s.read("classes", rows)
    s.read("unscale", s.programs)
    s.read("bias_sum", columns * s.row_tiles)
    s.write("dbias", columns)
    if s.has("dweight"):
        s.read("gradient", times * rows * s.d, 0, columns * s.d)
        if s.has("inverse"):
            s.read("w", times * rows * s.d, s.first * s.stride_w, columns * s.stride_w)
            s.read("inverse", columns)
        s.write("dweight", columns * s.d, s.first * s.stride_dw, columns * s.stride_dw)
    s.work.scalar = 5 * rows * s.d


@form(triton_gradients.owner_rows)
def owner_rows(s: Launch) -> None:
    swept, splits = s.programs * s.steps * s.BN, s.programs // s.row_tiles
    s.read("x", s.programs * s.BM * s.d, 0, s.n * s.stride_x)
    s.read("w", swept * s.d, 0, s.count * s.stride_w)
    s.read("of_class.ids", swept)
    _columns(s, s.count, s.row_tiles)
    _row_vectors(s, splits)
    s.write("dx", splits * s.n * s.d)
    s.multiply(2 * swept * s.BM, s.BD, s.x)
    s.work.scalar = 6 * swept * s.BM


@form(triton_gradients.owner_classes)
def owner_classes(s: Launch) -> None:
    columns, swept = s.programs * s.BN, s.programs * ceil_div(s.n, s.BM) * s.BM
    s.read("w", columns * s.d * (2 if s.NORMALIZE else 1), 0, s.count * s.stride_w)
    s.read("x", swept * s.d, 0, s.n * s.stride_x, ceil_div(s.programs, 256))
    s.read("of_class.ids", columns * (2 if s.has("of_class.ids") else 1) + s.count)
    s.read("of_class.bias", s.count)
    s.read("of_class.weight", s.count)
    s.read("unscale", s.programs)
    _row_vectors(s, s.programs)
    s.write("inverse", s.count)
    s.write("dbias", s.count)
    s.write("dweight", s.count * s.d)
    s.multiply(2 * swept * s.BN, s.BD, s.x)
    s.work.scalar = 6 * swept * s.BN


def _centres(s: Launch, sweeps: int) -> tuple[int, int]:
    """Products with every centre of a tile's classes, `sweeps` times; class tiles, and classes."""
    times, columns = s.centers * sweeps, s.count - s.first
    centres = s.first * s.centers, columns * s.centers
    tile_products(s, "x", "w", (0, s.n), centres, s.d, s.programs * times)
    s.read("of_class.ids", s.programs * s.BN * times)
    s.read("of_class.inverse", columns * times * s.row_tiles)
    tiles = s.programs // s.row_tiles
    width = 4 if s.BENT else 1
    s.read("of_row.numbers", width * s.n * tiles, 0, width * s.n)
    s.work.scalar = 20 * s.programs * s.BM * s.BN * times
    return tiles, columns


PARTIALS = ("high", "best", "total", "peak", "second")


@form(triton_class_kernels.forward_classes)
def forward_classes(s: Launch) -> None:
    tiles, _ = _centres(s, 1)
    s.read("of_row.places", s.n * s.labels * tiles, 0, s.n * s.labels)
    for name in PARTIALS:
        s.write(f"part.{name}", s.n * tiles, 0, s.n * tiles)


@form(triton_class_kernels.merge_classes)
def merge_classes(s: Launch) -> None:
    for name in PARTIALS:
        s.read(f"part.{name}", s.groups * s.n, 0, s.groups * s.n)
        s.read(f"so_far.{name}", s.n)
        s.write(f"so_far.{name}", s.n)


@form(triton_class_gradients.gradient_classes)
def gradient_classes(s: Launch) -> None:
    # the softmax over centres takes each again
    tiles, columns = _centres(s, 2 if s.POOL == 2 else 1)
    s.read("of_row.places", s.n * s.labels * tiles * (2 if s.MANY else 1), 0, s.n * s.labels)
    s.read("of_row.grad_targets", s.n * s.labels * tiles, 0, s.n * s.labels)
    for name in ("lse", "grad_first", "grad_second"):
        s.read(f"of_row.{name}", s.n * tiles)
    s.read("of_class.rest", columns * s.centers * s.row_tiles)
    s.write("ds", s.n * columns * s.centers)
