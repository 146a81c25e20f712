// The gradient of the distances that are made of products: dx_i = sum_j G_ij (x_i - y_j), where G
// is grad times the slope of the distance (dot: dx_i = sum_j G_ij y_j).
//
// G goes by in blocks that stay in cache, and its products are those of the sweep over pairs:
// dx = x sum G - G y. Where x_i is near y_j that difference would cancel: such pairs are taken out
// of the products and added as they are written.
#pragma once

#include "../pairs/backward.h"
#include "backward.h"

namespace fused_losses::FL_ISA {

template <class PG, class T>
struct ProductsBackwardPlan {
  using WordG = typename PG::Word;
  int64_t tile_rows, block_rows, block_columns, y_words, x_words;
  bool direct, turn, differences;
  WordG *y_rows, *x_turned;
  GradientBlock<PG> g;
  T* near;  // [block rows, block columns]: G of the near pairs of the tiles that have any
  int32_t* near_count;  // [row tile, column tile]
  T* dy_turned;
  T *row_norms, *column_norms;
  T *row_sums, *column_sums;      // of G: [column tile][block rows], [row tile][block columns]
  T *row_totals, *column_totals;  // [n], [block columns]
  T* tiles;                       // a tile of G a thread
  size_t shared_bytes, thread_bytes;

  ProductsBackwardPlan(const DistanceProblem& p, const DistanceBackwardOut& out, Arena& arena)
      : g(prepare(p, out, arena)) {
    const int64_t tiles_down = ceil_div(block_rows, tile_rows);
    const int64_t tiles_across = ceil_div(block_columns, kTileColumns);
    const int64_t some = differences ? 1 : 0;
    y_words = words<PG>(block_columns);
    y_rows = arena.take<WordG>(direct ? y_words * round_up(p.d, kPanel<PG>) : 0);
    x_words = turned_stride(words<PG>(p.n));
    x_turned = arena.take<WordG>(turn ? p.d * x_words : 0);
    dy_turned = arena.take<T>(turn ? p.d * block_columns : 0);
    near = arena.take<T>(some * block_rows * block_columns);
    near_count = arena.take<int32_t>(some * tiles_down * tiles_across);
    row_norms = arena.take<T>(some * p.n);
    column_norms = arena.take<T>(some * (p.m + kTileColumns));
    row_sums = arena.take<T>(some * tiles_across * block_rows);
    column_sums = arena.take<T>(some * tiles_down * block_columns);
    row_totals = arena.take<T>(some * p.n);
    column_totals = arena.take<T>(some * block_columns);
    shared_bytes = arena.used();
    thread_bytes = round_up(tile_rows * kTileColumns * sizeof(T), 64);
    tiles = arena.take<T>(0);
  }

  T* tile(int thread) const { return tiles + thread * (thread_bytes / sizeof(T)); }

 private:
  GradientBlock<PG> prepare(const DistanceProblem& p, const DistanceBackwardOut& out,
                            Arena& arena) {
    direct = out.dx;
    turn = out.dy;
    differences = p.kind != Distance::kDot;
    tile_rows = pair_tile_rows(p.d);
    block_rows = even_blocks(p.n, kBackwardRows / tile_rows * tile_rows, tile_rows);
    block_columns = even_blocks(p.m, kBlockColumns, kTileColumns);
    return GradientBlock<PG>(arena, block_rows, block_columns);
  }
};

template <class PG, class T>
size_t products_backward_bytes(const DistanceProblem& p, const DistanceBackwardOut& out,
                               int threads) {
  Arena arena(nullptr);
  const ProductsBackwardPlan<PG, T> plan(p, out, arena);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

// As bfloat16 has it, where products are of pairs: sums of G must be of what is multiplied.
template <class PG, class T>
inline Vector<T> as_multiplied(Vector<T> g) {
  if constexpr (PG::kPair == 2) {
    const auto bits = (Vector<uint32_t>)g;
    const auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
    return g != g ? g : (Vector<T>)rounded;
  }
  return g;
}

// A tile of G with zeros for near pairs, and their number; `near` gets G of those alone.
template <class PG, class T>
struct GradientTile {
  const DistanceProblem& p;
  const DistanceBackwardIn& in;
  const T *row_norms, *column_norms;

  Vector<T> slope(int64_t i, int64_t j, int64_t real, Lanes* near) const {
    const Vector<T> zero = {}, grad = grad_part<T>(in, i, j, real);
    if (p.kind == Distance::kDot) return as_multiplied<PG, T>(grad);
    const Vector<T> out = load_part(static_cast<const T*>(in.out) + i * p.between() + j, real);
    const bool rooted = p.kind == Distance::kEuclidean;
    const Vector<T> g = distance_rules::difference_factor<DistanceMath<T>>(grad, out, rooted);
    const Vector<T> size = load(column_norms + j) + row_norms[i];
    const Vector<T> apart = rooted ? out * out : out;
    *near = below(apart, size * kNear<T>) & ~below(magnitude<T>(g), zero + least());
    return g;
  }

  // Returns how many pairs are near, and fills near [rows, ld_near] if there are any.
  int32_t fill(int64_t i0, int64_t rows, int64_t j0, int64_t columns, T* g, int64_t ld, T* near,
               int64_t ld_near, T* row_sums, T* column_sums) const {
    constexpr int64_t kStep = kLanes<T>;
    alignas(64) T below_columns[kTileColumns] = {};
    int32_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      Vector<T> total = {};
      for (int64_t c = 0; c < columns; c += kStep) {
        Lanes lanes = 0;
        Vector<T> v = slope(i0 + r, j0 + c, columns - c, &lanes);
        if (lanes) [[unlikely]] {
          count += __builtin_popcount(lanes);
          for (; lanes; lanes &= lanes - 1) v[__builtin_ctz(lanes)] = 0;
        }
        if constexpr (PG::kPair == 2) v = as_multiplied<PG, T>(v);
        store(g + r * ld + c, v);
        total += v;
        store(below_columns + c, load(below_columns + c) + v);
      }
      if (row_sums) row_sums[r] = sum<T>(total);
    }
    if (column_sums) std::copy(below_columns, below_columns + columns, column_sums);
    if (count == 0) return 0;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; c += kStep) {
        Lanes lanes = 0;
        const Vector<T> v = slope(i0 + r, j0 + c, columns - c, &lanes);
        Vector<T> only = {};
        for (; lanes; lanes &= lanes - 1) only[__builtin_ctz(lanes)] = v[__builtin_ctz(lanes)];
        store_part(near + r * ld_near + c, only, columns - c);
      }
    }
    return count;
  }

 private:
  static T least() { return std::numeric_limits<T>::denorm_min(); }
};

// sums[r] += or -= near differences of own rows and others; factors as in add_tile.
template <class T, bool kTurned>
void add_near(const T* own, int64_t rows, const T* other, int64_t others, int64_t d,
              const Factors<T>& f, bool dense, T* sums) {
  const distance_rules::DifferenceTerm<DistanceMath<T>, kTurned> term;
  const int64_t even = dense ? rows / kOwnRows * kOwnRows : 0;
  if (even) add_tile(term, own, even, other, static_cast<const T*>(nullptr), others, d, d, f, sums);
  for (int64_t r = even; r < rows; ++r) {
    for (int64_t s = 0; s < others; ++s) {
      const T g = f.first[r * f.own + s * f.other];
      if (g == 0) continue;
      const T *mine = own + r * d, *theirs = other + s * d;
      T* to = sums + r * d;
      for (int64_t k = 0; k < d; ++k) {
        to[k] += g * (kTurned ? theirs[k] - mine[k] : mine[k] - theirs[k]);
      }
    }
  }
}

template <class PG, class T>
void products_backward(const DistanceProblem& p, const DistanceBackwardIn& in,
                       const DistanceBackwardOut& out, void* buffer, const Parallel& parallel) {
  constexpr int64_t kWide = kPanel<PG>;
  Arena arena(buffer);
  ProductsBackwardPlan<PG, T> plan(p, out, arena);
  const int64_t n = p.n, m = p.m, d = p.d;
  const bool differences = plan.differences;
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  T* dx = static_cast<T*>(out.dx);
  T* dy = static_cast<T*>(out.dy);
  on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
    const int64_t i = task * 64, rows = std::min<int64_t>(64, n - i);
    if (dx) std::fill(dx + i * d, dx + (i + rows) * d, T(0));
    if (dy) turn_rows<PG>(x + i * d, rows, d, plan.x_turned + i / PG::kPair, plan.x_words);
    for (int64_t r = i; r < i + rows && differences; ++r) {
      plan.row_norms[r] = squared_norm<Plain<T>, T>(x + r * d, d);
      plan.row_totals[r] = 0;
    }
  });
  if (differences) std::fill(plan.column_norms + m, plan.column_norms + m + kTileColumns, T(0));
  on_tasks(parallel, ceil_div(m, 64), [&](int, int64_t task) {
    const int64_t j = task * 64, rows = std::min<int64_t>(64, m - j);
    if (dy) std::fill(dy + j * d, dy + (j + rows) * d, T(0));
    for (int64_t r = j; r < j + rows && differences; ++r) {
      plan.column_norms[r] = squared_norm<Plain<T>, T>(y + r * d, d);
    }
  });
  const GradientTile<PG, T> tile = {p, in, plan.row_norms, plan.column_norms};
  const int64_t strip = std::max<int64_t>(PG::kAtOnce, std::min<int64_t>(192, d));
  const int64_t ld_near = plan.block_columns;
  for (int64_t j0 = 0; j0 < m; j0 += plan.block_columns) {
    const int64_t width = std::min(plan.block_columns, m - j0);
    const int64_t column_tiles = ceil_div(width, kTileColumns), all = ceil_div(width, kWide);
    on_tasks(parallel, dx ? ceil_div(d, kWide) : 0, [&](int, int64_t k) {
      pack_right<PG>(y + j0 * d, width, d, k, plan.y_words, plan.y_rows);
    });
    on_tasks(parallel, dy ? d : 0, [&](int, int64_t e) {
      std::fill_n(plan.dy_turned + e * plan.block_columns, plan.block_columns, T(0));
    });
    if (differences) std::fill_n(plan.column_totals, plan.block_columns, T(0));
    for (int64_t i0 = 0; i0 < n; i0 += plan.block_rows) {
      const int64_t tall = std::min(plan.block_rows, n - i0);
      const int64_t row_tiles = ceil_div(tall, plan.tile_rows);
      on_tasks(parallel, row_tiles * column_tiles, [&](int thread, int64_t task) {
        const int64_t bi = task / column_tiles, bj = task % column_tiles;
        const int64_t i = bi * plan.tile_rows, j = bj * kTileColumns;
        const int64_t rows = std::min(plan.tile_rows, tall - i);
        const int64_t columns = std::min(kTileColumns, width - j);
        T* g = plan.tile(thread);
        T* row_sums = differences ? plan.row_sums + bj * plan.block_rows + i : nullptr;
        T* column_sums = differences ? plan.column_sums + bi * plan.block_columns + j : nullptr;
        const int32_t count =
            tile.fill(i0 + i, rows, j0 + j, columns, g, kTileColumns, plan.near + i * ld_near + j,
                      ld_near, row_sums, column_sums);
        if (differences) plan.near_count[task] = count;
        plan.g.put(g, kTileColumns, i, j, rows, columns);
      });
      on_tasks(parallel, dx ? row_tiles : 0, [&](int, int64_t bi) {
        const int64_t i = bi * plan.tile_rows, rows = std::min(plan.tile_rows, tall - i);
        T* to = dx + (i0 + i) * d;
        add_rows<PG>(plan.g, i, rows, 0, all, plan.y_rows, plan.y_words, d, to, {});
        for (int64_t bj = 0; differences && bj < column_tiles; ++bj) {
          const int64_t j = bj * kTileColumns, columns = std::min(kTileColumns, width - j);
          for (int64_t r = 0; r < rows; ++r) {
            plan.row_totals[i0 + i + r] += plan.row_sums[bj * plan.block_rows + i + r];
          }
          const int64_t count = plan.near_count[bi * column_tiles + bj];
          if (count == 0) continue;
          // dx still has the products' sign
          const Factors<T> f = {plan.near + i * ld_near + j, nullptr, ld_near, 1};
          add_near<T, true>(x + (i0 + i) * d, rows, y + (j0 + j) * d, columns, d, f,
                            count > rows * columns / 16, to);
        }
      });
      if (dy) {
        constexpr int64_t kGroup = 3;
        const int64_t strips = ceil_div(d, strip), groups = ceil_div(all, kGroup);
        on_tasks(parallel, strips * groups, [&](int, int64_t task) {
          const int64_t e = task / groups * strip, first = task % groups * kGroup;
          add_columns<PG>(plan.g, tall, first, std::min(first + kGroup, all),
                          plan.x_turned + i0 / PG::kPair, plan.x_words, e, std::min(strip, d - e),
                          plan.dy_turned, plan.block_columns, {});
        });
      }
      on_tasks(parallel, dy && differences ? column_tiles : 0, [&](int, int64_t bj) {
        const int64_t j = bj * kTileColumns, columns = std::min(kTileColumns, width - j);
        for (int64_t bi = 0; bi < row_tiles; ++bi) {
          const int64_t i = bi * plan.tile_rows, rows = std::min(plan.tile_rows, tall - i);
          for (int64_t c = 0; c < columns; ++c) {
            plan.column_totals[j + c] += plan.column_sums[bi * plan.block_columns + j + c];
          }
          const int64_t count = plan.near_count[bi * column_tiles + bj];
          if (count == 0) continue;
          const Factors<T> f = {plan.near + i * ld_near + j, nullptr, 1, ld_near};
          add_near<T, false>(y + (j0 + j) * d, columns, x + (i0 + i) * d, rows, d, f,
                             count > rows * columns / 16, dy + (j0 + j) * d);
        }
      });
    }
    on_tasks(parallel, dy ? ceil_div(width, 64) : 0, [&](int, int64_t task) {
      const int64_t end = std::min(width, task * 64 + 64);
      for (int64_t e0 = 0; e0 < d; e0 += 16) {
        for (int64_t j = task * 64; j < end; ++j) {
          const int64_t at = (j0 + j) * d;
          for (int64_t e = e0; e < std::min(e0 + 16, d); ++e) {
            const T product = plan.dy_turned[e * plan.block_columns + j];
            if (differences) {
              dy[at + e] += y[at + e] * plan.column_totals[j] - product;
            } else {
              dy[at + e] = product;
            }
          }
        }
      }
    });
  }
  on_tasks(parallel, dx && differences ? ceil_div(n, 64) : 0, [&](int, int64_t task) {
    for (int64_t i = task * 64; i < std::min(n, task * 64 + 64); ++i) {
      for (int64_t k = 0; k < d; ++k) {
        dx[i * d + k] = x[i * d + k] * plan.row_totals[i] - dx[i * d + k];
      }
    }
  });
}

}  // namespace fused_losses::FL_ISA
