// What the distances compute with: parts of vectors, reciprocals, roots, logarithms, powers.
#pragma once

#include <limits>

#include "pair_tile.h"

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
inline Floats log_near_one(Floats z) {
  Floats y = Floats{} - 7.859617647e-2f;
  y = y * z + 1.288164944e-1f;
  y = y * z - 1.312875342e-1f;
  y = y * z + 1.418119161e-1f;
  y = y * z - 1.662455416e-1f;
  y = y * z + 2.000228629e-1f;
  y = y * z - 2.500081040e-1f;
  y = y * z + 3.333331673e-1f;
  return (y * z - 0.5f) * (z * z) + z;
}

inline Vector<double> log_near_one(Vector<double> z) {
  // 2 atanh(s) and s = z / (2 + z), written so that z itself is exact
  const Vector<double> s = z * reciprocal(z + 2.0), q = s * s;
  Vector<double> y = Vector<double>{} + 1.0 / 23;
  for (int k = 21; k >= 3; k -= 2) y = y * q + 1.0 / k;
  return z - s * (z - y * (q * 2.0));
}

constexpr Code<float> kRootOfHalf(float) { return 0x3f3504f3; }
constexpr Code<double> kRootOfHalf(double) { return 0x3fe6a09e667f3bcd; }

// v = 2^power (1 + rest) with rest in [-0.3, 0.42], for normal v; finite whatever v is.
template <class T>
inline void split(Vector<T> v, Vector<T>* power, Vector<T>* rest) {
  constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
  const auto bits = (Vector<Code<T>>)v, e = (bits - kRootOfHalf(T())) >> kMantissa;
  *power = __builtin_convertvector(e, Vector<T>);
  *rest = (Vector<T>)(bits - (e << kMantissa)) - T(1);
}

template <class T>
constexpr T kLog2 = T(0.693147180559945309417L);
template <class T>
constexpr T kLog2E = T(1.44269504088896340736L);

// log v for normal v > 0; finite at 0 and no NaN from a NaN: the caller sees to these.
template <class T>
inline Vector<T> log_positive(Vector<T> v) {
  Vector<T> power, rest;
  split<T>(v, &power, &rest);
  return power * kLog2<T> + log_near_one(rest);
}

template <class T>
struct Exponent {
  T high, low;  // high + low, for more digits than a float has
  explicit Exponent(double p = 1)
      : high(static_cast<T>(p)), low(static_cast<T>(p - static_cast<T>(p))) {}
};

template <class T>
inline Vector<T> nearest_integer(Vector<T> v) {
  constexpr T kMagic = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);  // 1.5 * 2^mantissa
  return (v + kMagic) - kMagic;
}

// 2^f for f in [-0.5, 0.5].
inline Floats small_power_of_two(Floats f) {
  Floats y = Floats{} + 1.534581218e-4f;
  y = y * f + 1.339993121e-3f;
  y = y * f + 9.618488956e-3f;
  y = y * f + 5.550328777e-2f;
  y = y * f + 2.402264689e-1f;
  y = y * f + 6.931472057e-1f;
  return y * f + 1.0f;
}

inline Vector<double> small_power_of_two(Vector<double> f) {
  const Vector<double> x = f * kLog2<double>;
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

// v^p for v > 0, relative error 1e-6 (of double: 1e-14); 0 at 0 whatever p is, NaN stays.
template <class T>
inline Vector<T> power(Vector<T> v, Exponent<T> p) {
  Vector<T> e, rest;
  split<T>(v, &e, &rest);
  const Vector<T> log2 = log_near_one(rest) * kLog2E<T>;
  const Vector<T> whole = nearest_integer<T>(e * p.high);
  // the exponent's large part is exact, so its rounding costs nothing
  const Vector<T> part = (e * p.high - whole) + (e * p.low + log2 * p.high);
  const Vector<T> more = nearest_integer<T>(part);
  const Vector<T> out = times_power_of_two<T>(small_power_of_two(part - more), whole + more);
  return (v > T(0)) & (v < std::numeric_limits<T>::infinity()) ? out : v;
}

// (1 + t) log(1 + t) + (1 - t) log(1 - t) for t in [0, 1], where rest = 1 - t without its rounding.
inline Floats divergence(Floats t, Floats rest) {
  const Floats u = t * t, s = t - 0.75f;
  Floats small = Floats{} + 2.762525608e-2f;
  small = small * u + 1.823735078e-2f;
  small = small * u + 3.626623056e-2f;
  small = small * u + 6.663290643e-2f;
  small = small * u + 1.666674138e-1f;
  small = small * u + 1.0f;
  Floats large = Floats{} + 2.081863000e-3f;
  large = large * s - 5.423187961e-3f;
  large = large * s + 1.554676104e-2f;
  large = large * s - 5.441887647e-2f;
  large = large * s + 2.857143206e-1f;
  large = large * s + 1.559615765f;
  large = large * s + 9.793276288e-1f;
  return t > 0.5f ? large + rest * log_positive<float>(rest) : small * u;
}

inline Vector<double> divergence(Vector<double> t, Vector<double> rest) {
  const Vector<double> u = t * t, whole = t + 1.0;
  Vector<double> small = Vector<double>{} + 1.0 / 153;
  for (int k = 8; k >= 1; --k) small = small * u + 1.0 / (k * (2 * k - 1));
  const Vector<double> logs =
      whole * log_positive<double>(whole) + rest * log_positive<double>(rest);
  return t > 0.1 ? logs : small * u;
}

// log(1 + t) for t in [-1, 1], where whole = 1 + t without its rounding.
template <class T>
inline Vector<T> log_of_ratio(Vector<T> t, Vector<T> whole) {
  const auto near = (t > T(-0.25)) & (t < T(0.25));
  Vector<T> power, rest;
  split<T>(whole, &power, &rest);
  const Vector<T> zero = {};
  return (near ? zero : power * kLog2<T>)+log_near_one(near ? t : rest);
}

}  // namespace fused_losses::FL_ISA
