"""Closed forms of the CUDA kernels, by the name that is launched.

What lanes of a warp load alike counts once a warp. The host build counts it once a lane, so that
its counts lie above: test_roofline.py says by how much.
"""

from __future__ import annotations

from fused_losses.backends.gpu.device import ceil_div
from fused_losses.bench.roofline.work import Launch, form

WARP = 32


@form("gather")
def gather(s: Launch) -> None:
    s.read("rows", s.count * s.d, 0, s.count * s.stride)
    s.read("classes", s.count)
    s.write("out", s.count * s.d)
    s.write("inverse", s.count)
    s.work.scalar = 2 * s.count * s.d


def _score_columns(s: Launch, times: int) -> None:
    for name in ("inverse", "bias", "column_weight"):
        s.read(name, s.length * times, 0, s.length)


def _tile(s: Launch, times: int = 1, write: bool = False) -> None:
    pairs = s.rows * s.length
    s.read("products", pairs * times, 0, (s.rows - 1) * s.stride + s.length)
    if write:
        # a 16-bit G takes the first half of its row
        t = s.products
        size = (2 if s.out_type else 4) * pairs // t.element_size()
        s.write("products", size, 0, (s.rows - 1) * s.stride + s.length)


@form("row_scores")
def row_scores(s: Launch) -> None:
    _tile(s)
    _score_columns(s, s.rows)
    s.read("positions", s.rows * s.parts)
    s.read("bend", 4 * s.rows * s.parts, 0, 4 * s.rows)
    state = s.rows * s.parts
    for name in ("high", "mass", "best", "moment"):
        if s.first:
            s.read(name, 0 if name == "best" else state)
        s.write(name, state)
    s.work.scalar = 6 * s.rows * s.length


@form("row_finish")
def row_finish(s: Launch) -> None:
    for name in ("high", "mass", "best", "moment"):
        s.read(name, s.n * s.parts)
    s.read("positions", s.n)
    s.read("x", s.n * s.d)
    s.read("weight", s.n * s.d, 0, s.n * s.d)
    for name in ("lse", "target", "weighted", "hardest", "hardest_score"):
        s.write(name, s.n)


@form("row_gradient")
def row_gradient(s: Launch) -> None:
    times = 2 if s.has("sums") else 1
    _tile(s, times, write=True)
    _score_columns(s, s.rows * times)
    s.read("inverse", s.rows * s.length)
    warps = min(8, ceil_div(s.length, WARP * (8 if s.out_type else 4)))
    for name in ("positions", "lse", "grad_lse", "grad_target", "grad_weighted"):
        s.read(name, s.rows * warps, 0, s.rows)
    s.read("bend", 4 * s.rows * warps, 0, 4 * s.rows)
    s.write("sums", ceil_div(s.rows, s.rows_a_sum) * s.length)
    s.work.scalar = 6 * times * s.rows * s.length


@form("row_weight")
def row_weight(s: Launch) -> None:
    times = 2 if s.has("inverse") else 1
    s.read("classes", s.count)
    s.read("sums", s.runs * s.count)
    s.write("dbias", s.count)
    if s.has("gradient"):
        s.read("gradient", times * s.count * s.d, 0, s.count * s.d)
        if s.has("inverse"):
            size = s.count * s.stride_w
            s.read("weight", times * s.count * s.d, s.first * s.stride_w, size)
            s.read("inverse", s.count)
        s.write("dweight", s.count * s.d, s.first * s.stride_dw, s.count * s.stride_dw)
    s.work.scalar = 5 * s.count * s.d


# ---- pairs --------------------------------------------------------------------------------------

SEGMENT = 128  # rows of a block that goes down columns
ACROSS = 128  # columns of a warp
SORTS = 2  # of pairs: positives and negatives


def _block(s: Launch) -> tuple[int, int]:
    return s.row_end - s.first_row, s.column_end - s.first_column


def _pair_tile(s: Launch, times: int, name: str = "tile") -> None:
    high, wide = _block(s)
    stride = s.values[name].stride(0)
    s.read(name, high * wide * times, 0, (high - 1) * stride + wide)


def _written(s: Launch, name: str) -> None:
    high, wide = _block(s)
    if s.has(name):
        s.write(name, high * wide, 0, (high - 1) * s.values[name].stride(0) + wide)


def _vectors(s: Launch, rows: int, columns: int) -> None:
    """Vectors of rows so many times in all, and of columns."""
    for of in ("bias", "labels", "ids", "groups"):
        s.read(f"x_{of}", rows)
        s.read(f"y_{of}", columns)


@form("pair_exclude")
def pair_exclude(s: Launch) -> None:
    high = s.row_end - s.first_row
    s.read("exclude", high * s.excluded)


@form("pair_statistics")
def pair_statistics(s: Launch) -> None:
    high, wide = _block(s)
    both = s.has("columns")
    _pair_tile(s, 2 if both else 1)
    # two rows at a time; down the columns a thread keeps its own
    segments = ceil_div(high, SEGMENT)
    warps = ceil_div(wide, ACROSS)
    _vectors(s, high + both * high * warps, ceil_div(high, 2) * wide + both * 4 * segments * wide)
    state = 4 * SORTS * high
    s.read("rows", state, 0, state)
    s.write("rows", state, 0, state)
    if both:
        parts = segments * 4 * SORTS * wide
        s.write("parts", parts, 0, parts)
        s.read("parts", parts, 0, parts)
        s.read("columns", 4 * SORTS * wide * segments, 0, 4 * SORTS * wide)
        s.write("columns", 4 * SORTS * wide * segments, 0, 4 * SORTS * wide)
    s.work.scalar = 10 * (1 + both) * high * wide


@form("pair_gradients")
def pair_gradients(s: Launch) -> None:
    high, wide = _block(s)
    segments, warps = ceil_div(high, SEGMENT), ceil_div(wide, ACROSS)
    kinds = SORTS if s.has("x_labels") else 1
    _pair_tile(s, 1)
    _vectors(s, high * warps, 4 * segments * wide)
    s.read("row_vectors", kinds * 4 * high * warps, 0, kinds * 4 * high)
    s.read("column_vectors", kinds * 16 * segments * wide, 0, kinds * 4 * wide)
    _written(s, "ds")
    s.work.scalar = 12 * kinds * high * wide


@form("pair_attention")
def pair_attention(s: Launch) -> None:
    high, wide = _block(s)
    # the maximum first, the weights after it
    _pair_tile(s, 2)
    _vectors(s, high, 2 * high * wide)
    s.read("out", high * s.width, 0, high * s.width)
    s.write("out", high * s.width, 0, high * s.width)
    for name in ("best", "mass"):
        s.read(name, high)
        s.write(name, high)
    _written(s, "weights")
    s.work.scalar = 12 * high * wide


@form("pair_attention_gradients")
def pair_attention_gradients(s: Launch) -> None:
    high, wide = _block(s)
    segments, warps = ceil_div(high, SEGMENT), ceil_div(wide, ACROSS)
    _pair_tile(s, 1)
    _vectors(s, high * warps, 4 * segments * wide)
    s.read("base", 2 * high * warps)
    s.read("shift", high * warps)
    if s.has("into"):
        _pair_tile(s, 1, "into")
    for name in ("weights", "ds"):
        _written(s, name)
    s.work.scalar = 10 * high * wide


@form("pair_split")
def pair_split(s: Launch) -> None:
    across, down = ceil_div(s.m, TILE), ceil_div(s.n, TILE)
    for name in ("g", "squares"):
        s.read(name, s.n * s.m, 0, (s.n - 1) * s.stride + s.m)
    s.read("x_norms", s.n * across, 0, s.n)
    s.read("y_norms", s.m * down * TILE // 4, 0, s.m)
    s.write("far", s.n * s.m, 0, (s.n - 1) * s.far_stride + s.m)
    for name in ("row_sums", "moments"):
        s.write(name, s.n * across)
    s.write("column_sums", s.m * down)
    s.write("near", down * across)
    s.work.scalar = 8 * s.n * s.m


# ---- the others ---------------------------------------------------------------------------------


@form("topk_bank")
def topk_bank(s: Launch) -> None:
    s.read("y", s.rows * s.d, 0, s.rows * s.stride)
    s.read("scale", s.rows)
    for name in ("multiplier", "offset", "squares"):
        s.write(name, s.rows, 0, s.rows)
    s.work.scalar = 2 * s.rows * s.d


@form("topk_screen")
def topk_screen(s: Launch) -> None:
    """Where few columns join a list: each is read once."""
    pairs = s.rows * s.columns
    s.read("product", pairs, 0, (s.rows - 1) * s.stride + s.columns)
    for name in ("multiplier", "offset"):
        s.read(name, pairs, 0, s.columns)
    if s.has("keys"):
        s.write("keys", pairs, 0, (s.rows - 1) * s.stride + s.columns)
    else:
        lists = s.rows * s.parts * s.keep
        s.read("best", lists, 0, lists)
        s.write("best", lists, 0, lists)
    s.work.scalar = 4 * pairs


TILE = 64  # rows of either side of a tile of distances


@form("distance_sums")
def distance_sums(s: Launch) -> None:
    tiles = ceil_div(s.n, TILE) * ceil_div(s.m, TILE)
    s.read("x", tiles * TILE * s.d, 0, s.n * s.x.stride(0))
    s.read("y", tiles * TILE * s.d, 0, s.m * s.y.stride(0))
    s.write("out", s.n * s.m)
    s.work.scalar = 3 * s.n * s.m * s.d


def _update(s: Launch, states: tuple[str, ...], scalar: int) -> None:
    count, d = s.grad.shape
    for name in ("weight", *states):
        if s.has(name):
            s.read(name, count * d, 0, count * d)
            s.write(name, count * d, 0, count * d)
    s.read("grad", count * d)
    s.read("rows", count)
    s.work.scalar = scalar * count * d


@form("sgd_rows")
def sgd_rows(s: Launch) -> None:
    _update(s, ("buffer",), 6)


@form("adamw_rows")
def adamw_rows(s: Launch) -> None:
    _update(s, ("first", "second"), 14)


@form("distance_norms")
def distance_norms(s: Launch) -> None:
    s.read("rows", s.n * s.d, 0, s.n * s.stride)
    s.write("norms", s.n)


def _block_of(s: Launch, name: str, times: int = 1, write: bool = False) -> None:
    """[n, m] of a matrix, by its strides."""
    t = s.values.get(name)
    if t is None:
        return
    (s.write if write else s.read)(name, times * s.n * s.m)


@form("distance_products")
def distance_products(s: Launch) -> None:
    """Where no pair is near."""
    tiles = ceil_div(s.n, TILE) * ceil_div(s.m, TILE)
    s.read("x_norms", 16 * s.n * ceil_div(s.m, TILE) // 16, 0, s.n)
    s.read("y_norms", tiles * TILE * TILE // 4, 0, s.m)
    _block_of(s, "out")
    _block_of(s, "out", write=True)
    s.work.scalar = 5 * s.n * s.m


@form("distance_factors")
def distance_factors(s: Launch) -> None:
    _block_of(s, "grad")
    _block_of(s, "out")
    _block_of(s, "g", write=True)
    tiles = ceil_div(s.n, TILE) * ceil_div(s.m, TILE)
    s.write("row_sums", tiles * TILE)
    s.write("column_sums", tiles * TILE)
    s.write("near", tiles)
    s.work.scalar = 6 * s.n * s.m


@form("distance_gradient")
def distance_gradient(s: Launch) -> None:
    """A block owns 64 rows by 64 coordinates; of near terms, where no pair is near."""
    rows, depth, splits = ceil_div(s.n, TILE), ceil_div(s.d, TILE), ceil_div(s.m, s.span)
    if s.has("near"):
        s.read("near", rows * depth * ceil_div(s.m, TILE), 0, rows * ceil_div(s.m, TILE))
        if not s.has("totals"):
            return
        s.read("totals", s.n * depth)
        s.read("own", s.n * s.d, 0, s.n * s.own_stride)
        s.read("to", s.n * s.d)
        s.write("to", s.n * s.d)
        return
    s.read("own", splits * s.n * s.d, 0, s.n * s.own_stride)
    s.read("other", rows * s.m * s.d, 0, s.m * s.other_stride)
    for name in ("grad", "out", "pairs"):
        _block_of(s, name, depth)
    s.write("to", splits * s.n * s.d)
    s.work.scalar = 4 * s.n * s.m * s.d


@form("maxsim_maxima")
def maxsim_maxima(s: Launch) -> None:
    """Documents of some tokens each: their maxima are few."""
    high, wide = _block(s)
    _pair_tile(s, 1)
    documents = ceil_div(s.documents * wide, max(s.column_end, 1))
    s.write("index", high * documents, 0, high * documents)
    s.read("open_best", high)
    s.write("open_best", high)
    s.work.scalar = 2 * high * wide


@form("maxsim_query_gradients")
def maxsim_query_gradients(s: Launch) -> None:
    """Where every token has chosen."""
    chosen = s.query_tokens * s.documents
    for name in ("index", "owners", "grad", "offsets"):
        s.read(name, chosen if name in ("index", "grad") else s.query_tokens)
    s.read("tokens", chosen * s.d)
    s.write("out", s.query_tokens * s.d)
    s.work.scalar = 2 * chosen * s.d


@form("maxsim_document_gradients")
def maxsim_document_gradients(s: Launch) -> None:
    """A tile of document tokens reads all choices, and the rows that chose it."""
    chosen = s.query_tokens * s.documents
    tiles = s.out.shape[0] // 32
    each = ceil_div(tiles, s.documents)
    s.read("index", chosen * each)
    s.read("grad", chosen * each)
    s.read("owners", s.query_tokens * tiles)
    s.read("tokens", chosen * s.d)
    s.write("out", s.out.shape[0] * s.d)
    s.work.scalar = 2 * chosen * s.d
