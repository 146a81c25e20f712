// What the distances compute with: parts of vectors, reciprocals, roots, logarithms, powers.
#pragma once

#include <limits>

#include "../../rules/numerics.h"
#include "../pairs/tile.h"

namespace fused_losses::FL_ISA {

// The first `real` elements at p, zeros after them.
template <class T>
inline Vector<T> load_part(const T* p, int64_t real) {
  if (real >= kLanes<T>) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_loadu_ps((1u << real) - 1, p);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_maskz_loadu_pd((1u << real) - 1, p);
#endif
  Vector<T> v = {};
  for (int64_t l = 0; l < real; ++l) v[l] = p[l];
  return v;
}

template <class T>
inline void store_part(T* p, Vector<T> v, int64_t real) {
  if (real >= kLanes<T>) return store(p, v);
  for (int64_t l = 0; l < real; ++l) p[l] = v[l];
}

template <class T>
constexpr Code<T> kSignBit = std::numeric_limits<Code<T>>::min();

template <class T>
inline Vector<T> magnitude(Vector<T> v) {
  return (Vector<T>)((Vector<Code<T>>)v & ~kSignBit<T>);
}

// v with its sign turned where `by` is negative.
template <class T>
inline Vector<T> turn_sign(Vector<T> v, Vector<T> by) {
#if defined(__AVX512F__)
  constexpr int kXorOfAnd = 0x78;
  const __m512i bit = (__m512i)(Vector<Code<T>>{} + kSignBit<T>);
  return (Vector<T>)_mm512_ternarylogic_epi64((__m512i)v, (__m512i)by, bit, kXorOfAnd);
#else
  return (Vector<T>)((Vector<Code<T>>)v ^ ((Vector<Code<T>>)by & kSignBit<T>));
#endif
}

// Which lanes do not have a >= b; a NaN has not.
#if defined(__AVX512F__)
using Lanes = uint32_t;
inline Lanes below(Floats a, Floats b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NGE_UQ);
}
inline Lanes below(Vector<double> a, Vector<double> b) {
  return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_NGE_UQ);
}
#else
using Lanes = uint32_t;
template <class V>
inline Lanes below(V a, V b) {
  const auto high = a >= b;
  constexpr int kCount = sizeof(V) / sizeof(a[0]);
  Lanes out = 0;
#if defined(__AVX2__)
  if constexpr (sizeof(a[0]) == 4) return ~_mm256_movemask_ps((__m256)high) & 0xff;
  if constexpr (sizeof(a[0]) == 8) return ~_mm256_movemask_pd((__m256d)high) & 0xf;
#endif
  for (int l = 0; l < kCount; ++l) out |= high[l] ? 0 : 1u << l;
  return out;
}
#endif

// 1 / v to 2 units in the last place, for normal v whose reciprocal is normal; inf at 0.
inline Floats reciprocal(Floats v) {
#if defined(__AVX512F__)
  const Floats r = (Floats)_mm512_rcp14_ps((__m512)v);
  return r + r * (1.0f - v * r);
#elif defined(__AVX2__)
  const Floats r = (Floats)_mm256_rcp_ps((__m256)v);
  return r + r * (1.0f - v * r);
#else
  return 1.0f / v;
#endif
}

inline Vector<double> reciprocal(Vector<double> v) {
#if defined(__AVX512F__)
  Vector<double> r = (Vector<double>)_mm512_rcp14_pd((__m512d)v);
  r = r + r * (1.0 - v * r);
  return r + r * (1.0 - v * r);
#else
  return 1.0 / v;
#endif
}

inline Floats root(Floats v) {
#if defined(__AVX512F__)
  // half the time of the instruction that takes roots
  const Floats y = (Floats)_mm512_rsqrt14_ps((__m512)v), h = v * y;
  const Floats r = h + (y * 0.5f) * (v - h * h);
  return (v > 0.0f) & (v < std::numeric_limits<float>::infinity()) ? r : v;
#else
  return square_root<float>(v);
#endif
}

inline Vector<double> root(Vector<double> v) { return square_root<double>(v); }

// At least the smallest normal number; a NaN stays.
template <class T>
inline Vector<T> not_zero(Vector<T> v) {
  const Vector<T> tiny = Vector<T>{} + std::numeric_limits<T>::min();
  // of two the instruction gives the second where one is NaN
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_max_ps((__m512)tiny, (__m512)v);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_max_pd((__m512d)tiny, (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_max_ps((__m256)tiny, (__m256)v);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm256_max_pd((__m256d)tiny, (__m256d)v);
#endif
  return tiny > v ? tiny : v;
}

// log(1 + z) for z in [-0.3, 0.42], to 1e-8 (of double: relative error 1e-15).
inline Floats log_near_one(Floats z) { return distance_rules::float_log_near_one(z); }

inline Vector<double> log_near_one(Vector<double> z) {
  // 2 atanh(s) and s = z / (2 + z), written so that z itself is exact
  const Vector<double> s = z * reciprocal(z + 2.0), q = s * s;
  Vector<double> y = Vector<double>{} + 1.0 / 23;
  for (int k = 21; k >= 3; k -= 2) y = y * q + 1.0 / k;
  return z - s * (z - y * (q * 2.0));
}

// 2^f for f in [-0.5, 0.5].
inline Floats small_power_of_two(Floats f) { return distance_rules::float_small_power_of_two(f); }

inline Vector<double> small_power_of_two(Vector<double> f) {
  const Vector<double> x = f * distance_rules::kLog2<double>;
  Vector<double> y = Vector<double>{} + 1.0 + x * (1.0 / 13);
  for (int k = 12; k >= 1; --k) y = y * x * (1.0 / k) + 1.0;
  return y;
}

// v 2^n for integers n; 0 below the range and inf above it.
template <class T>
inline Vector<T> times_power_of_two(Vector<T> v, Vector<T> n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_scalef_ps((__m512)v, (__m512)n);
  if constexpr (sizeof(T) == 8) return (Vector<T>)_mm512_scalef_pd((__m512d)v, (__m512d)n);
#endif
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
  constexpr Code<T> kBias = std::numeric_limits<T>::max_exponent - 1;
  const Vector<T> zero = {}, low = zero - T(kBias), high = zero + T(kBias + 1);
  n = n < low ? low : n;
  n = n > high ? high : n;
  return v * (Vector<T>)((__builtin_convertvector(n, Vector<Code<T>>) + kBias) << kMantissa);
}

inline Vector<double> divergence(Vector<double> t, Vector<double> rest);

// What the rules of distances compute with (../rules/numerics.h).
template <class T>
struct DistanceMath {
  using Scalar = T;
  using Value = Vector<T>;
  using Code = FL_ISA::Code<T>;
  using Bits = Vector<Code>;

  static Bits bits(Value v) { return (Bits)v; }
  static Value value(Bits v) { return (Value)v; }
  static Value to_value(Bits v) { return __builtin_convertvector(v, Value); }
  static Value all(T v) { return broadcast<T>(v); }
  static Value magnitude(Value v) { return FL_ISA::magnitude<T>(v); }
  static Value turn_sign(Value v, Value by) { return FL_ISA::turn_sign<T>(v, by); }
  static Value reciprocal(Value v) { return FL_ISA::reciprocal(v); }
  static Value root(Value v) { return FL_ISA::root(v); }
  static Value not_zero(Value v) { return FL_ISA::not_zero<T>(v); }
  static Value log_near_one(Value v) { return FL_ISA::log_near_one(v); }
  static Value small_power_of_two(Value v) { return FL_ISA::small_power_of_two(v); }
  static Value times_power_of_two(Value v, Value n) { return FL_ISA::times_power_of_two<T>(v, n); }
  static Value divergence(Value t, Value rest) {
    if constexpr (sizeof(T) == 4) return distance_rules::float_divergence<DistanceMath>(t, rest);
    if constexpr (sizeof(T) == 8) return FL_ISA::divergence(t, rest);
  }
};

inline Vector<double> divergence(Vector<double> t, Vector<double> rest) {
  const Vector<double> u = t * t, whole = t + 1.0;
  Vector<double> small = Vector<double>{} + 1.0 / 153;
  for (int k = 8; k >= 1; --k) small = small * u + 1.0 / (k * (2 * k - 1));
  const Vector<double> logs = whole * distance_rules::log_positive<DistanceMath<double>>(whole) +
                              rest * distance_rules::log_positive<DistanceMath<double>>(rest);
  return t > 0.1 ? logs : small * u;
}

}  // namespace fused_losses::FL_ISA
