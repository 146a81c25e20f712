// The inner product of the tile loop: a block of rows by 4 vectors of columns, all in registers.
//
// A operands are words read one at a time and broadcast; B is packed in panels of kPanel columns,
// panel[k][kPanel]. A word is a float, a double, or two bfloat16 that are multiplied in one step.
#pragma once

#if defined(__AMX_BF16__)
#include "amx.h"
#else
#include "vector.h"
#endif

namespace fused_losses::FL_ISA {

#if defined(__AVX512F__)
constexpr int kVectors = 4;  // 24 of 32 registers accumulate
#else
constexpr int kVectors = 2;  // 12 of 16
#endif
constexpr int kRows = 6;  // at once, of what is summed in vectors

// Products in the type that accumulates.
template <class T>
struct Plain {
  using Word = T;
  using Sum = T;
  static constexpr int64_t kPair = 1;  // elements of the inner dimension in a word
  static constexpr int kAtOnce = kRows;
  static Vector<T> multiply_add(Vector<T> sum, T a, Vector<T> b) { return sum + a * b; }
  using Packed = Vector<T>;
};

#if defined(__AVX512BF16__)
// bfloat16 products, two inner elements a word, summed in float32.
struct Pairs {
  using Word = uint32_t;
  using Sum = float;
  static constexpr int64_t kPair = 2;
#if defined(__AMX_BF16__)
  static constexpr int kAtOnce = kTileRows;
#else
  static constexpr int kAtOnce = kRows;
#endif
  using Packed = Vector<uint32_t>;
  static Floats multiply_add(Floats sum, uint32_t a, Packed b) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a),
                                    (__m512bh)(__m512i)b);
  }
};
#endif

// Whether products are summed in tile registers and not in vectors.
template <class P>
constexpr bool kInTiles = P::kAtOnce != kRows;

template <class P>
constexpr int64_t kPanel = kVectors * kLanes<typename P::Sum>;

// finish(row, vector, sum) receives sum_k a[row][k * stride] * b[k][vector].
template <class P, bool kUnitStride, class Finish>
[[gnu::always_inline]] inline void multiply(const typename P::Word* const* a, int64_t stride,
                                            const typename P::Word* b, int64_t depth,
                                            Finish&& finish) {
  using Word = typename P::Word;
  using Sum = Vector<typename P::Sum>;
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<P>) {
    static_assert(kUnitStride);
    return multiply_in_tiles<kVectors>(a, depth, 0, 1, b, finish);
  }
#endif
  Sum sums[kRows][kVectors] = {};
  const Word *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  const int64_t step = kUnitStride ? 1 : stride;
  int64_t at = 0;
  for (int64_t k = 0; k < depth; ++k, at += step, b += kPanel<P>) {
    typename P::Packed columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes<Word>);
    const Word words[kRows] = {a0[at], a1[at], a2[at], a3[at], a4[at], a5[at]};
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = P::multiply_add(sums[r][v], words[r], columns[v]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) finish(r, v, sums[r][v]);
  }
}

// As `multiply`, for left operands that lie in `runs` pieces of `run` words, `jump` words apart.
template <class P, class Finish>
[[gnu::always_inline]] inline void multiply_runs(const typename P::Word* const* a, int64_t run,
                                                 int64_t jump, int64_t runs,
                                                 const typename P::Word* b, Finish&& finish) {
  using Word = typename P::Word;
  using Sum = Vector<typename P::Sum>;
#if defined(__AMX_BF16__)
  if constexpr (kInTiles<P>) {
    return multiply_in_tiles<kVectors>(a, run, jump, runs, b, finish);
  }
#endif
  Sum sums[kRows][kVectors] = {};
  const Word *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3], *a4 = a[4], *a5 = a[5];
  for (int64_t piece = 0; piece < runs; ++piece) {
    // the next pieces: no hardware prefetcher guesses the jump
    for (const Word* next : {a0, a1, a2, a3, a4, a5}) {
      for (int64_t e = 0; e < run; e += 64 / sizeof(Word)) __builtin_prefetch(next + jump + e);
    }
    for (int64_t at = 0; at < run; ++at, b += kPanel<P>) {
      typename P::Packed columns[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) columns[v] = load(b + v * kLanes<Word>);
      const Word words[kRows] = {a0[at], a1[at], a2[at], a3[at], a4[at], a5[at]};
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = P::multiply_add(sums[r][v], words[r], columns[v]);
        }
      }
    }
    a0 += jump, a1 += jump, a2 += jump, a3 += jump, a4 += jump, a5 += jump;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) finish(r, v, sums[r][v]);
  }
}

}  // namespace fused_losses::FL_ISA
