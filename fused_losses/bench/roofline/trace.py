"""Bytes and FLOPs of what a GPU would be given: the host code's launches, on tensors without data.

`Trace` runs the real host code for an architecture of choice. Every kernel is met by its closed
form here, a function of the launch's own arguments and tile; every library product and other
PyTorch operation by what it reads and writes. tests/test_roofline.py holds the closed forms to
what the kernels load, store and multiply when executed (Triton's interpreter, the host build).
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.base import validation

# of a library's product, assumed: 128 x 256, which from sm_90 on two processors share (clusters
# with multicast; `gpu_anchors.md` saw as much in Liger's): 256 x 256 as L2 sees it
LIBRARY_TILE = {"sm_80": (128, 256), "sm_90": (256, 256), "sm_100": (256, 256)}
LINE = 128 << 10  # bytes of a piece of a tensor in the model of L2
L2_SHARE = 0.75  # of L2 that a stream leaves to what is reused; assumed


@dataclass(frozen=True)
class Use:
    """One tensor's part in a launch."""

    storage: Any
    begin: int  # bytes from the start of the storage
    size: int  # distinct bytes
    moved: int  # bytes between L2 and the processors
    write: bool = False
    sweeps: int = 1  # how often the region is gone through in turn
    block: bool = False  # rows of a wider matrix: known by where they begin


@dataclass
class Work:
    """One launch."""

    name: str
    kind: str = ""  # of the products: half, tf32, fp32
    flops: int = 0  # of products
    scalar: int = 0  # other floating point operations, about
    uses: list[Use] = field(default_factory=list)

    def moved(self, write: bool | None = None) -> int:
        return sum(u.moved for u in self.uses if write is None or u.write == write)


def use(t: Tensor, moved: int, begin: int = 0, size: int | None = None, **how: Any) -> Use:
    """begin and size in elements of t, from its first one."""
    if size is None:
        last = sum((s - 1) * stride for s, stride in zip(t.shape, t.stride(), strict=True))
        size = last + 1 if t.numel() else 0
        if size > 1.5 * count(t):
            size, how["block"] = count(t), True
    e = t.element_size()
    return Use(t.untyped_storage(), (t.storage_offset() + begin) * e, size * e, moved, **how)


# ---- closed forms of the Triton kernels ---------------------------------------------------------


class Launch:
    """One launch's arguments by name (`x.bias`: of a group), and the work that a form finds."""

    def __init__(self, name: str, programs: int, values: dict[str, Any]) -> None:
        self.values, self.programs = values, programs
        self.work = Work(name)

    def __getattr__(self, name: str) -> Any:
        return self.values.get(name)

    def has(self, name: str) -> bool:
        return self.values.get(name) is not None

    def read(self, name: str, count: int, begin: int = 0, size: int | None = None, sweeps: int = 1):
        """`count` elements of an argument, if it is given."""
        t = self.values.get(name)
        if t is not None and count:
            e = t.element_size()
            self.work.uses.append(use(t, count * e, begin, size, sweeps=sweeps))

    def write(self, name: str, count: int, begin: int = 0, size: int | None = None) -> None:
        t = self.values.get(name)
        if t is not None and count:
            e = t.element_size()
            self.work.uses.append(use(t, count * e, begin, size, write=True))

    def multiply(self, scores: int, depth: int, like: Tensor) -> None:
        """Products of `scores` pairs of rows."""
        flops = 2 * scores * depth
        dot = self.DOT
        self.work.kind = "half" if like.element_size() < 4 or self.BF16 else "fp32"
        if self.work.kind == "fp32" and dot in ("tf32", "tf32x3"):
            self.work.kind = "tf32"
            flops *= 3 if dot == "tf32x3" else 1
        self.work.flops += flops


Form = Callable[[Launch], None]
FORMS: dict[str, Form] = {}


def form(name: str) -> Callable[[Form], Form]:
    def add(f: Form) -> Form:
        FORMS[name] = f
        return f

    return add


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _tile_products(
    s: Launch,
    x: str,
    y: str,
    rows: tuple[int, int],
    columns: tuple[int, int],
    d: int,
    programs: int,
) -> None:
    """Tiles of BM x BN whose operands are read whole, rows (first, count) past the end as well."""
    stride_x, stride_y = s.values[x].stride(0), s.values[y].stride(0)
    # a row operand beyond half of L2 is gone through again for every wave of tiles
    sweeps = cdiv(programs, 256)
    s.read(x, programs * s.BM * d, rows[0] * stride_x, rows[1] * stride_x, sweeps)
    s.read(y, programs * s.BN * d, columns[0] * stride_y, columns[1] * stride_y)
    s.multiply(programs * s.BM * s.BN, cdiv(d, s.BK) * s.BK, s.values[x])


def _columns(s: Launch, columns: int, times: int) -> None:
    """`column_values`"""
    for name in ("inverse", "ids", "bias", "weight"):
        s.read(f"of_class.{name}", columns * times)


@form("row_statistics.forward_tiles")
def _(s: Launch) -> None:
    tiles, columns = s.programs // s.row_tiles, s.count - s.first
    _tile_products(s, "x", "w", (0, s.n), (s.first, columns), s.d, s.programs)
    s.read("of_class.ids", s.programs * s.BN)
    _columns(s, columns, s.row_tiles)
    s.read("of_row.positions", s.n * tiles)
    s.read("of_row.bend", 4 * s.n * tiles, 0, 4 * s.n)
    for name in ("peak", "total", "best", "moment"):
        s.write(f"part.{name}", s.n * tiles, 0, s.n * tiles)
    s.work.scalar = 6 * s.programs * s.BM * s.BN


@form("row_statistics.forward_resident")
def _(s: Launch) -> None:
    splits, columns = s.programs // s.row_tiles, s.count - s.first
    rows, d = 2 * s.BM, s.DEPTH * s.BK
    last = columns - (splits - 1) * s.span
    swept = ((splits - 1) * cdiv(s.span, s.BN) + cdiv(last, s.BN)) * s.BN * s.row_tiles
    s.read("x", s.programs * rows * d, 0, s.n * s.stride_x)
    s.read("w", swept * d, s.first * s.stride_w, columns * s.stride_w)
    s.read("of_class.ids", swept)
    s.read("of_class.inverse", columns * s.row_tiles)
    s.read("of_row.positions", s.n * splits)
    for name in ("peak", "total", "best"):
        s.write(f"part.{name}", s.n * splits, 0, s.n * splits)
    s.multiply(swept * rows, d, s.x)
    s.work.scalar = 6 * swept * rows


@form("row_statistics.inverse_norms")
def _(s: Launch) -> None:
    rows = s.programs * s.BN
    s.read("w", rows * s.d, 0, s.count * s.stride_w)
    s.read("classes", rows)
    s.write("inverse", s.count)
    s.work.scalar = 2 * rows * s.d


def _merge(s: Launch) -> None:
    for name in ("peak", "total", "best", "moment"):
        s.read(f"part.{name}", s.groups * s.n, 0, s.groups * s.n)


@form("row_statistics.merge_tiles")
def _(s: Launch) -> None:
    _merge(s)
    for name in ("peak", "total", "best", "moment"):
        s.write(f"to.{name}", s.n)


@form("row_statistics.forward_rows")
def _(s: Launch) -> None:
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


@form("row_statistics.gradient_tiles")
def _(s: Launch) -> None:
    tiles, columns = s.programs // s.row_tiles, s.count - s.first
    _tile_products(s, "x", "w", (0, s.n), (s.first, columns), s.d, s.programs)
    s.read("of_class.ids", s.programs * s.BN)
    _columns(s, columns, s.row_tiles)
    s.read("of_class.inverse", columns * s.row_tiles)
    _row_vectors(s, tiles)
    s.write("ds", s.n * columns)
    s.write("bias_sum", columns * s.row_tiles)
    s.work.scalar = 6 * s.programs * s.BM * s.BN


@form("row_statistics.finish_weight")
def _(s: Launch) -> None:
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


@form("row_statistics.owner_rows")
def _(s: Launch) -> None:
    swept, splits = s.programs * s.steps * s.BN, s.programs // s.row_tiles
    s.read("x", s.programs * s.BM * s.d, 0, s.n * s.stride_x)
    s.read("w", swept * s.d, 0, s.count * s.stride_w)
    s.read("of_class.ids", swept)
    _columns(s, s.count, s.row_tiles)
    _row_vectors(s, splits)
    s.write("dx", splits * s.n * s.d)
    s.multiply(2 * swept * s.BM, s.BD, s.x)
    s.work.scalar = 6 * swept * s.BM


@form("row_statistics.owner_classes")
def _(s: Launch) -> None:
    columns, swept = s.programs * s.BN, s.programs * cdiv(s.n, s.BM) * s.BM
    s.read("w", columns * s.d * (2 if s.NORMALIZE else 1), 0, s.count * s.stride_w)
    s.read("x", swept * s.d, 0, s.n * s.stride_x, cdiv(s.programs, 256))
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


def _pair_tiles(s: Launch) -> tuple[int, int, int]:
    """Products, biases and masks of pair kernels; their rows, columns and column tiles."""
    high, wide = s.row_end - s.first_row, s.column_end - s.first_column
    tiles = cdiv(wide, s.BN)
    # below the diagonal a tile is left at once
    live = s.programs
    if s.TRIANGLE:
        live = sum(
            s.first_column + (t + 1) * s.BN - 1 > s.first_row + r * s.BM
            for t in range(tiles)
            for r in range(s.row_tiles)
        )
    share = live / s.programs
    rows, columns = (s.first_row, high), (s.first_column, wide)
    _tile_products(s, "x.rows", "y.rows", rows, columns, s.d, live)
    s.read("scale", live)
    kinds = 1 if s.KIND is not None or not s.has("x.labels") else 2
    for of, times in (("labels", kinds), ("bias", 1), ("ids", 1), ("groups", 1)):
        s.read(f"x.{of}", round(high * tiles * times * share))
        s.read(f"y.{of}", round(wide * s.row_tiles * times * share))
    s.read("exclude", round(high * s.excluded * tiles * share))
    s.read("x.window", round(2 * kinds * high * tiles * share))
    s.read("y.window", round(2 * kinds * wide * s.row_tiles * share))
    return high, wide, tiles


@form("pairs.statistics_tiles")
def _(s: Launch) -> None:
    high, wide, tiles = _pair_tiles(s)
    classes = s.row_part.shape[1]
    s.write("row_part", 4 * classes * high * tiles)
    s.write("column_part", 4 * classes * wide * s.row_tiles)
    s.work.scalar = (8 + 6 * s.has("column_part")) * classes * s.programs * s.BM * s.BN


@form("pairs.merge_tiles")
def _(s: Launch) -> None:
    s.read("part", 4 * s.CLASSES * s.groups * s.length)
    state = 4 * s.CLASSES * s.length
    s.read("state", state, 0, state)
    s.write("state", state, 0, state)


@form("pairs.gradient_tiles")
def _(s: Launch) -> None:
    high, wide, tiles = _pair_tiles(s)
    kinds, vectors = 2 if s.has("x.labels") else 1, 4 if s.REDUCTION == "lse" else 2
    s.read("row_vectors", kinds * vectors * high * tiles, 0, kinds * vectors * high)
    s.read("column_vectors", kinds * vectors * wide * s.row_tiles, 0, kinds * vectors * wide)
    s.write("ds", high * wide)
    s.work.scalar = (8 + 6 * s.has("column_vectors")) * kinds * s.programs * s.BM * s.BN


@form("pairs.attention_tiles")
def _(s: Launch) -> None:
    high, wide, tiles = _pair_tiles(s)
    s.read("base", 2 * high * tiles)
    s.write("weights", high * wide)
    if s.has("ds"):
        rows, columns = (s.first_row, high), (s.first_column, wide)
        _tile_products(s, "grad_out", "values", rows, columns, s.width, s.programs)
        s.read("shift", high * tiles)
        s.write("ds", high * wide)
    s.work.scalar = 10 * s.programs * s.BM * s.BN


def _keys(s: Launch, rows: tuple[int, int], columns: tuple[int, int], tiles: int) -> None:
    """`tile_keys` of so many tiles."""
    _tile_products(s, "x", "y", rows, columns, s.d, tiles)
    across, down = cdiv(columns[1], s.BN), s.row_tiles
    s.read("center", tiles * s.d)
    for name in ("offset", "multiplier"):
        s.read(name, columns[1] * down)
    masks = [] if s.MATCH == "any" else ["labels"]
    for of in (*masks, "ids"):
        s.read(f"x_{of}", rows[1] * across)
        s.read(f"y_{of}", columns[1] * down)
    s.read("exclude", rows[1] * s.excluded * across)
    s.work.scalar = 5 * tiles * s.BM * s.BN


@form("topk.best_columns")
def _(s: Launch) -> None:
    last = s.m - (s.splits - 1) * s.span
    tiles = s.row_tiles * ((s.splits - 1) * cdiv(s.span, s.BN) + cdiv(last, s.BN))
    _keys(s, (0, s.n), (0, s.m), tiles)
    s.write("to", s.n * s.splits * s.keep)


@form("topk.key_tiles")
def _(s: Launch) -> None:
    rows = s.first_row, s.row_end - s.first_row
    columns = s.first, min(s.programs // s.row_tiles * s.BN, s.m - s.first)
    _keys(s, rows, columns, s.programs)
    s.write("to", rows[1] * columns[1])


@form("distances.row_squares")
def _(s: Launch) -> None:
    s.read("x", s.programs * s.BM * s.d, 0, s.n * s.stride_x)
    s.write("squares", s.n)
    s.work.scalar = 2 * s.n * s.d


@form("distances.distance_tiles")
def _(s: Launch) -> None:
    _tile_products(s, "x", "y", (0, s.n), (0, s.m), s.d, s.programs)
    s.read("x_squares", s.programs * s.BM, 0, s.n)
    s.read("y_squares", s.programs * s.BN, 0, s.m)
    s.write("near_rows", s.programs * s.BM)
    s.write("out", s.n * s.m)
    s.work.scalar = 5 * s.programs * s.BM * s.BN


@form("distances.near_distances")
def _(s: Launch) -> None:
    """Where no pair is near."""
    s.read("near_rows", s.programs * s.BM)


@form("distances.product_gradients")
def _(s: Launch) -> None:
    parts = s.programs // s.depth_tiles
    splits = parts // s.row_tiles
    last = s.m - (splits - 1) * s.span
    swept = ((splits - 1) * cdiv(s.span, s.BN) + cdiv(last, s.BN)) * s.BN * s.row_tiles
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


@form("distances.near_gradients")
def _(s: Launch) -> None:
    """Where no pair is near."""
    s.read("near_range", 2 * s.programs)


@form("maxsim.token_maxima")
def _(s: Launch) -> None:
    """Documents of one length."""
    documents = s.programs // s.row_tiles
    length = s.documents.shape[0] // s.count
    tiles = cdiv(length, s.BN)
    depth = s.d if s.WHOLE else cdiv(s.d, s.BK) * s.BK
    s.read("queries", s.programs * s.BM * s.d * (1 if s.WHOLE else tiles))
    at = s.first * length * s.stride_y
    s.read("documents", s.programs * tiles * s.BN * s.d, at, documents * length * s.stride_y)
    s.read("offsets", 2 * s.programs, 0, 2 * documents)
    s.write("best_out", documents * s.tokens, 0, documents * s.tokens)
    s.write("index", documents * s.tokens, 0, documents * s.tokens)
    s.multiply(s.programs * tiles * s.BM * s.BN, s.BK if s.WHOLE else depth, s.queries)
    s.work.scalar = 4 * s.programs * tiles * s.BM * s.BN


@form("maxsim.token_sums")
def _(s: Launch) -> None:
    s.read("best", s.chunk * s.tokens, 0, s.chunk * s.tokens)
    s.read("offsets", 2 * s.programs)
    s.write("scores", s.query_count * s.chunk)


def _choices(s: Launch, times: int) -> None:
    for name, each in (("index", s.count), ("owners", s.count), ("grad", s.count)):
        s.read(name, s.tokens * each * times)


@form("maxsim.query_gradients")
def _(s: Launch) -> None:
    """Where every token has chosen."""
    _choices(s, s.depth_tiles)
    s.read("offsets", s.programs * s.count)
    s.read("documents", s.tokens * s.count * s.d)
    s.write("dqueries", s.tokens * s.d)
    s.work.scalar = 2 * s.tokens * s.count * s.d


@form("maxsim.document_gradients")
def _(s: Launch) -> None:
    """Documents of one length, where every token has chosen."""
    length = s.ddocuments.shape[0] // s.count
    tiles = s.count * cdiv(length, s.BN) * s.depth_tiles
    each = cdiv(length, s.BN) * s.depth_tiles
    _choices(s, each)
    s.read("tile_documents", s.programs)
    s.read("tile_ends", tiles)
    s.read("offsets", 2 * tiles)
    s.read("unscale", tiles)
    swept = tiles // s.depth_tiles * cdiv(s.tokens, s.BM) * s.BM
    s.read("queries", swept * s.d, 0, s.tokens * s.stride_x)
    s.write("ddocuments", s.ddocuments.shape[0] * s.d)
    s.multiply(swept * s.BN, s.depth_tiles * s.BK, s.queries)


# ---- everything else ----------------------------------------------------------------------------

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default: (0, 1, None),
    aten.mm.out: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.bmm.out: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.addmm.out: (1, 2, 0),
    aten.addmm_.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
    aten.baddbmm.out: (1, 2, 0),
    aten.baddbmm_.default: (1, 2, 0),
}
CREATE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
WRITES = ("copy_", "fill_", "zero_", "zeros", "full", "ones", "zeros_like", "ones_like", "arange")
WRITES += ("new_zeros", "new_full", "new_ones", "full_like", "scalar_tensor", "eye")


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors(item)]
    return []


def count(t: Tensor) -> int:
    """Distinct elements of a tensor, expanded dimensions once."""
    return prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride or n == 0)


def product_work(
    a: Tensor, b: Tensor, out: Tensor, more: Tensor | None, half: bool, arch: str
) -> Work:
    """A library product by tiles of LIBRARY_TILE, the longer side along the longer one."""
    batch = prod(a.shape[:-2])
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    high, wide = LIBRARY_TILE[arch] if m <= n else LIBRARY_TILE[arch][::-1]
    work = Work("product", "half" if half else "fp32", 2 * batch * m * n * k)
    moved_a = batch * m * k * cdiv(n, wide) * a.element_size()
    moved_b = batch * k * n * cdiv(m, high) * b.element_size()
    moved_out = batch * m * n * out.element_size()
    work.uses = [use(a, moved_a), use(b, moved_b), use(out, moved_out, write=True)]
    if more is not None:
        work.uses.append(use(more, count(more) * more.element_size()))
    return work


class Trace(TorchDispatchMode):
    """Collects the work of what runs under it, all of it on the meta device.

    own: our host code, whose 16-bit products are written with widened operands off a GPU.
    compiled: a rule for torch.compile. Results of pointwise operations are never stored: who reads
    them reads what they are made of. Products and sorts read stored operands; a softmax over rows
    reads its argument twice; what backward needs of pointwise results is computed again.
    """

    def __init__(
        self, arch: str = "sm_90", processors: int = 132, compiled: bool = False, own: bool = True
    ) -> None:
        super().__init__()
        self.arch, self.processors, self.compiled = arch, processors, compiled
        self.work: list[Work] = []
        self.kept: list[Any] = []  # storages stay alive: their addresses are their names
        self.made_of: dict[int, list[Tensor]] = {}  # storage -> what a result not stored is made of
        self.own = own

    def source(self, t: Tensor) -> list[Tensor]:
        return self.made_of.get(t.untyped_storage()._cdata, [t])

    def stored(self, t: Tensor) -> Tensor:
        """t in memory: written now if it was not stored."""
        key = t.untyped_storage()._cdata
        if key in self.made_of:
            sources = self.made_of.pop(key)
            self.simple("pointwise", sources, [t])
        return t

    def simple(self, name: str, reads: list[Tensor], writes: list[Tensor], times: int = 1) -> None:
        work = Work(name, scalar=sum(count(t) for t in reads or writes))
        work.uses = [use(t, times * count(t) * t.element_size()) for t in reads if t.numel()]
        work.uses += [use(t, count(t) * t.element_size(), write=True) for t in writes if t.numel()]
        self.work.append(work)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = tensors(args) + tensors(list(kwargs.values()))
        made = tensors(result)
        self.kept += [t.untyped_storage() for t in made]
        name = func._schema.name.split("::")[1]
        if func in PRODUCTS:
            self.product(func, args, kwargs, made[0])
        elif name in ("_euclidean_dist", "_cdist_forward", "_cdist_backward"):
            self.distances(name, given, made[0])
        elif not made or name in CREATE or func.is_view or self.aliases(func):
            pass
        elif name == "_to_copy" and self.own and self.widened(args[0], made[0]):
            self.made_of[made[0].untyped_storage()._cdata] = self.source(args[0])
        else:
            self.other(func, name, given, made)
        return result

    @staticmethod
    def aliases(func: Any) -> bool:
        """A view that is not marked as one (`_unsafe_view`, `_reshape_alias`)."""
        return "view" in func._schema.name or "alias" in func._schema.name

    @staticmethod
    def widened(a: Tensor, b: Tensor) -> bool:
        """16-bit rows in float32: what stands for a 16-bit product on tensors that are no GPU's."""
        return a.element_size() == 2 and b.dtype == torch.float32

    def product(self, func: Any, args: tuple, kwargs: dict, out: Tensor) -> None:
        at = PRODUCTS[func]
        a, b = args[at[0]], args[at[1]]
        beta = kwargs.get("beta", 1)
        more = args[at[2]] if at[2] is not None and beta else None
        operands = []
        for t in (a, b):
            (source, *rest) = self.source(t)
            if not rest and self.widened(source, t) and source.numel() >= t.numel():
                # the operand itself, in the shape that is multiplied
                e = torch.empty_strided(t.shape, t.stride(), dtype=source.dtype, device="meta")
                operands.append((e, source))
            else:
                operands.append((self.stored(t), None))
        half = all(t.element_size() == 2 for t, _ in operands)
        work = product_work(operands[0][0], operands[1][0], out, more, half, self.arch)
        for i, (_, source) in enumerate(operands):
            if source is not None:
                work.uses[i] = use(source, work.uses[i].moved, 0, None)
        self.work.append(work)

    def distances(self, name: str, given: list[Tensor], out: Tensor) -> None:
        """torch.cdist: a product of rows with their norms, or a block of threads a pair."""
        x, y = given[-2:] if name != "_cdist_backward" else given[1:3]
        if name == "_euclidean_dist":
            self.work.append(product_work(x, y.T, out, None, False, self.arch))
            return self.simple("pointwise", [out], [out])
        pairs, d = x.shape[0] * y.shape[0], x.shape[1]
        self.simple(name, given, [out])
        work = self.work[-1]
        work.uses += [use(t, pairs * d * t.element_size()) for t in (x, y)]
        work.scalar = 3 * pairs * d
        return None

    def other(self, func: Any, name: str, given: list[Tensor], made: list[Tensor]) -> None:
        in_place = name.endswith("_") or "out" in func._schema.overload_name
        if name in WRITES:
            reads = [] if name != "copy_" else given[1:2]
            reads = [s for t in reads for s in self.source(t)]
            return self.simple(name, reads, made)
        lazy = self.compiled and not in_place
        if lazy and torch.Tag.pointwise in func.tags or lazy and name in ("_to_copy", "clone"):
            sources = {id(s): s for t in given for s in self.source(t)}
            for t in made:
                self.made_of[t.untyped_storage()._cdata] = list(sources.values())
            return None
        if self.compiled and "log_softmax" in name:
            read = {id(s): s for t in given for s in self.source(t)}
            self.simple(name, list(read.values()), [], 2 if name == "_log_softmax" else 1)
            self.made_of[made[0].untyped_storage()._cdata] = list(read.values())
            return None
        if self.compiled and name in ("topk", "sort", "index", "gather"):
            given = [self.stored(t) for t in given]
        if name == "index_copy_":
            # as many rows as are given
            new = self.stored(given[-1])
            self.simple(name, [new], [])
            to = use(given[0], count(new) * new.element_size(), 0, count(new), write=True)
            self.work[-1].uses.append(to)
            return None
        if "gather" in name or name in ("index", "index_select", "nll_loss_forward"):
            # as much of the source as is taken from it
            self.simple(name, [*given[1:], made[0]], made)
            return None
        read = {id(s): s for t in given for s in self.source(t)}
        self.simple(name, list(read.values()), made)

    # ---- our own launches -----------------------------------------------------------------------

    def triton(self, kernel: Any, programs: int, args: tuple, constants: dict, tile: Any) -> None:
        self.work.append(triton_work(kernel, programs, args, constants))
        given = triton_launch.by_name(kernel, args, {}).values()
        self.kept += [t.untyped_storage() for t in given if isinstance(t, Tensor)]

    def cuda(self, name: str, **arguments: Any) -> None:
        if name not in FORMS:
            raise NotImplementedError(f"no closed form of the CUDA kernel {name}")
        launch = Launch(name, 0, arguments)
        FORMS[name](launch)
        self.work.append(launch.work)

    @contextmanager
    def running(self) -> Iterator[Trace]:
        """The host code believes in a GPU of the trace's architecture."""
        saved = triton_launch.launch, gpu_device.architecture, gpu_device.processors
        checks = {n: getattr(validation, n) for n in dir(validation) if n.startswith("check_")}
        # by-name imports of them, too
        doubles = {cuda_launch.launch: self.cuda, cuda_launch.on_host: lambda: False}
        patched = [
            (module, key, value)
            for name, module in list(sys.modules.items())
            if name.startswith("fused_losses.primitives.row_statistics.cuda")
            for key, value in list(vars(module).items())
            if value is cuda_launch.launch or value is cuda_launch.on_host
        ]
        triton_launch.launch = self.triton
        gpu_device.architecture = lambda device: self.arch
        gpu_device.processors = lambda device: self.processors
        for module, key, value in patched:
            setattr(module, key, doubles[value])
        for n in checks:
            setattr(validation, n, lambda *a, **k: None)
        try:
            with self:
                yield self
        finally:
            triton_launch.launch, gpu_device.architecture, gpu_device.processors = saved
            for module, key, value in patched:
                setattr(module, key, value)
            for n, f in checks.items():
                setattr(validation, n, f)


def triton_work(kernel: Any, programs: int, args: tuple, constants: dict) -> Work:
    """The closed form's view of one launch."""
    name = f"{kernel.fn.__module__.split('.')[-2]}.{kernel.fn.__name__}"
    launch = Launch(name, programs, triton_launch.by_name(kernel, args, constants))
    FORMS[name](launch)
    return launch.work


# ---- through L2 ---------------------------------------------------------------------------------


class Cache:
    """The last-used pieces of tensors, so many bytes of them; what DRAM reads and writes."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.held = capacity, 0
        self.pieces: OrderedDict[tuple, list] = OrderedDict()  # -> [bytes, dirty]

    def touch(self, u: Use) -> int:
        """DRAM bytes of one use: what has to be fetched, and what is thrown out changed."""
        traffic = 0
        first = 0 if u.block else u.begin
        key, end = u.storage._cdata, first + u.size
        place = u.begin if u.block else -1
        if u.size > self.capacity / 2:
            traffic += (u.sweeps - 1) * u.size
        for piece in range(first // LINE, cdiv(end, LINE)):
            size = min(end, (piece + 1) * LINE) - max(first, piece * LINE)
            entry = self.pieces.pop((key, place, piece), None)
            if entry is None:
                entry = [0, False]
            missing = max(0, size - entry[0])
            if missing and not u.write:
                traffic += missing
            self.held += missing
            entry[0] += missing
            entry[1] |= u.write
            self.pieces[key, place, piece] = entry
            while self.held > self.capacity:
                _, (old, dirty) = self.pieces.popitem(last=False)
                self.held -= old
                traffic += old if dirty else 0
        return traffic

    def flush(self, outputs: set[int]) -> int:
        """What is still to be written of results; dead scratch is never asked for again."""
        return sum(n for (key, *_), (n, dirty) in self.pieces.items() if dirty and key in outputs)
