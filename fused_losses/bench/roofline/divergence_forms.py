"""Closed forms of the Triton kernels of `divergence`."""

from __future__ import annotations

from fused_losses.backends.gpu.device import ceil_div
from fused_losses.bench.roofline.work import Launch, form
from fused_losses.primitives.divergence import triton_backward, triton_forward, triton_near


def _scores(s: Launch, tiles: int, first: int, columns: int) -> None:
    """`scores` of both sides in so many tiles, over `columns` classes that are there.

    Where all are near each other there is one product more, and none where they are not.
    """
    real = columns * s.row_tiles
    s.read("near.rows", tiles * s.BM)
    s.read("near.shrink", tiles * s.BN)
    for side in ("student", "teacher"):
        stride, width = s.values[f"{side}.stride"], s.values[f"{side}.width"]
        if s.values[f"{side}.bias"] is not None:
            s.read("ids", real)
            s.read(f"{side}.bias", real)
        if s.values[f"{side}.weight"] is None:
            s.read("ids", real)
            s.read(f"{side}.rows", s.BM * real, first, (s.n - 1) * stride + columns)
            s.read(f"{side}.scale", s.n * tiles // s.row_tiles)
            continue
        s.read("ids", tiles * s.BN)
        s.read(f"{side}.inverse", real)
        s.read(f"{side}.rows", tiles * s.BM * width, 0, s.n * stride, ceil_div(tiles, 256))
        step = s.values[f"{side}.stride_class"]
        s.read(f"{side}.weight", tiles * s.BN * width, first * step, columns * step)
        depth = ceil_div(width, s.BK) * s.BK
        s.multiply(tiles * s.BM * s.BN, depth, s.values[f"{side}.rows"])


def _vectors(s: Launch, names: tuple[str, ...], times: int) -> None:
    for name in names:
        s.read(f"of_row.{name}", s.n * times)


@form(triton_near.class_shrink)
def class_shrink(s: Launch) -> None:
    rows = s.programs * s.BN
    s.read("ids", 2 * rows)
    s.read("w", rows * s.d, 0, s.count * s.stride)
    s.read("wt", rows * s.d, 0, s.count * s.teacher_stride)
    s.write("shrink", s.count)
    s.work.scalar = 10 * rows * s.d


LSE = ("lse", "teacher_lse", "between")
REST = ("fold", "fold_s", "fold_t", "grad_lse", "grad_target", "grad_fold", "grad_mean")


@form(triton_forward.divergence_runs)
def divergence_runs(s: Launch) -> None:
    runs, tiles = s.programs // s.row_tiles, s.programs * s.steps
    _scores(s, tiles, 0, s.count)
    _vectors(s, ("positions",), runs)
    own = 2 if s.LEAD else {"": 0, "power": 3}.get(s.KIND, 1)
    s.write("part", (4 + own) * s.n * runs)
    s.work.scalar = (40 if s.LEAD else 12) * tiles * s.BM * s.BN


@form(triton_forward.share_runs)
def share_runs(s: Launch) -> None:
    runs, tiles = s.programs // s.row_tiles, s.programs * s.steps
    _scores(s, tiles, 0, s.count)
    _vectors(s, ("positions", *LSE), runs)
    s.write("part", 3 * s.n * runs)
    s.work.scalar = 60 * tiles * s.BM * s.BN


@form(triton_backward.side_gradient)
def side_gradient(s: Launch) -> None:
    across, first = s.programs // s.row_tiles, s.first_tile * s.BN
    columns = s.count - first
    _scores(s, s.programs, first, columns)
    _vectors(s, ("positions", *LSE, *REST), across)
    s.read("rest", columns * s.row_tiles)
    s.write("ds", s.n * columns)
    s.write("bias_sum", columns * s.row_tiles)
    s.work.scalar = 20 * s.programs * s.BM * s.BN
