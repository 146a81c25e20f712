// Scores made of distances: v = -|x - y|^2 / 2 in place of a tile's products (../../pairs.h).
#pragma once

#include "kept.h"

namespace fused_losses::FL_ISA {

// The part of |x|^2 + |y|^2 below which |x - y|^2 is not taken from products.
inline double near_share(Precision p) { return p == Precision::kFull ? 1.0 / 16 : 1.0 / 4; }

// sum_d (x_d - y_d)^2
template <class T>
inline T squared_difference(const T* x, const T* y, int64_t d) {
  constexpr int64_t kStep = kLanes<T>;
  Vector<T> first = {}, second = {};
  int64_t e = 0;
  for (; e + 2 * kStep <= d; e += 2 * kStep) {
    const Vector<T> a = load(x + e) - load(y + e), b = load(x + e + kStep) - load(y + e + kStep);
    first += a * a;
    second += b * b;
  }
  for (; e + kStep <= d; e += kStep) {
    const Vector<T> a = load(x + e) - load(y + e);
    first += a * a;
  }
  T total = sum<T>(first + second);
  for (; e < d; ++e) total += (x[e] - y[e]) * (x[e] - y[e]);
  return total;
}

// to += g (x - y)
template <class T>
inline void add_difference(T g, const T* x, const T* y, int64_t d, T* to) {
  constexpr int64_t kStep = kLanes<T>;
  int64_t e = 0;
  for (; e + kStep <= d; e += kStep) {
    store(to + e, load(to + e) + (load(x + e) - load(y + e)) * g);
  }
  for (; e < d; ++e) to[e] += (x[e] - y[e]) * g;
}

// A tile's products become v, in place or in `out`. Near pairs come from differences; `near`,
// unless null, lists them as row * kTileColumns + column. y: at the tile's first column. Returns
// how many there are.
template <class T>
inline int64_t mend_tile(const PairProblem& p, const PairTile& t, const T* y, const T* products,
                         int64_t ld, T* out, uint16_t* near) {
  constexpr int64_t kStep = kLanes<T>;
  const T share = static_cast<T>(near_share(p.precision));
  const T* x = static_cast<const T*>(p.rows.data) + t.row0 * p.d;
  alignas(64) T of_columns[kTileColumns + 64] = {};
  const T* column_norms = static_cast<const T*>(p.columns.half_norms) + t.column0;
  std::copy(column_norms, column_norms + t.columns, of_columns);
  const int64_t wide = round_up(t.columns, kStep);
  int64_t found = 0;
  for (int64_t i = 0; i < t.rows; ++i) {
    const T own = static_cast<const T*>(p.rows.half_norms)[t.row0 + i];
    T* row = out + i * ld;
    auto far = Vector<T>{} == Vector<T>{};
    for (int64_t j = 0; j < wide; j += kStep) {
      const Vector<T> halves = load(of_columns + j) + own;
      const Vector<T> v = load(products + i * ld + j) + halves;
      // so written, a NaN is near
      far &= v <= halves * share;
      store(row + j, v);
    }
    bool all = true;
    for (int64_t l = 0; l < kStep; ++l) all = all && far[l];
    if (all) continue;
    const int64_t first = p.triangle ? std::max<int64_t>(0, t.row0 + i - t.column0 + 1) : 0;
    for (int64_t j = first; j < t.columns; ++j) {
      if (row[j] <= (of_columns[j] + own) * share) continue;
      row[j] = squared_difference(x + i * p.d, y + j * p.d, p.d) * T(-0.5);
      if (near) near[found] = static_cast<uint16_t>(i * kTileColumns + j);
      ++found;
    }
  }
  return found;
}

// What near pairs add to the gradients of a block: G of the tiles that have any.
template <class T>
struct NearPairs {
  T* g;                  // [block rows][block columns]
  char* present;         // [row tile][column tile]
  T* of_columns;         // [block columns][d]: sum_i G (x_i - y_j)
  double* parts;         // [row tile][column tile]: sum G v
  T *dx_bias, *dy_bias;  // sums of G over the other pairs
  int64_t ld;

  NearPairs(const PairProblem& p, int64_t tile_rows, int64_t block_rows, int64_t block_columns,
            Arena& arena)
      : ld(block_columns) {
    const int64_t on = p.apart ? 1 : 0;
    const int64_t tiles = ceil_div(block_rows, tile_rows) * ceil_div(ld, kTileColumns);
    g = arena.take<T>(on * block_rows * ld);
    present = arena.take<char>(on * tiles);
    of_columns = arena.take<T>(on * ld * p.d);
    parts = arena.take<double>(on * tiles);
    dx_bias = arena.take<T>(on * p.rows.count);
    dy_bias = arena.take<T>(p.triangle ? 0 : on * p.columns.count);
  }

  // Takes the near pairs out of a tile of G, whose v are at hand.
  void split(const PairTile& t, const T* v, int64_t tile_ld, const uint16_t* near, int64_t count,
             int64_t task, int64_t row, int64_t column, T* gradient) const {
    double total = 0;
    for (int64_t i = 0; i < t.rows; ++i) {
      T part = 0;
      for (int64_t j = 0; j < t.columns; ++j) {
        const T each = gradient[i * tile_ld + j];
        // a pair that is left out has G = 0, whatever its v
        part += each == 0 ? T(0) : each * v[i * tile_ld + j];
      }
      total += part;
    }
    parts[task] = total;
    present[task] = count > 0;
    if (count == 0) return;
    T* to = g + row * ld + column;
    for (int64_t i = 0; i < t.rows; ++i) std::fill_n(to + i * ld, t.columns, T(0));
    for (int64_t k = 0; k < count; ++k) {
      const int64_t i = near[k] / kTileColumns, j = near[k] % kTileColumns;
      std::swap(to[i * ld + j], gradient[i * tile_ld + j]);
    }
  }

  // dx_i += sum_j G (y_j - x_i) over a tile; x, y and dx at its corner.
  void add_rows(int64_t row, int64_t rows, int64_t column, int64_t columns, const T* x, const T* y,
                int64_t d, T* dx) const {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = g + (row + i) * ld + column;
      for (int64_t j = 0; j < columns; ++j) {
        if (from[j] != 0) add_difference(from[j], y + j * d, x + i * d, d, dx + i * d);
      }
    }
  }

  void add_columns(int64_t row, int64_t rows, int64_t column, int64_t columns, const T* x,
                   const T* y, int64_t d) const {
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = g + (row + i) * ld + column;
      for (int64_t j = 0; j < columns; ++j) {
        if (from[j] != 0) {
          add_difference(from[j], x + i * d, y + j * d, d, of_columns + (column + j) * d);
        }
      }
    }
  }
};

}  // namespace fused_losses::FL_ISA
