// Blocks of G = dL/du of pairs, and the two products of each: what every backward shares.
#pragma once

#include "statistics.h"

namespace fused_losses::FL_ISA {

// What a backward holds besides its tiles' own vectors; attention adds values and weights.
template <class PS, class PG, class T>
struct PairBackwardPlan {
  static_assert(kPanel<PS> == kPanel<PG>);  // tiles are those of the forward
  using WordS = typename PS::Word;
  using WordG = typename PG::Word;
  int64_t tile_rows, tile_columns, block_rows, block_columns, depth, y_words, x_words, wide;
  int64_t work;  // products of a sweep
  bool sums;     // row and column sums of G are wanted
  WordS *left, *panels;
  WordG *y_rows, *x_turned;
  GradientBlock<PG> g;
  T *dy_turned, *dx;
  T* held;                    // a block of y, unless it lies in T
  T *row_sums, *column_sums;  // [column tile][block rows], [row tile][block columns]
  T* vectors;                 // what the tile's functor prepared, [vector_count]
  NearPairs<T> near;
  KeptTiles<T> kept;
  bool apart;
  size_t shared_bytes, thread_bytes;
  char* buffer;

  struct Thread {
    T *products, *terms, *slope, *gradient;
    Code<T>* codes;
    T *row_factor, *column_factor;
    T* scores;  // what the terms are made of: the products, apart v
    uint16_t* near;
    int64_t near_count = 0;
    SplitRoom split;
    Thread(Arena& arena, int64_t tile_rows, int64_t tile_columns, int64_t work, bool apart)
        : products(arena.take<T>(tile_rows * tile_columns)),
          terms(arena.take<T>(tile_rows * tile_columns)),
          slope(arena.take<T>(tile_rows * tile_columns)),
          gradient(arena.take<T>(tile_rows * tile_columns)),
          codes(arena.take<Code<T>>(tile_rows * tile_columns)),
          row_factor(arena.take<T>(tile_rows + 64)),
          column_factor(arena.take<T>(kTileColumns + 64)),
          scores(apart ? arena.take<T>(tile_rows * tile_columns) : products),
          near(arena.take<uint16_t>(apart ? tile_rows * tile_columns : 0)),
          split(split_room<PS>(arena, tile_rows, work)) {}
  };

  PairBackwardPlan(const PairProblem& p, const PairBackwardOut& out, int64_t vector_count,
                   Arena& arena)
      : g(prepare(p, arena)), near(p, tile_rows, block_rows, block_columns, arena), apart(p.apart) {
    const int64_t n = p.rows.count;
    sums = out.dx_bias || out.dy_bias || p.apart;
    left = arena.take<WordS>(PS::kPair == 2 ? n * depth : 0);
    panels = arena.take<WordS>(block_columns * depth);
    wide = round_up(p.d, kPanel<PG>);
    y_words = words<PG>(block_columns);
    y_rows = arena.take<WordG>(y_words * wide);
    x_words = turned_stride(words<PG>(n));
    const bool turn = out.dy || p.triangle;
    x_turned = arena.take<WordG>(turn ? p.d * x_words : 0);
    dy_turned = arena.take<T>(turn ? p.d * block_columns : 0);
    // dscale is read off dx, so there is always one
    dx = arena.take<T>(out.dx ? 0 : n * p.d);
    row_sums = arena.take<T>(sums ? ceil_div(block_columns, kTileColumns) * block_rows : 0);
    column_sums = arena.take<T>(sums ? ceil_div(block_rows, tile_rows) * block_columns : 0);
    held = arena.take<T>(p.stored == Stored::kWide ? 0 : block_columns * p.d);
    vectors = arena.take<T>(vector_count);
    kept = KeptTiles<T>(p, tile_rows, block_columns, kPanel<PS>, arena);
    shared_bytes = arena.used();
    Arena scratch(nullptr);
    Thread thread(scratch, tile_rows, tile_columns, work, apart);
    thread_bytes = scratch.used();
  }

  Thread thread(int index) const {
    Arena arena(buffer + shared_bytes + index * thread_bytes);
    return Thread(arena, tile_rows, tile_columns, work, apart);
  }

 private:
  GradientBlock<PG> prepare(const PairProblem& p, Arena& arena) {
    buffer = static_cast<char*>(arena.base());
    tile_rows = pair_tile_rows(p.rows.count, p.d);
    tile_columns = pair_tile_columns<PS>(p.columns.count);
    depth = words<PS>(p.d);
    work = work_of(p);
    block_rows = even_blocks(p.rows.count, kBackwardRows / tile_rows * tile_rows, tile_rows);
    block_columns = even_blocks(p.columns.count, kBlockColumns, kPanel<PG>);
    return GradientBlock<PG>(arena, block_rows, block_columns);
  }
};

constexpr int64_t kPart = 16;  // of a row that is written at once

// y of a block as the right operand of G y, a task a panel of columns of d.
template <class PG, class T>
inline void pack_right(const T* y, int64_t rows, int64_t d, int64_t panel, int64_t y_words,
                       typename PG::Word* out) {
  constexpr int64_t kWide = kPanel<PG>;
  const int64_t first = panel * kWide, wide = std::min(kWide, d - first);
  const auto row = [&](int64_t k) { return y + k * d + first; };
  typename PG::Word* to = out + panel * y_words * kWide;
  pack_rows<PG, T>(row, rows, wide, y_words * kWide, to);
  // past the last row G is zero, but 0 * NaN is not
  std::fill(to + words<PG>(rows) * kWide, to + y_words * kWide, 0);
}

// Row sums of a tile of G into rows[i], column sums into columns[j].
template <class T>
inline void tile_sums(const T* g, int64_t ld, int64_t rows, int64_t columns, T* row_sums,
                      T* column_sums) {
  std::fill(column_sums, column_sums + columns, T(0));
  for (int64_t i = 0; i < rows; ++i) {
    T total = 0;
    for (int64_t j = 0; j < columns; ++j) {
      total += g[i * ld + j];
      column_sums[j] += g[i * ld + j];
    }
    row_sums[i] = total;
  }
}

// The blocks of a backward: gradient(thread scratch, tile, ld, row in block, column in block)
// leaves dL/du of a tile in th.gradient (or finds that the tile has none, and sets skip);
// `begin_columns` and `end_block` see each block of columns and each block.
template <class PS, class PG, class T, class Gradient, class Begin, class Block, class End>
void sweep_backward(const PairProblem& p, PairBackwardPlan<PS, PG, T>& plan,
                    const PairBackwardOut& out, const Parallel& parallel, Gradient&& gradient,
                    Begin&& begin_columns, Block&& end_block, End&& end_columns) {
  using WordS = typename PS::Word;
  const int64_t n = p.rows.count, m = p.columns.count, d = p.d;
  const T* x = static_cast<const T*>(p.rows.data);
  T* dx = out.dx ? static_cast<T*>(out.dx) : plan.dx;
  T* dx_bias = p.apart ? plan.near.dx_bias : static_cast<T*>(out.dx_bias);
  T* dy_bias = p.apart ? plan.near.dy_bias : static_cast<T*>(out.dy_bias);
  if (p.triangle) dy_bias = dx_bias;
  double apart_scale = 0;
  const bool turn = out.dy || p.triangle;
  const bool direct = out.dx || out.dscale || dx_bias;
  const WordS* left = plan.left;
  if constexpr (PS::kPair != 2) left = x;
  std::fill(dx_bias, dx_bias + (dx_bias ? n : 0), T(0));
  if (!p.triangle) std::fill(dy_bias, dy_bias + (dy_bias ? m : 0), T(0));
  on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
    const int64_t i = task * 64, rows = std::min<int64_t>(64, n - i);
    std::fill(dx + i * d, dx + (i + rows) * d, T(0));
    if constexpr (PS::kPair == 2) narrow_rows<PS>(x + i * d, rows, d, plan.left + i * plan.depth);
    if (turn) turn_rows<PG>(x + i * d, rows, d, plan.x_turned + i / PG::kPair, plan.x_words);
  });
  const int64_t strip = std::max<int64_t>(PG::kAtOnce, std::min<int64_t>(192, d));
  const bool kept = plan.kept.all(n);  // no score is a product of the panels then
  for (int64_t j0 = 0; j0 < m; j0 += plan.block_columns) {
    const int64_t width = std::min(plan.block_columns, m - j0);
    const int64_t panels = kept ? 0 : ceil_div(width, kPanel<PS>), right = ceil_div(d, kPanel<PG>);
    const T* y = block_of(p.stored, p.columns.data, j0, width, d, plan.held, parallel);
    on_tasks(parallel, panels + right, [&](int, int64_t k) {
      if (k < panels) {
        const int64_t j = k * kPanel<PS>;
        pack_panel<PS>(y + j * d, width - j, d, plan.panels + j * plan.depth);
        return;
      }
      pack_right<PG>(y, width, d, k - panels, plan.y_words, plan.y_rows);
    });
    if (turn) {
      on_tasks(parallel, d, [&](int, int64_t e) {
        std::fill_n(plan.dy_turned + e * plan.block_columns, plan.block_columns, T(0));
        if (!p.apart) return;
        std::fill_n(plan.near.of_columns + e * plan.block_columns, plan.block_columns, T(0));
      });
    }
    begin_columns(j0, width);
    const int64_t column_tiles = ceil_div(width, kTileColumns);
    for (int64_t i0 = 0; i0 < n && !(p.triangle && i0 >= j0 + width); i0 += plan.block_rows) {
      const int64_t tall = std::min(plan.block_rows, n - i0);
      const int64_t row_tiles = ceil_div(tall, plan.tile_rows);
      on_tasks(parallel, row_tiles * column_tiles, [&](int thread, int64_t task) {
        auto th = plan.thread(thread);
        const int64_t bi = task / column_tiles, bj = task % column_tiles;
        const int64_t i = bi * plan.tile_rows, j = bj * kTileColumns;
        PairTile t(p, i0 + i, std::min(plan.tile_rows, tall - i), j0 + j,
                   std::min(kTileColumns, width - j), kPanel<PS>);
        T* row_sums = plan.row_sums + bj * plan.block_rows + i;
        T* column_sums = plan.column_sums + bi * plan.block_columns + j;
        const int64_t ld = round_up(t.columns, kPanel<PS>);
        if (!t.skip) {
          if (T* own = plan.kept.tile(t)) {
            th.products = own;
            if (!p.apart) th.scores = own;
          } else {
            multiply_tile<PS>(left + (i0 + i) * plan.depth, t.rows, plan.depth,
                              plan.panels + j * plan.depth, ld, th.products, ld, th.split);
          }
          if (p.apart) {
            th.near_count = mend_tile<T>(p, t, y + j * d, th.products, ld, th.scores, th.near);
          }
        }
        gradient(th, t, ld, i, j);
        if (t.skip) {
          plan.g.put_zero(i, j, t.rows, t.columns);
          std::fill(row_sums, row_sums + (plan.sums ? t.rows : 0), T(0));
          std::fill(column_sums, column_sums + (plan.sums ? t.columns : 0), T(0));
          if (p.apart) plan.near.parts[task] = plan.near.present[task] = 0;
          return;
        }
        if (p.apart) {
          plan.near.split(t, th.scores, ld, th.near, th.near_count, task, i, j, th.gradient);
        }
        plan.g.put(th.gradient, ld, i, j, t.rows, t.columns);
        if (plan.sums) tile_sums(th.gradient, ld, t.rows, t.columns, row_sums, column_sums);
      });
      const int64_t all = ceil_div(width, kPanel<PG>);
      on_tasks(parallel, direct ? row_tiles : 0, [&](int thread, int64_t bi) {
        const int64_t i = bi * plan.tile_rows, rows = std::min(plan.tile_rows, tall - i);
        // with a triangle the panels left of the strip hold nothing
        const int64_t before = p.triangle ? std::max<int64_t>(0, i0 + i - j0) / kPanel<PG> : 0;
        add_rows<PG>(plan.g, i, rows, before, all, plan.y_rows, plan.y_words, d, dx + (i0 + i) * d,
                     plan.thread(thread).split);
        for (int64_t bj = 0; dx_bias && bj < column_tiles; ++bj) {
          for (int64_t r = 0; r < rows; ++r) {
            dx_bias[i0 + i + r] += plan.row_sums[bj * plan.block_rows + i + r];
          }
        }
        for (int64_t bj = 0; p.apart && bj < column_tiles; ++bj) {
          if (!plan.near.present[bi * column_tiles + bj]) continue;
          const int64_t j = bj * kTileColumns;
          plan.near.add_rows(i, rows, j, std::min(kTileColumns, width - j), x + (i0 + i) * d,
                             y + j * d, d, dx + (i0 + i) * d);
        }
      });
      if (turn) {
        constexpr int64_t kGroup = kSplits<PG> ? 8 : 3;  // panels that a split strip meets
        const int64_t strips = ceil_div(d, strip), groups = ceil_div(all, kGroup);
        on_tasks(parallel, strips * groups, [&](int thread, int64_t task) {
          const int64_t e = task / groups * strip, first = task % groups * kGroup;
          const int64_t last = std::min(first + kGroup, all);
          // with a triangle the rows below the group's last column hold nothing
          const int64_t end = std::max<int64_t>(0, j0 + last * kPanel<PG> - i0);
          const int64_t rows = p.triangle ? std::min(tall, round_up(end, PG::kPair)) : tall;
          if (rows <= 0) return;
          add_columns<PG>(plan.g, rows, first, last, plan.x_turned + i0 / PG::kPair, plan.x_words,
                          e, std::min(strip, d - e), plan.dy_turned, plan.block_columns,
                          plan.thread(thread).split);
        });
      }
      bool any = false;
      for (int64_t task = 0; p.apart && task < row_tiles * column_tiles; ++task) {
        apart_scale += plan.near.parts[task];
        any = any || plan.near.present[task];
      }
      constexpr int64_t kOwned = 16;
      on_tasks(parallel, any && turn ? ceil_div(width, kOwned) : 0, [&](int, int64_t task) {
        const int64_t j = task * kOwned;
        for (int64_t bi = 0; bi < row_tiles; ++bi) {
          if (!plan.near.present[bi * column_tiles + j / kTileColumns]) continue;
          const int64_t i = bi * plan.tile_rows;
          plan.near.add_columns(i, std::min(plan.tile_rows, tall - i), j,
                                std::min(kOwned, width - j), x + (i0 + i) * d, y + j * d, d);
        }
      });
      for (int64_t bi = 0; dy_bias && bi < row_tiles; ++bi) {
        for (int64_t j = 0; j < width; ++j) {
          dy_bias[j0 + j] += plan.column_sums[bi * plan.block_columns + j];
        }
      }
      end_block(i0, tall, width);
    }
    end_columns(j0, width);
    if (!turn) continue;
    const T scale = p.triangle ? T(1) : static_cast<T>(p.scale);
    on_tasks(parallel, ceil_div(width, 64), [&](int, int64_t task) {
      const int64_t end = std::min(width, task * 64 + 64);
      alignas(64) T piece[kPart * kPart];
      for (int64_t j1 = task * 64; j1 < end; j1 += kPart) {
        const int64_t tall = std::min(kPart, end - j1);
        for (int64_t e0 = 0; e0 < d; e0 += kPart) {
          const int64_t wide = std::min(kPart, d - e0);
          transpose(plan.dy_turned + e0 * plan.block_columns + j1, wide, kPart, tall,
                    plan.block_columns, piece, kPart);
          for (int64_t j = j1; j < j1 + tall; ++j) {
            T* part = piece + (j - j1) * kPart;
            if (p.apart) {
              const T far = p.triangle ? T(0) : dy_bias[j0 + j];
              const int64_t at = j * d + e0;
              for (int64_t e = 0; e < wide; ++e) {
                part[e] += plan.near.of_columns[at + e] - far * y[at + e];
              }
            }
            for (int64_t e = 0; e < kPart; e += kLanes<T>) store(part + e, load(part + e) * scale);
            const int64_t at = (j0 + j) * d + e0;
            if (!p.triangle && p.stored == Stored::kWide && wide == kPart) {
              T* to = static_cast<T*>(out.dy) + at;
              for (int64_t e = 0; e < kPart; e += kLanes<T>) store(to + e, load(part + e));
            } else if (p.triangle) {
              for (int64_t e = 0; e < wide; ++e) dx[at + e] += part[e];
            } else {
              write_part(p.stored, out.dy, at, wide, part);
            }
          }
        }
      }
    });
  }
  // <x, G y> before the scale; a fixed chunk of rows a sum, added up in order
  const int64_t chunk = ceil_div(n, 256), chunks = ceil_div(n, std::max<int64_t>(chunk, 1));
  double parts[256] = {};
  on_tasks(parallel, chunks, [&](int, int64_t task) {
    double total = 0;
    const int64_t end = std::min(n, (task + 1) * chunk);
    for (int64_t i = task * chunk; i < end; ++i) {
      const T* of_x = x + i * d;
      T* own = dx + i * d;
      if (out.dscale && !p.apart) total += dot(of_x, own, d);
      const T far = p.apart ? dx_bias[i] : T(0);
      for (int64_t e = 0; e < d && p.apart; ++e) own[e] -= far * of_x[e];
      for (int64_t e = 0; e < d; ++e) own[e] *= static_cast<T>(p.scale);
    }
    parts[task] = total;
  });
  if (!out.dscale) return;
  if (p.apart) {
    *out.dscale = apart_scale;
    return;
  }
  double total = 0;
  for (int64_t k = 0; k < chunks; ++k) total += parts[k];
  // each end of a pair has counted it once
  *out.dscale = p.triangle ? total / 2 : total;
}

}  // namespace fused_losses::FL_ISA
