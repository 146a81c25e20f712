// What a pair's product becomes, once for the CPU's vectors and for a GPU's threads: the score, the
// term of its class, the reductions and their derivatives (the maths: primitives/pairs).
//
// Math says on what: Value, a number or a vector of them; Scalar, its element; exp, sqrt and
// log1p_unit of a Value. A policy of one instruction set makes functions of that set alone.
#pragma once

#include "../pairs.h"

namespace fused_losses::pair_rules {

template <class Math>
using ValueOf = typename Math::Value;
template <class Math>
using ScalarOf = typename Math::Scalar;

// ---- the score ---------------------------------------------------------------------------------

// s = psi(u); a NaN stays one.
template <class Math>
FL_RULE ValueOf<Math> score(Score psi, ValueOf<Math> u) {
  using V = ValueOf<Math>;
  if (psi == Score::kLinear) return u;
  const V zero = {};
  const auto apart = u < zero;
  const V root = Math::sqrt(apart ? -u : zero + ScalarOf<Math>(1));
  return apart ? -root : (u != u ? u : zero);
}

// ds/du, of the score; 0 where u >= 0 under the root.
template <class Math>
FL_RULE ValueOf<Math> score_slope(Score psi, ValueOf<Math> s) {
  using V = ValueOf<Math>;
  using T = ScalarOf<Math>;
  const V zero = {}, one = zero + T(1);
  if (psi == Score::kLinear) return one;
  return s < zero ? T(0.5) / (s < zero ? -s : one) : zero;
}

// ---- the term of a class -----------------------------------------------------------------------

// A rule in the type of the scores.
template <class T>
struct Weighing {
  T factor, center, reach, sign;
  bool weighted;  // the reach is finite
};

template <class T>
FL_RULE Weighing<T> weighing(double factor, double center, double reach) {
  return {static_cast<T>(factor), static_cast<T>(center), static_cast<T>(reach),
          factor >= 0 ? T(1) : T(-1), reach - reach == 0};
}

template <class Math>
struct Term {
  ValueOf<Math> z, slope;
};

// z of a score, and dz/du where `slope` is ds/du.
template <class Math>
FL_RULE Term<Math> term(const Weighing<ScalarOf<Math>>& rule, ValueOf<Math> s,
                        ValueOf<Math> slope) {
  using V = ValueOf<Math>;
  V z = (s - rule.center) * rule.factor, dz = slope * rule.factor;
  if (rule.weighted) {
    const V zero = {}, weight = s * rule.sign + rule.reach;
    const V w = weight > zero ? weight : zero;
    z *= w;
    dz *= w;
  }
  return {z, dz};
}

// ---- the reductions ----------------------------------------------------------------------------

// log(1 + t) for t in [0, 1] in float, relative error 2e-7: 2 atanh(t / (2 + t)).
template <class V>
FL_RULE V log1p_series(V t) {
  const V s = t / (t + 2.0f), q = s * s;
  V y = V{} + 1.0f / 15;
  y = y * q + 1.0f / 13;
  y = y * q + 1.0f / 11;
  y = y * q + 1.0f / 9;
  y = y * q + 1.0f / 7;
  y = y * q + 1.0f / 5;
  y = y * q + 1.0f / 3;
  return (y * q + 1.0f) * s * 2.0f;
}

// f and f' of the reductions that sum f(z); 0 at z = -inf.
template <class Math>
FL_RULE ValueOf<Math> map_value(Reduction f, ValueOf<Math> z) {
  using V = ValueOf<Math>;
  const V zero = {};
  const V over = z > zero ? z : (z != z ? z : zero);
  if (f == Reduction::kRelu) return over;
  return over + Math::log1p_unit(Math::exp(z > zero ? -z : z));
}

template <class Math>
FL_RULE ValueOf<Math> map_slope(Reduction f, ValueOf<Math> z) {
  using V = ValueOf<Math>;
  const V zero = {}, one = zero + ScalarOf<Math>(1);
  if (f == Reduction::kRelu) return z > zero ? one : (z != z ? z : zero);
  const V t = Math::exp(z > zero ? -z : z);
  return (z > zero ? one : t) / (t + ScalarOf<Math>(1));
}

// dL/dz of one side's value and total: with e = exp(z - base), rest e + share (e - mean), whose
// large parts near zero loss have cancelled in double before; else rest f'(z) + share.
template <class Math>
FL_RULE ValueOf<Math> side_slope(Reduction f, ValueOf<Math> z, ValueOf<Math> base,
                                 ValueOf<Math> mean, ValueOf<Math> rest, ValueOf<Math> share) {
  if (f != Reduction::kLse) return rest * map_slope<Math>(f, z) + share;
  const ValueOf<Math> e = Math::exp(z - base);
  return rest * e + share * (e - mean);
}

}  // namespace fused_losses::pair_rules
