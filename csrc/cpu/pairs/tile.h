// A tile of pairs: which class each is of, and what its product becomes.
#pragma once

#include <limits>

#include "../../rules/pairs.h"
#include "blocks.h"

namespace fused_losses::FL_ISA {

template <class T>
struct IntOf {
  using type = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
};
template <class T>
using Code = typename IntOf<T>::type;
constexpr int kLeftOut = kClasses;  // besides PairClass

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

template <class T>
inline Vector<T> square_root(Vector<T> v) {
  for (int i = 0; i < kLanes<T>; ++i) v[i] = std::sqrt(v[i]);
  return v;
}

template <class T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;
}

template <class T>
inline T largest(Vector<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// What the rules (../rules/pairs.h) are computed on here.
template <class T>
struct PairMath {
  using Scalar = T;
  using Value = Vector<T>;
  FL_RULE static Value exp(Value v) { return FL_ISA::exp(v); }
  FL_RULE static Value sqrt(Value v) { return square_root<T>(v); }
  FL_RULE static Value log1p_unit(Value t) {
    if constexpr (sizeof(T) == 4) return pair_rules::log1p_series(t);
    for (int i = 0; i < kLanes<T>; ++i) t[i] = std::log1p(t[i]);
    return t;
  }
};

struct Range {
  int32_t low, high;
  bool single() const { return low == high; }
  bool apart(const Range& o) const { return high < o.low || o.high < low; }
};

inline Range range_of(const int32_t* v, int64_t first, int64_t count) {
  Range r = {v[first], v[first]};
  for (int64_t i = first + 1; i < first + count; ++i) {
    r.low = std::min(r.low, v[i]);
    r.high = std::max(r.high, v[i]);
  }
  return r;
}

// The pairs [row0, row0 + rows) x [column0, column0 + columns).
struct PairTile {
  int64_t row0, rows, column0, columns;
  bool skip = false;   // no pair takes part
  bool mixed = false;  // classes differ within: codes are needed
  PairClass pure = kNegative;

  PairTile(const PairProblem& p, int64_t row0_in, int64_t rows_in, int64_t column0_in,
           int64_t columns_in, int64_t panel)
      : row0(row0_in), rows(rows_in), column0(column0_in), columns(columns_in) {
    const int64_t last = column0 + columns - 1;
    if (p.triangle && last <= row0) skip = true;
    if (skip) return;
    mixed = columns % panel != 0;
    const bool on_diagonal = column0 < row0 + rows && row0 <= last;
    if (p.triangle && column0 < row0 + rows) mixed = true;
    if (p.skip_self && on_diagonal) mixed = true;
    if (p.rows.labels) {
      const Range r = range_of(p.rows.labels, row0, rows);
      const Range c = range_of(p.columns.labels, column0, columns);
      if (!r.apart(c)) {
        if (r.single() && c.single()) {
          pure = kPositive;
        } else {
          mixed = true;
        }
      }
    }
    if (p.rows.groups) {
      const Range r = range_of(p.rows.groups, row0, rows);
      const Range c = range_of(p.columns.groups, column0, columns);
      if (r.apart(c)) skip = true;
      if (!(r.single() && c.single())) mixed = true;
    }
    if (p.rows.ids &&
        !range_of(p.rows.ids, row0, rows).apart(range_of(p.columns.ids, column0, columns))) {
      mixed = true;
    }
    const int32_t* listed = p.exclude + row0 * p.excluded;
    for (int64_t e = 0; e < rows * p.excluded && !mixed; ++e) {
      mixed = listed[e] >= column0 && listed[e] <= last;
    }
  }

  // The class of each pair, kLeftOut up to `ld` too.
  template <class C>
  void codes(const PairProblem& p, C* out, int64_t ld) const {
    for (int64_t i = 0; i < rows; ++i, out += ld) {
      const int64_t row = row0 + i;
      for (int64_t j = columns; j < ld; ++j) out[j] = kLeftOut;
      if (p.rows.labels) {
        const int32_t* labels = p.columns.labels + column0;
        const int32_t own = p.rows.labels[row];
        for (int64_t j = 0; j < columns; ++j) out[j] = labels[j] == own ? kPositive : kNegative;
      } else {
        std::fill(out, out + columns, C(pure));
      }
      if (p.rows.groups) {
        const int32_t* groups = p.columns.groups + column0;
        const int32_t own = p.rows.groups[row];
        for (int64_t j = 0; j < columns; ++j) out[j] = groups[j] == own ? out[j] : C(kLeftOut);
      }
      if (p.rows.ids) {
        const int32_t* ids = p.columns.ids + column0;
        const int32_t own = p.rows.ids[row];
        for (int64_t j = 0; j < columns; ++j) out[j] = ids[j] == own ? C(kLeftOut) : out[j];
      }
      for (int64_t e = 0; e < p.excluded; ++e) {
        const int64_t at = p.exclude[row * p.excluded + e] - column0;
        if (at >= 0 && at < columns) out[at] = kLeftOut;
      }
      const int64_t self = row - column0;
      if (p.skip_self && self >= 0 && self < columns) out[self] = kLeftOut;
      if (p.triangle) {
        for (int64_t j = 0; j < std::min(self + 1, columns); ++j) out[j] = kLeftOut;
      }
    }
  }
};

enum class Window { kNone, kRows, kColumns };

template <class T>
inline T bias_at(const PairSide& side, int64_t i) {
  return side.bias ? static_cast<const T*>(side.bias)[i] : T(0);
}

// z of one class over a tile of products, -inf where a pair is not of it. `codes` null: all are.
// `slope`, unless null: dz/du. In place is fine. The same bits whenever it is asked.
template <class T>
inline void fill_terms(const PairProblem& p, const PairTile& t, const T* products, int64_t ld,
                       const Code<T>* codes, PairClass c, Window window, T* z, T* slope) {
  constexpr int64_t kStep = kLanes<T>;
  using Math = PairMath<T>;
  const Rule& r = p.rule[c];
  const auto rule = pair_rules::weighing<T>(r.factor, r.center, r.reach);
  const T scale = static_cast<T>(p.scale);
  const Vector<T> zero = {};
  alignas(64) T column_bias[kTileColumns + 64] = {}, low_of[kTileColumns + 64],
                                           high_of[kTileColumns + 64];
  for (int64_t j = 0; j < t.columns; ++j) column_bias[j] = bias_at<T>(p.columns, t.column0 + j);
  if (window == Window::kColumns) {
    const T* low = static_cast<const T*>(p.columns.window) + 2 * c * p.columns.count + t.column0;
    std::copy(low, low + t.columns, low_of);
    std::copy(low + p.columns.count, low + p.columns.count + t.columns, high_of);
  }
  const int64_t wide = round_up(t.columns, kStep);
  for (int64_t i = 0; i < t.rows; ++i) {
    const T row_bias = bias_at<T>(p.rows, t.row0 + i);
    Vector<T> low = zero, high = zero;
    if (window == Window::kRows) {
      const T* at = static_cast<const T*>(p.rows.window) + 2 * c * p.rows.count + t.row0 + i;
      low += at[0];
      high += at[p.rows.count];
    }
    for (int64_t j = 0; j < wide; j += kStep) {
      if (codes && !any(load(codes + i * ld + j) == Code<T>(c))) {
        store(z + i * ld + j, zero + kNone<T>);
        if (slope) store(slope + i * ld + j, zero);
        continue;
      }
      const Vector<T> u = load(products + i * ld + j) * scale + (load(column_bias + j) + row_bias);
      const Vector<T> s = pair_rules::score<Math>(p.score, u);
      const auto found = pair_rules::term<Math>(rule, s, pair_rules::score_slope<Math>(p.score, s));
      Vector<T> out = found.z;
      if (window == Window::kColumns) {
        low = load(low_of + j);
        high = load(high_of + j);
      }
      if (window != Window::kNone) {
        out = s <= low || s >= high ? zero + kNone<T> : out;
      }
      if (codes) out = load(codes + i * ld + j) == Code<T>(c) ? out : zero + kNone<T>;
      store(z + i * ld + j, out);
      if (slope) store(slope + i * ld + j, found.slope);
    }
  }
}

}  // namespace fused_losses::FL_ISA
