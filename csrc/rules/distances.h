// The distances that are sums over coordinates, and their gradients: one struct a metric, with
// `add` for a coordinate of a pair and `finish` for its sums; one struct a term, what a pair adds
// to the gradient of its own coordinate. The CPU's kernels and CUDA's run these; a new metric is
// one more struct. The meaning of each kind: primitives/distances.
#pragma once

#include <cmath>

#include "numerics.h"

namespace fused_losses::distance_rules {

// ---- metrics ------------------------------------------------------------------------------------

// What a metric may read: kSums accumulators a pair; kFlags: a pair with a NaN in a row (and with
// kNonNegative an entry below 0) is NaN, which the caller sees to; kWeights: a weight a coordinate;
// kRowWeights: each row of y has a row of weights.
struct Traits {
  static constexpr int kSums = 1;
  static constexpr bool kFlags = false, kNonNegative = false, kWeights = false;
  static constexpr bool kRowWeights = false;
};

template <class Math>
struct Metric : Traits {
  using T = typename Math::Scalar;
  using V = typename Math::Value;
  FL_RULE static V join(V a, V b) { return a + b; }  // two parts of a sum
  FL_RULE static V finish(const V* s) { return s[0]; }
};

template <class Math>
struct Cityblock : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  FL_RULE static void add(V* s, T x, V y, V, T) { s[0] += Math::magnitude(x - y); }
};

template <class Math>
struct Chebyshev : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  // as integers: the same order, and a NaN is the largest
  FL_RULE static V join(V a, V b) {
    const Bits<Math> best = Math::bits(a), apart = Math::bits(b);
    return Math::value(best > apart ? best : apart);
  }
  FL_RULE static void add(V* s, T x, V y, V, T) { s[0] = join(s[0], Math::magnitude(x - y)); }
};

// sum |x - y|^p, and the root of it; kPower = 0: any p. Where the sum is not `in_range` the pair is
// to be taken again (`scaled_minkowski`).
template <class Math, int kPower>
struct Minkowski : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr T kLow = sizeof(T) == 4 ? T(1e-30) : T(1e-280), kHigh = T(1) / kLow;
  Exponent<T> p, inverse;

  explicit Minkowski(double p_in) : p(p_in), inverse(1 / p_in) {}

  FL_RULE void add(V* s, T x, V y, V, T) const {
    const V apart = x - y;
    if constexpr (kPower == 3) {
      s[0] += apart * apart * Math::magnitude(apart);
    } else if constexpr (kPower == 4) {
      const V square = apart * apart;
      s[0] += square * square;
    } else {
      s[0] += power<Math>(Math::magnitude(apart), p);
    }
  }

  FL_RULE V finish(const V* s) const {
    if constexpr (kPower == 4) return Math::root(Math::root(s[0]));
    return power<Math>(s[0], inverse);
  }
};

// The distance of one pair from shares of its largest coordinate; apart(k) = |x_k - y_k|.
template <class T, class Apart>
FL_RULE T scaled_minkowski(int64_t d, T p, Apart&& apart) {
  T most = 0, total = 0;
  for (int64_t k = 0; k < d; ++k) {
    const T v = apart(k);
    if (!(v <= most)) most = v;
    if (most != most) return most;
  }
  if (most == 0 || most == kInfinity<T>) return most;
  for (int64_t k = 0; k < d; ++k) total += std::pow(apart(k) / most, p);
  return most * std::pow(total, 1 / p);
}

template <class Math, bool kWeighted>
struct Canberra : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr bool kWeights = kWeighted;
  FL_RULE static void add(V* s, T x, V y, V, T w) {
    const V size = Math::not_zero(Math::magnitude(y) + std::abs(x));
    const V apart = Math::magnitude(x - y);
    const V share = kWeighted ? apart * w : apart;
    s[0] += share * Math::reciprocal(size);
  }
};

template <class Math>
struct Braycurtis : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr int kSums = 2;
  FL_RULE static void add(V* s, T x, V y, V, T) {
    s[0] += Math::magnitude(x - y);
    s[1] += Math::magnitude(x + y);
  }
  FL_RULE static V finish(const V* s) {
    const V zero = {};
    return (s[0] == zero) & (s[1] == zero) ? zero : s[0] / s[1];
  }
};

// The divisor of Braycurtis, which its gradient wants.
template <class Math>
struct SumOfSizes : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  FL_RULE static void add(V* s, T x, V y, V, T) { s[0] += Math::magnitude(x + y); }
};

template <class Math>
struct JensenShannon : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr bool kFlags = true, kNonNegative = true;
  FL_RULE static void add(V* s, T x, V y, V, T) {
    const V whole = x + y, r = Math::reciprocal(Math::not_zero(whole));
    const V t = Math::magnitude(x - y) * r, least = x < y ? V{} + x : y;
    s[0] += whole * Math::divergence(t, least * r * T(2));
  }
  FL_RULE static V finish(const V* s) { return Math::root(s[0] * T(0.25)); }
};

template <class Math>
struct KullbackLeibler : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr bool kFlags = true, kNonNegative = true;
  FL_RULE static void add(V* s, T x, V y, V, T) {
    const V zero = {};
    const T at_zero = x > 0 ? kInfinity<T> : T(0);
    const V term = x * log_of_quotient<Math>(zero + x, y, x - y);
    s[0] += y == zero ? zero + at_zero : term;
  }
};

template <class Math, bool kWeighted>
struct Hamming : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr bool kFlags = true, kWeights = kWeighted;
  T total;  // of the weights
  FL_RULE static void add(V* s, T x, V y, V, T w) {
    s[0] = y != x ? s[0] + (kWeighted ? w : T(1)) : s[0];
  }
  FL_RULE V finish(const V* s) const { return s[0] / total; }
};

template <class Math, bool kWeighted>
struct Jaccard : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr int kSums = 2;
  static constexpr bool kFlags = true, kWeights = kWeighted;
  FL_RULE static void add(V* s, T x, V y, V, T w) {
    const V zero = {};
    const T one = kWeighted ? w : T(1);
    s[0] = y != x ? s[0] + one : s[0];
    s[1] = (y != zero) | (zero + x != zero) ? s[1] + one : s[1];
  }
  FL_RULE static V finish(const V* s) {
    const V zero = {};
    return s[1] == zero ? zero : s[0] / s[1];
  }
};

template <class Math>
struct Scaled : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  static constexpr bool kRowWeights = true;
  FL_RULE static void add(V* s, T x, V y, V w, T) {
    const V apart = x - y;
    s[0] += apart * apart * w;
  }
  FL_RULE static V finish(const V* s) { return Math::root(s[0]); }
};

// |x - y|^2 of pairs that products would cancel in.
template <class Math>
struct Squares : Metric<Math> {
  using typename Metric<Math>::T, typename Metric<Math>::V;
  FL_RULE static void add(V* s, T x, V y, V, T) {
    const V apart = x - y;
    s[0] += apart * apart;
  }
};

// ---- terms: what a pair adds to the gradient of its own coordinate ------------------------------

// The factor of a root: grad / (by out), 0 at 0.
template <class Math>
FL_RULE Value<Math> over_distance(Value<Math> g, Value<Math> out, Scalar<Math> by) {
  const Value<Math> zero = {};
  return out == zero ? zero : g / (out * by);
}

// kSecond: `add` wants the second factor; kOtherWeights: the other row's weights; kFinish: sums are
// finished with the own element and its weight. factor(grad, out, second): the first factor of a
// pair, and the second in `second`, which may come in with a sum over its coordinates.
template <class Math>
struct Term {
  using T = typename Math::Scalar;
  using V = typename Math::Value;
  static constexpr bool kSecond = false, kOtherWeights = false, kFinish = false;
  FL_RULE static V factor(V g, V, V&) { return g; }
};

// sum += f (own - other), or with kTurned f (other - own).
template <class Math, bool kTurned = false>
struct DifferenceTerm : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  FL_RULE static void add(V& sum, V own, V other, V, T f, T) {
    sum += (kTurned ? other - own : own - other) * f;
  }
};

template <class Math>
struct SignTerm : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  FL_RULE static void add(V& sum, V own, V other, V, T f, T) {
    sum = own != other ? sum + Math::turn_sign(Math::all(f), own - other) : sum;
  }
};

// f (|d| s)^(p - 1) sign(d) with s = 1 / distance, where nothing overflows; kPower = 0: any p.
template <class Math, int kPower>
struct MinkowskiTerm : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  static constexpr bool kSecond = true;
  Exponent<T> less_one;
  explicit MinkowskiTerm(double p) : less_one(p - 1) {}
  // 1 / distance beside grad; at distance 0 neither counts
  FL_RULE static V factor(V g, V out, V& second) {
    const V zero = {};
    second = out == zero ? zero : T(1) / out;
    return out == zero ? zero : g;
  }
  FL_RULE void add(V& sum, V own, V other, V, T f, T second) const {
    const V t = (own - other) * second;
    if constexpr (kPower == 0) {
      sum += Math::turn_sign(power<Math>(Math::magnitude(t), less_one), t) * f;
    } else {
      sum += (kPower == 3 ? t * Math::magnitude(t) : t * t * t) * f;
    }
  }
};

// f sign(x - y) (|y| + y sign(x)) / (|x| + |y|)^2, zero at a zero by the convention sign(0) = 0.
template <class Math>
struct CanberraTerm : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  FL_RULE static void add(V& sum, V own, V other, V, T f, T) {
    const V zero = {};
    const V sign = own > zero ? zero + T(1) : (own < zero ? zero - T(1) : own * T(0));
    const V size = Math::magnitude(other);
    const V r = Math::reciprocal(Math::not_zero(Math::magnitude(own) + size));
    const V slope = Math::turn_sign((size + other * sign) * r * r, own - other);
    sum = own != other ? sum + slope * f : sum;
  }
};

// The share of a coordinate in canberra: the gradient of its weight.
template <class Math>
struct CanberraShare : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  FL_RULE static void add(V& sum, V own, V other, V, T f, T) {
    const V size = Math::not_zero(Math::magnitude(own) + Math::magnitude(other));
    sum += Math::magnitude(own - other) * Math::reciprocal(size) * f;
  }
};

// f sign(x - y) - g sign(x + y), f = grad / sum |x + y| and g = distance f.
template <class Math>
struct BraycurtisTerm : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  static constexpr bool kSecond = true;
  FL_RULE static V factor(V g, V out, V& second) {
    const V zero = {}, first = second == zero ? zero : g / second;
    second = first * out;
    return first;
  }
  FL_RULE static void add(V& sum, V own, V other, V, T f, T g) {
    const V zero = {}, whole = own + other;
    sum = own != other ? sum + Math::turn_sign(Math::all(f), own - other) : sum;
    sum = whole != zero ? sum - Math::turn_sign(Math::all(g), whole) : sum;
  }
};

// f log(x / m), m = (x + y) / 2; zero at x = 0.
template <class Math>
struct JensenShannonTerm : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  FL_RULE static V factor(V g, V out, V&) { return over_distance<Math>(g, out, T(4)); }
  FL_RULE static void add(V& sum, V own, V other, V, T f, T) {
    const V zero = {};
    const V slope = log_of_quotient<Math>(own + own, own + other, own - other);
    sum = own != zero ? sum + slope * f : sum;
  }
};

// f (log(x / y) + 1), zero at x = 0 and through a term that is infinite.
template <class Math>
struct KlOfX : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  FL_RULE static void add(V& sum, V own, V other, V, T f, T) {
    const V zero = {};
    const V slope = log_of_quotient<Math>(own, other, own - other) + T(1);
    sum = (own != zero) & (other != zero) ? sum + slope * f : sum;
  }
};

// -f x / y, with y's part at the end.
template <class Math>
struct KlOfY : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  static constexpr bool kFinish = true;
  FL_RULE static void add(V& sum, V, V other, V, T f, T) { sum += other * f; }
  FL_RULE static T finish(T sum, T own, T) { return own == 0 ? T(0) : -sum / own; }
};

// f w (x - y), with y's weights.
template <class Math>
struct ScaledOfX : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  static constexpr bool kOtherWeights = true;
  FL_RULE static V factor(V g, V out, V&) { return over_distance<Math>(g, out, T(1)); }
  FL_RULE static void add(V& sum, V own, V other, V w, T f, T) { sum += (own - other) * w * f; }
};

template <class Math>
struct ScaledOfY : DifferenceTerm<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  static constexpr bool kFinish = true;
  FL_RULE static V factor(V g, V out, V&) { return over_distance<Math>(g, out, T(1)); }
  FL_RULE static T finish(T sum, T, T own_w) { return sum * own_w; }
};

template <class Math>
struct ScaledOfW : Term<Math> {
  using typename Term<Math>::T, typename Term<Math>::V;
  FL_RULE static V factor(V g, V out, V&) { return over_distance<Math>(g, out, T(1)); }
  FL_RULE static void add(V& sum, V own, V other, V, T f, T) {
    const V apart = own - other;
    sum += apart * apart * (f * T(0.5));
  }
};

// ---- products -----------------------------------------------------------------------------------

// Pairs this near, |x - y|^2 against |x|^2 + |y|^2, are not left to the products.
template <class T>
constexpr T kNear = T(1) / 16;

// |x|^2 + |y|^2 - 2 <x, y>.
template <class Math>
FL_RULE Value<Math> from_product(Value<Math> size, Value<Math> product) {
  return size - product * Scalar<Math>(2);
}

// G with dx_i = sum_j G_ij (x_i - y_j).
template <class Math>
FL_RULE Value<Math> difference_factor(Value<Math> grad, Value<Math> out, bool rooted) {
  const Value<Math> zero = {};
  return out == zero ? zero : (rooted ? grad / out : grad * Scalar<Math>(2));
}

}  // namespace fused_losses::distance_rules
