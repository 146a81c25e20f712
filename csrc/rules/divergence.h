// What a class's two scores add to a row's divergence, and the slopes: once for the vectors of
// every instruction set (the twin in Python: primitives/divergence/rules.py). No difference of
// nearly equal numbers is taken but u - v itself.
//
// Math: as of numerics.h, and exp.
#pragma once

#include "../divergence.h"
#include "numerics.h"

namespace fused_losses::divergence_rules {

template <class Math>
using Scalar = typename Math::Scalar;
template <class Math>
using Value = typename Math::Value;

// ---- differences to their own digits ------------------------------------------------------------

// exp(x) - 1 - x for |x| <= 1/2.
template <class Math>
FL_RULE Value<Math> exp_excess(Value<Math> x) {
  using T = Scalar<Math>;
  constexpr int kTerms = sizeof(T) == 4 ? 9 : 16;
  Value<Math> y = Value<Math>{} + T(1);
  for (int k = kTerms; k > 2; --k) y = y * x * T(1.0 / k) + T(1);
  return y * (x * x) * T(0.5);
}

// z - log(1 + z) for |z| <= 1/3: log(1 + z) = 2 atanh(z / (2 + z)).
template <class Math>
FL_RULE Value<Math> log_excess(Value<Math> z) {
  using T = Scalar<Math>;
  constexpr int kTerms = sizeof(T) == 4 ? 5 : 12;
  const Value<Math> s = z / (z + T(2)), q = s * s;
  Value<Math> y = Value<Math>{} + T(1.0 / (2 * kTerms + 3));
  for (int k = kTerms - 1; k >= 0; --k) y = y * q + T(1.0 / (2 * k + 3));
  return s * (z - q * y * T(2));
}

template <class Math>
FL_RULE auto is_near(Value<Math> x, double reach) {
  return Math::magnitude(x) <= Scalar<Math>(reach);
}

// exp(-|x|) - 1.
template <class Math>
FL_RULE Value<Math> shrink(Value<Math> x) {
  using T = Scalar<Math>;
  const Value<Math> zero = {}, down = -Math::magnitude(x);
  const auto near = is_near<Math>(x, 0.5);
  const Value<Math> small = near ? down : zero;
  return near ? small + exp_excess<Math>(small) : Math::exp(down) - T(1);
}

// p - q of p = q exp(gap), from the gap.
template <class Math>
FL_RULE Value<Math> difference(Value<Math> p, Value<Math> q, Value<Math> gap) {
  const Value<Math> zero = {};
  return (gap > zero ? -p : q) * shrink<Math>(gap);
}

// log(1 + z) for z >= -1; finite at -1.
template <class Math>
FL_RULE Value<Math> log_of_more(Value<Math> z) {
  using T = Scalar<Math>;
  const Value<Math> zero = {};
  const auto near = is_near<Math>(z, 1.0 / 3);
  const Value<Math> small = near ? z : zero;
  const Value<Math> far = distance_rules::log_positive<Math>(z + T(1));
  return near ? small - log_excess<Math>(small) : far;
}

// (1 + z) log(1 + z) - z >= 0 for z >= -1.
template <class Math>
FL_RULE Value<Math> entropy_excess(Value<Math> z) {
  using T = Scalar<Math>;
  const Value<Math> zero = {};
  const auto near = is_near<Math>(z, 1.0 / 3);
  const Value<Math> small = near ? z : zero, whole = z + T(1);
  return near ? small * small - (small + T(1)) * log_excess<Math>(small)
              : whole * distance_rules::log_positive<Math>(whole) - z;
}

// log(1 + exp(x)).
template <class Math>
FL_RULE Value<Math> softplus(Value<Math> x) {
  using T = Scalar<Math>;
  const Value<Math> zero = {}, t = Math::exp(-Math::magnitude(x));
  return (x > zero ? x : zero) + distance_rules::log_of_ratio<Math>(t, t + T(1));
}

template <class Math>
FL_RULE Value<Math> sigmoid(Value<Math> x) {
  using T = Scalar<Math>;
  const Value<Math> zero = {}, one = zero + T(1), t = Math::exp(-Math::magnitude(x));
  return (x > zero ? one : t) / (t + T(1));
}

// KL(Bern(sigmoid(v)) || Bern(sigmoid(v + gap))).
template <class Math>
FL_RULE Value<Math> bernoulli_kl(Value<Math> v, Value<Math> gap) {
  const Value<Math> zero = {}, low = v > zero ? -v : v;  // the rarer outcome's logit
  const Value<Math> h = v > zero ? -gap : gap, rare = sigmoid<Math>(low);
  const auto near = is_near<Math>(h, 0.5);
  const Value<Math> t = near ? h : zero, more = exp_excess<Math>(t);
  const Value<Math> close = rare * more - log_excess<Math>(rare * (t + more));
  return near ? close : softplus<Math>(low + h) - softplus<Math>(low) - rare * h;
}

// sigmoid(u) - sigmoid(v) of gap = u - v.
template <class Math>
FL_RULE Value<Math> sigmoid_difference(Value<Math> u, Value<Math> v, Value<Math> gap) {
  const Value<Math> zero = {}, high = gap > zero ? u : v, low = gap > zero ? v : u;
  const Value<Math> size = sigmoid<Math>(high) * sigmoid<Math>(-low) * shrink<Math>(gap);
  return gap > zero ? -size : size;
}

template <class Math>
FL_RULE Value<Math> clamped(Value<Math> v, Scalar<Math> limit) {
  const Value<Math> most = Value<Math>{} + limit, cut = v > limit ? most : v;
  return cut < -limit ? -most : cut;
}

// ---- a class's terms ----------------------------------------------------------------------------

// The two probabilities beside their mean m = beta q_t + (1 - beta) q_s: y = (q_t - q_s) / m.
template <class Math>
FL_RULE Value<Math> beside_mean(Value<Math> gap, Scalar<Math> beta) {
  using T = Scalar<Math>;
  const Value<Math> zero = {}, less = shrink<Math>(gap);
  const Value<Math> share = gap > zero ? zero + beta : zero + (T(1) - beta);
  return (gap > zero ? less : -less) / (less * share + T(1));
}

// Both scores cut at +-limit, and what is between them.
template <class Math>
struct CutScores {
  Value<Math> u, v, gap;

  FL_RULE CutScores(Value<Math> u_in, Value<Math> v_in, Value<Math> gap_in, Scalar<Math> limit)
      : u(clamped<Math>(u_in, limit)), v(clamped<Math>(v_in, limit)) {
    const auto whole = is_near<Math>(u_in, limit) & is_near<Math>(v_in, limit);
    gap = whole ? gap_in : u - v;
  }
};

// Terms of the kinds that are sums over classes, each from its own scores: KL of coins, squares.
template <class Math>
FL_RULE Value<Math> class_term(DivergenceKind kind, Value<Math> u, Value<Math> v, Value<Math> gap,
                               Scalar<Math> limit) {
  const Value<Math> zero = {};
  if (kind == DivergenceKind::kSquared) return gap * gap;
  if (kind == DivergenceKind::kBernoulliNorm) {
    return bernoulli_kl<Math>(zero, clamped<Math>(gap, limit));
  }
  const CutScores<Math> cut(u, v, gap, limit);
  return bernoulli_kl<Math>(cut.v, cut.gap);
}

// Terms of the kinds that need both softmaxes: the value, the slopes in log q_s and in log q_t.
template <class Math>
FL_RULE void softmax_terms(DivergenceKind kind, Value<Math> q_s, Value<Math> q_t, Value<Math> gap,
                           Scalar<Math> beta, Value<Math>* out) {
  using T = Scalar<Math>;
  const Value<Math> zero = {};
  if (kind == DivergenceKind::kTotalVariation) {
    const Value<Math> apart = difference<Math>(q_s, q_t, gap);
    out[0] = Math::magnitude(apart) * T(0.5);
    const Value<Math> half = zero + T(0.5);
    const Value<Math> sign = gap > zero ? half : (gap < zero ? -half : zero);
    out[1] = sign * q_s;
    out[2] = -sign * q_t;
    return;
  }
  const Value<Math> mean = q_t * beta + q_s * (T(1) - beta);
  const Value<Math> y = beside_mean<Math>(gap, beta);
  out[1] = mean * (T(1) - beta) * entropy_excess<Math>(-beta * y);
  out[2] = mean * beta * entropy_excess<Math>((T(1) - beta) * y);
  out[0] = out[1] + out[2];
}

// ---- slopes -------------------------------------------------------------------------------------

// What a row brings to the slopes of its scores.
template <class V>
struct DivergenceRow {
  V lse, teacher_lse;      // 0 where there is no class
  V gap_high, gap_low;     // lse - teacher_lse (of kPower: lse - P) to more digits than one number
  V s_high, s_low;         // the mean that slopes of the student are less, alike
  V t_high, t_low;         // and of the teacher
  V g_lse, g_teacher_lse;  // 0 where there is no class
  V g[2];                  // of the differentiable folds
  V power_lse;             // P
};

// The two slopes of log probabilities of which a softmax shares out the mean.
template <class Math>
FL_RULE void shared_slopes(DivergenceKind kind, Value<Math> gap, Scalar<Math> beta,
                           Value<Math>* of_s, Value<Math>* of_t) {
  using T = Scalar<Math>;
  const Value<Math> zero = {};
  if (kind == DivergenceKind::kTotalVariation) {
    const Value<Math> half = zero + T(0.5);
    *of_s = gap > zero ? half : (gap < zero ? -half : zero);
    *of_t = -*of_s;
    return;
  }
  // the mixture over the larger share: over the smaller its logarithm is longer by the gap
  const Value<Math> share = gap > zero ? zero + beta : zero + (T(1) - beta);
  const Value<Math> larger = log_of_more<Math>(share * shrink<Math>(gap));
  *of_s = ((gap < zero ? gap : zero) - larger) * (T(1) - beta);
  *of_t = ((gap > zero ? -gap : zero) - larger) * beta;
}

// x less a mean; one that another compilation of the same formula rounds apart from it is it.
template <class Math>
FL_RULE Value<Math> less_mean(Value<Math> x, Value<Math> high, Value<Math> low) {
  using T = Scalar<Math>;
  const Value<Math> zero = {}, apart = x - high;
  const auto same =
      Math::magnitude(apart) <= Math::magnitude(high) * (T(8) * std::numeric_limits<T>::epsilon());
  return (same ? zero : apart) - low;
}

// d loss / du and d loss / dv of one class, from u, v and apart = u - v to its own digits.
template <class Math, DivergenceKind kind>
FL_RULE void slopes(const DivergenceRow<Value<Math>>& r, Value<Math> u, Value<Math> v,
                    Value<Math> apart, Scalar<Math> param, Value<Math>* of_u, Value<Math>* of_v) {
  using T = Scalar<Math>;
  using K = DivergenceKind;
  const Value<Math> zero = {};
  const Value<Math> q_s = Math::exp(u - r.lse), q_t = Math::exp(v - r.teacher_lse);
  Value<Math> a = zero, b = zero;
  if constexpr (kind == K::kPower) {
    const Value<Math> share = Math::exp(param * v - r.power_lse);
    const Value<Math> gap =
        ((apart + (T(1) - param) * v) - r.gap_high) - r.gap_low;  // log q_s - log share
    *of_u = (r.g_lse + r.g[1]) * q_s - r.g[1] * difference<Math>(q_s, share, gap);
    *of_v = param * share * (r.g[0] + r.g[1] * ((u - r.t_high) - r.t_low)) + r.g_teacher_lse * q_t;
    return;
  }
  const Value<Math> gap = (apart - r.gap_high) - r.gap_low;  // log q_s - log q_t
  if constexpr (kind == K::kForward) {
    a = difference<Math>(q_s, q_t, gap);
    b = -q_t * ((apart - r.t_high) - r.t_low);
  } else if constexpr (kind == K::kReverse) {
    a = q_s * ((apart - r.s_high) - r.s_low);
    b = -difference<Math>(q_s, q_t, gap);
  } else if constexpr (kind == K::kJensenShannon || kind == K::kTotalVariation) {
    shared_slopes<Math>(kind, gap, param, &a, &b);
    a = q_s * less_mean<Math>(a, r.s_high, r.s_low);
    b = q_t * less_mean<Math>(b, r.t_high, r.t_low);
  } else if constexpr (kind == K::kBernoulli) {
    const CutScores<Math> cut(u, v, apart, param);
    const Value<Math> spread = sigmoid<Math>(cut.v) * sigmoid<Math>(-cut.v);
    a = is_near<Math>(u, param) ? sigmoid_difference<Math>(cut.u, cut.v, cut.gap) : zero;
    b = is_near<Math>(v, param) ? -spread * cut.gap : zero;
  } else if constexpr (kind == K::kBernoulliNorm) {
    a = is_near<Math>(apart, param) ? sigmoid_difference<Math>(apart, zero, apart) : zero;
    b = -a;
  } else {
    a = apart * T(2);
    b = -a;
  }
  *of_u = r.g[0] * a + r.g_lse * q_s;
  *of_v = r.g[0] * b + r.g_teacher_lse * q_t;
}

}  // namespace fused_losses::divergence_rules
