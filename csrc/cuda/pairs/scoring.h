// Scores, classes and terms of pairs.
#pragma once

#include <cmath>
#include <limits>

#include "../../rules/pairs.h"
#include "tile.h"

namespace fused_losses::cuda::pairs {

struct FloatMath {
  using Scalar = float;
  using Value = float;
  FL_FUNCTION static float exp(float v) { return expf(v); }
  FL_FUNCTION static float sqrt(float v) { return sqrtf(v); }
  FL_FUNCTION static float log1p_unit(float t) { return pair_rules::log1p_series(t); }
};

constexpr int kLeftOut = kClasses;  // besides PairClass
constexpr float kNone = -std::numeric_limits<float>::infinity();

// kWide neighbours of a vector; past its end the last one again.
template <class T>
FL_DEVICE Pack<T, kWide> neighbours(const T* v, int64_t first, int64_t end) {
  const T* p = v + first;
  if (first + kWide <= end && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    return ld(reinterpret_cast<const Pack<T, kWide>*>(p));
  }
  Pack<T, kWide> out;
  for (int c = 0; c < kWide; ++c) out[c] = ld(v + (first + c < end ? first + c : end - 1));
  return out;
}

// What a pair asks of its row.
struct OfRow {
  float bias = 0;
  int32_t label = 0, id = 0, group = 0;

  template <class A>
  FL_DEVICE OfRow(const A& a, int64_t i) {
    if (a.x_bias) bias = ld(a.x_bias + i);
    if (a.x_labels) label = ld(a.x_labels + i);
    if (a.x_ids) id = ld(a.x_ids + i);
    if (a.x_groups) group = ld(a.x_groups + i);
  }
};

// What a pair asks of its columns; without labels or ids they differ from every row's.
struct OfColumns {
  Pack<float, kWide> bias = {};
  Pack<int32_t, kWide> label, id, group;

  template <class A>
  FL_DEVICE OfColumns(const A& a, int64_t j) {
    for (int c = 0; c < kWide; ++c) label[c] = id[c] = 1, group[c] = 0;
    if (a.y_bias) bias = neighbours(a.y_bias, j, a.column_end);
    if (a.y_labels) label = neighbours(a.y_labels, j, a.column_end);
    if (a.y_ids) id = neighbours(a.y_ids, j, a.column_end);
    if (a.y_groups) group = neighbours(a.y_groups, j, a.column_end);
  }
};

// The class of the pair (i, j + c), or kLeftOut.
template <class A>
FL_DEVICE int class_of(const A& a, float product, int64_t i, const OfRow& x, int64_t j,
                       const OfColumns& y, int c) {
  bool out = __float_as_int(product) == kExcluded || x.id == y.id[c] || x.group != y.group[c];
  out |= j + c >= a.column_end;
  out |= a.skip_self && i == j + c;
  out |= a.triangle && i >= j + c;
  return out ? kLeftOut : x.label == y.label[c] ? kPositive : kNegative;
}

// The window of a row or column for one class; s <= low and s >= high are outside.
struct Bounds {
  bool any = false;
  float low = 0, high = 0;

  Bounds() = default;
  FL_DEVICE Bounds(const float* window, int k, int64_t i, int64_t count) : any(window != nullptr) {
    if (!any) return;
    low = ld(window + 2 * k * count + i);
    high = ld(window + (2 * k + 1) * count + i);
  }
  // written so that a NaN score takes part
  FL_DEVICE bool holds(float s) const { return !any || !(s <= low || s >= high); }
};

struct BothBounds {
  Bounds of[kClasses];
  BothBounds() = default;
  FL_DEVICE BothBounds(const float* window, int64_t i, int64_t count)
      : of{{window, kPositive, i, count}, {window, kNegative, i, count}} {}
};

// What a launch computes a pair with.
struct Scoring {
  float scale;
  Score psi;
  pair_rules::Weighing<float> rule[kClasses];

  template <class A>
  FL_DEVICE explicit Scoring(const A& a)
      : scale(ld(a.scale)), psi(a.root ? Score::kRoot : Score::kLinear) {
    rule[kPositive] =
        pair_rules::weighing<float>(a.positive_factor, a.positive_center, a.positive_reach);
    rule[kNegative] =
        pair_rules::weighing<float>(a.negative_factor, a.negative_center, a.negative_reach);
  }

  FL_DEVICE float score(float product, float x_bias, float y_bias) const {
    return pair_rules::score<FloatMath>(psi, product * scale + (y_bias + x_bias));
  }

  template <int kClass>
  FL_DEVICE pair_rules::Term<FloatMath> term(float s) const {
    return pair_rules::term<FloatMath>(rule[kClass], s, pair_rules::score_slope<FloatMath>(psi, s));
  }
};

// A class that is known when this is compiled: what it indexes stays in registers.
template <int kClass>
struct Known {
  FL_FUNCTION constexpr operator int() const { return kClass; }
};

template <class F>
FL_DEVICE void each_class(F&& f) {
  f(Known<kPositive>{});
  f(Known<kNegative>{});
}

}  // namespace fused_losses::cuda::pairs
