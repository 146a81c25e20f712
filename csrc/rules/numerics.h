// Logarithms and powers of a Math: the same formulas for the vectors of the CPU and for the single
// numbers of a CUDA thread.
//
// A Math has Scalar, Value (a vector of them, or one), Bits (integers of that width), and what
// compilers and instruction sets do differently: bits, value, to_value, magnitude, turn_sign,
// reciprocal, root, not_zero, times_power_of_two; for double also its own polynomials. Comparisons,
// `? :`, & and | mean lane by lane for a vector and the plain thing for a number. All are templates
// of Math: no function here exists for two instruction sets at once.
#pragma once

#include <cstdint>
#include <limits>

#include "../common.h"

namespace fused_losses::distance_rules {

template <class Math>
using Scalar = typename Math::Scalar;
template <class Math>
using Value = typename Math::Value;
template <class Math>
using Bits = typename Math::Bits;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLog2 = T(0.693147180559945309417L);
template <class T>
constexpr T kLog2E = T(1.44269504088896340736L);
template <class T>
constexpr int64_t kRootOfHalf = sizeof(T) == 4 ? 0x3f3504f3 : 0x3fe6a09e667f3bcd;

// log(1 + z) for z in [-0.3, 0.42], to 1e-8, of floats.
template <class V>
FL_RULE V float_log_near_one(V z) {
  V y = V{} - 7.859617647e-2f;
  y = y * z + 1.288164944e-1f;
  y = y * z - 1.312875342e-1f;
  y = y * z + 1.418119161e-1f;
  y = y * z - 1.662455416e-1f;
  y = y * z + 2.000228629e-1f;
  y = y * z - 2.500081040e-1f;
  y = y * z + 3.333331673e-1f;
  return (y * z - 0.5f) * (z * z) + z;
}

// 2^f for f in [-0.5, 0.5], of floats.
template <class V>
FL_RULE V float_small_power_of_two(V f) {
  V y = V{} + 1.534581218e-4f;
  y = y * f + 1.339993121e-3f;
  y = y * f + 9.618488956e-3f;
  y = y * f + 5.550328777e-2f;
  y = y * f + 2.402264689e-1f;
  y = y * f + 6.931472057e-1f;
  return y * f + 1.0f;
}

// v = 2^power (1 + rest) with rest in [-0.3, 0.42], for normal v; finite whatever v is.
template <class Math>
FL_RULE void split(Value<Math> v, Value<Math>* power, Value<Math>* rest) {
  constexpr int kMantissa = std::numeric_limits<Scalar<Math>>::digits - 1;
  constexpr auto kRoot = static_cast<typename Math::Code>(kRootOfHalf<Scalar<Math>>);
  const Bits<Math> bits = Math::bits(v), e = (bits - kRoot) >> kMantissa;
  *power = Math::to_value(e);
  *rest = Math::value(bits - (e << kMantissa)) - Scalar<Math>(1);
}

// log v for normal v > 0; finite at 0 and no NaN from a NaN: the caller sees to these.
template <class Math>
FL_RULE Value<Math> log_positive(Value<Math> v) {
  Value<Math> power, rest;
  split<Math>(v, &power, &rest);
  return power * kLog2<Scalar<Math>> + Math::log_near_one(rest);
}

// log(1 + t) for t in [-1, 1], where whole = 1 + t without its rounding.
template <class Math>
FL_RULE Value<Math> log_of_ratio(Value<Math> t, Value<Math> whole) {
  using T = Scalar<Math>;
  const auto near = (t > T(-0.25)) & (t < T(0.25));
  Value<Math> power, rest;
  split<Math>(whole, &power, &rest);
  const Value<Math> zero = {};
  return (near ? zero : power * kLog2<T>)+Math::log_near_one(near ? t : rest);
}

// What numbers far below 1 are multiplied by, so that none of them is subnormal.
template <class T>
constexpr T kLow = sizeof(T) == 4 ? T(0x1p-60) : T(0x1p-900);
template <class T>
constexpr int kLift = sizeof(T) == 4 ? 64 : 960;
template <class T>
constexpr T kLifted = sizeof(T) == 4 ? T(0x1p64) : T(0x1p960);

// log(a / b) for a, b > 0 of any size, apart = a - b: near each other by it, else by exponents,
// since a / b itself may be out of range. Finite at 0: the caller sees to it.
template <class Math>
FL_RULE Value<Math> log_of_quotient(Value<Math> a, Value<Math> b, Value<Math> apart) {
  using T = Scalar<Math>;
  const Value<Math> zero = {}, one = zero + T(1), up = zero + kLifted<T>;
  const auto low_a = a < kLow<T>, low_b = b < kLow<T>;
  const Value<Math> lift = low_b ? up : one, whole = b * lift;
  const Value<Math> t = (apart * lift) * Math::reciprocal(Math::not_zero(whole));
  const auto near = (t > T(-0.25)) & (t < T(0.25));
  Value<Math> power_a, power_b, rest_a, rest_b;
  split<Math>(low_a ? a * up : a, &power_a, &rest_a);
  split<Math>(whole, &power_b, &rest_b);
  const Value<Math> shift = zero + T(kLift<T>);
  const Value<Math> power =
      (low_a ? power_a - shift : power_a) - (low_b ? power_b - shift : power_b);
  const Value<Math> first = Math::log_near_one(near ? t : rest_a);
  return near ? first : power * kLog2<T> + (first - Math::log_near_one(rest_b));
}

// (1 + t) log(1 + t) + (1 - t) log(1 - t) for t in [0, 1], where rest = 1 - t without its rounding;
// of floats.
template <class Math>
FL_RULE Value<Math> float_divergence(Value<Math> t, Value<Math> rest) {
  const Value<Math> u = t * t, s = t - 0.75f;
  Value<Math> small = Value<Math>{} + 2.762525608e-2f;
  small = small * u + 1.823735078e-2f;
  small = small * u + 3.626623056e-2f;
  small = small * u + 6.663290643e-2f;
  small = small * u + 1.666674138e-1f;
  small = small * u + 1.0f;
  Value<Math> large = Value<Math>{} + 2.081863000e-3f;
  large = large * s - 5.423187961e-3f;
  large = large * s + 1.554676104e-2f;
  large = large * s - 5.441887647e-2f;
  large = large * s + 2.857143206e-1f;
  large = large * s + 1.559615765f;
  large = large * s + 9.793276288e-1f;
  return t > 0.5f ? large + rest * log_positive<Math>(rest) : small * u;
}

template <class T>
struct Exponent {
  T high, low;  // high + low, for more digits than a float has
  explicit Exponent(double p = 1)
      : high(static_cast<T>(p)), low(static_cast<T>(p - static_cast<T>(p))) {}
};

template <class Math>
FL_RULE Value<Math> nearest_integer(Value<Math> v) {
  using T = Scalar<Math>;
  constexpr T kMagic = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5 * 2^mantissa
  return (v + kMagic) - kMagic;
}

// v^p for v > 0, relative error 1e-6 (of double: 1e-14); 0 at 0 whatever p is, NaN stays.
template <class Math>
FL_RULE Value<Math> power(Value<Math> v, Exponent<Scalar<Math>> p) {
  using T = Scalar<Math>;
  Value<Math> e, rest;
  split<Math>(v, &e, &rest);
  const Value<Math> log2 = Math::log_near_one(rest) * kLog2E<T>;
  const Value<Math> whole = nearest_integer<Math>(e * p.high);
  // the exponent's large part is exact, so its rounding costs nothing
  const Value<Math> part = (e * p.high - whole) + (e * p.low + log2 * p.high);
  const Value<Math> more = nearest_integer<Math>(part);
  const Value<Math> out =
      Math::times_power_of_two(Math::small_power_of_two(part - more), whole + more);
  return (v > T(0)) & (v < kInfinity<T>) ? out : v;
}

}  // namespace fused_losses::distance_rules
