// What a class's cosine adds to a row's statistics, once for the CPU's vectors and for a GPU's
// threads (the maths and the twin in Python: primitives/class_rules/rules.py).
//
// A rule has kStatistics numbers a row, of each whether it is the logarithm of a sum of
// exponentials (kLse) or a sum, kValues numbers that a row brings, and of a cosine c its terms and
// their slopes. Math: Value, Scalar, exp, log1p_unit (of t in [0, 1]), acos (of c in [-1, 1]),
// power (v >= 0).
#pragma once

#include "../common.h"

namespace fused_losses::class_rules {

template <class Math>
using ValueOf = typename Math::Value;
template <class Math>
using ScalarOf = typename Math::Scalar;

// Above a threshold t a row's score is p + q c + r c^2; v: t, p, q, r.
template <class V>
FL_RULE V bent(V c, const V* v) {
  return c > v[0] ? v[1] + (v[2] + v[3] * c) * c : c;
}

template <class V>
FL_RULE V bent_slope(V c, const V* v) {
  const V one = V{} + 1;
  return c > v[0] ? v[2] + (v[3] + v[3]) * c : one;
}

// 1 / (1 + exp(-z)) and the same of -z, each to its own digits.
template <class Math>
struct Shares {
  ValueOf<Math> share, rest, small;  // small: exp(-|z|)

  FL_RULE explicit Shares(ValueOf<Math> z) {
    const ValueOf<Math> zero = {}, one = zero + ScalarOf<Math>(1);
    small = Math::exp(z > zero ? -z : z);
    const ValueOf<Math> whole = small + one;
    share = (z > zero ? one : small) / whole;
    rest = (z > zero ? small : one) / whole;
  }
};

// params: scale
template <class Math, bool kBent, bool kSummed>
struct Softmax {
  using V = ValueOf<Math>;
  static constexpr int kStatistics = kSummed ? 2 : 1, kValues = kBent ? 4 : 0;
  static constexpr bool kLse[2] = {true, false};
  ScalarOf<Math> scale;

  FL_RULE explicit Softmax(const double* params) : scale(static_cast<ScalarOf<Math>>(params[0])) {}
  FL_RULE void terms(V c, const V* v, V* out) const {
    out[0] = scale * c;
    if constexpr (kBent) out[0] = scale * bent(c, v);
    if constexpr (kSummed) out[1] = out[0];
  }
  FL_RULE void slopes(V c, const V* v, V* out) const {
    out[0] = V{} + scale;
    if constexpr (kBent) out[0] = scale * bent_slope(c, v);
    if constexpr (kSummed) out[1] = out[0];
  }
};

// params: k, b
template <class Math>
struct SFace {
  using V = ValueOf<Math>;
  static constexpr int kStatistics = 1, kValues = 0;
  static constexpr bool kLse[2] = {false, false};
  ScalarOf<Math> k, b;

  FL_RULE explicit SFace(const double* params)
      : k(static_cast<ScalarOf<Math>>(params[0])), b(static_cast<ScalarOf<Math>>(params[1])) {}
  FL_RULE V weight(V c) const {
    // rounding takes a cosine beyond 1
    const V one = V{} + ScalarOf<Math>(1);
    c = c > one ? one : c;
    c = c < -one ? -one : c;
    return Shares<Math>(k * (b - Math::acos(c))).share;
  }
  FL_RULE void terms(V c, const V*, V* out) const { out[0] = weight(c) * c; }
  // the weight is held
  FL_RULE void slopes(V c, const V*, V* out) const { out[0] = weight(c); }
};

// params: scale, margin, t, whether straight through; values: the bias
template <class Math>
struct SphereFace2 {
  using T = ScalarOf<Math>;
  using V = ValueOf<Math>;
  static constexpr int kStatistics = 2, kValues = 1;
  static constexpr bool kLse[2] = {false, false};
  T scale, margin;
  double t;
  int whole;  // t where it is a small integer, else 0
  bool through;

  FL_RULE explicit SphereFace2(const double* params)
      : scale(static_cast<T>(params[0])),
        margin(static_cast<T>(params[1])),
        t(params[2]),
        whole(t >= 1 && t <= 8 && t == static_cast<int>(t) ? static_cast<int>(t) : 0),
        through(params[3] != 0) {}

  // ((c + 1) / 2)^(t - less)
  FL_RULE V raised(V c, int less) const {
    const V zero = {};
    V h = (c + T(1)) * T(0.5);
    h = h < zero ? zero : h;
    if (whole == 0) return Math::power(h, t - less);
    V out = zero + T(1);
    for (int i = less; i < whole; ++i) out *= h;
    return out;
  }
  FL_RULE V score(V c, V bias) const {
    return scale * (T(2) * raised(c, 0) - T(1) + margin) + bias;
  }
  // softplus(z), and its slope in the bias
  FL_RULE void terms(V c, const V* v, V* out) const {
    const V zero = {}, z = score(c, v[0]);
    const Shares<Math> s(z);
    out[0] = (z > zero ? z : (z != z ? z : zero)) + Math::log1p_unit(s.small);
    out[1] = s.share;
  }
  FL_RULE void slopes(V c, const V* v, V* out) const {
    const Shares<Math> s(score(c, v[0]));
    V of_score = V{} + scale;
    if (!through) of_score *= static_cast<T>(t) * raised(c, 1);
    out[0] = s.share * of_score;
    out[1] = s.share * s.rest * of_score;
  }
};

}  // namespace fused_losses::class_rules
