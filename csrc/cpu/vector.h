// Vectors of one instruction set, in the compiler's vector extension; included by one .cpp a set.
#pragma once

#include <cmath>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fused_losses::FL_ISA {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(FL_VECTOR_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
using Floats = Vector<float>;
using Ints = Vector<int32_t>;

template <class T>
constexpr int64_t kLanes = FL_VECTOR_BYTES / sizeof(T);

template <class T>
inline Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T>
inline void store(T* p, Vector<T> v) {
  __builtin_memcpy(p, &v, sizeof v);
}

// Whether a comparison holds in any lane.
template <class Mask>
inline bool any(Mask mask) {
#if defined(__AVX512F__)
  const __m512i words = (__m512i)mask;
  return _mm512_test_epi64_mask(words, words) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int64_t words[sizeof mask / sizeof(int64_t)], found = 0;
  __builtin_memcpy(words, &mask, sizeof mask);
  for (const int64_t word : words) found |= word;
  return found != 0;
#endif
}

template <class T>
inline Vector<T> broadcast(T x) {
  Vector<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = x;
  return v;
}

// Past the caches; the address is aligned to the vector.
template <class T>
inline void stream(T* p, Vector<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return _mm256_stream_ps(p, (__m256)v);
#endif
  store(p, v);
}

template <class T>
inline T sum(Vector<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

// <a, b> in four vectors of sums: one would wait for itself.
template <class T>
inline T dot(const T* a, const T* b, int64_t d) {
  constexpr int64_t kStep = kLanes<T>;
  Vector<T> sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * kStep <= d; e += 4 * kStep) {
    for (int v = 0; v < 4; ++v) sums[v] += load(a + e + v * kStep) * load(b + e + v * kStep);
  }
  T total = sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  for (; e < d; ++e) total += a[e] * b[e];
  return total;
}

// exp to 2 units in the last place for x <= 80 (more is cut to 80); 0 below -87.3; NaN stays NaN.
inline Floats exp(Floats x) {
  const Floats zero = {};
  const Floats cut = x > 80.0f ? zero + 80.0f : x;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = (cut * 1.44269504088896341f + magic) - magic;
  Floats r = cut - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats y = zero + 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  const Ints power = (__builtin_convertvector(n, Ints) + 127) << 23;
  y = y * (Floats)power;
  return x < -87.33654f ? zero : y;
}

inline Vector<double> exp(Vector<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bf16(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512BF16__)
// bfloat16 of a in the low halves and of b in the high halves, lane by lane.
inline Vector<uint32_t> interleave(Floats a, Floats b) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
  return (Vector<uint32_t>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__)
// out[c][r] = in[r][c] for 8 x 8 words; as floats, which moves leave as they are.
inline void transpose8(const float* in, int64_t ld, float* out, int64_t ld_out) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(in + i * ld);
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  // a[4 g + q]: columns q and q + 4, rows of group g
  for (int g = 0; g < 8; g += 4) {
    a[g] = _mm256_shuffle_ps(b[g], b[g + 2], 0x44);
    a[g + 1] = _mm256_shuffle_ps(b[g], b[g + 2], 0xee);
    a[g + 2] = _mm256_shuffle_ps(b[g + 1], b[g + 3], 0x44);
    a[g + 3] = _mm256_shuffle_ps(b[g + 1], b[g + 3], 0xee);
  }
  for (int q = 0; q < 4; ++q) {
    _mm256_storeu_ps(out + q * ld_out, _mm256_permute2f128_ps(a[q], a[4 + q], 0x20));
    _mm256_storeu_ps(out + (4 + q) * ld_out, _mm256_permute2f128_ps(a[q], a[4 + q], 0x31));
  }
}
#endif

// out[c][r] = in[r][c] for 16 x 16 words.
template <class Word>
inline void transpose16(const Word* in, int64_t ld, Word* out, int64_t ld_out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Word) == 4) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(in + i * ld);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int h = 0; h < 2; ++h) {
        a[i + 2 * h] = _mm512_unpacklo_epi64(b[i + h], b[i + h + 2]);
        a[i + 2 * h + 1] = _mm512_unpackhi_epi64(b[i + h], b[i + h + 2]);
      }
    }
    // a[4 g + q]: column q of each lane of four, rows of group g
    for (int q = 0; q < 4; ++q) {
      const __m512i even_low = _mm512_shuffle_i32x4(a[q], a[4 + q], 0x88);
      const __m512i odd_low = _mm512_shuffle_i32x4(a[q], a[4 + q], 0xdd);
      const __m512i even_high = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0x88);
      const __m512i odd_high = _mm512_shuffle_i32x4(a[8 + q], a[12 + q], 0xdd);
      _mm512_storeu_si512(out + q * ld_out, _mm512_shuffle_i32x4(even_low, even_high, 0x88));
      _mm512_storeu_si512(out + (8 + q) * ld_out, _mm512_shuffle_i32x4(even_low, even_high, 0xdd));
      _mm512_storeu_si512(out + (4 + q) * ld_out, _mm512_shuffle_i32x4(odd_low, odd_high, 0x88));
      _mm512_storeu_si512(out + (12 + q) * ld_out, _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd));
    }
    return;
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(Word) == 4) {
    for (int part = 0; part < 4; ++part) {
      const int r = part / 2 * 8, c = part % 2 * 8;
      transpose8(reinterpret_cast<const float*>(in + r * ld + c), ld,
                 reinterpret_cast<float*>(out + c * ld_out + r), ld_out);
    }
    return;
  }
#endif
  for (int c = 0; c < 16; ++c) {
    for (int r = 0; r < 16; ++r) out[c * ld_out + r] = in[r * ld + c];
  }
}

}  // namespace fused_losses::FL_ISA
