// What the kernels over rows of embeddings share.
#pragma once

#include "warp.h"

namespace fused_losses::cuda {

// A shorter row counts as zero: 1/|w| times a gradient has to be a float.
constexpr float kShortest = 0x1p-120f;

// 1/|w| of a row from its sum of squares, 0 for one that counts as zero; a NaN stays one. A warp.
template <class T>
FL_DEVICE float inverse_norm(float square, const T* row, int64_t d) {
  float factor = 1;
  if (!(square >= 0x1p-40f && square <= 0x1p40f)) {
    // squares that may have left the range: those of the row times a power of two
    const int lane = threadIdx.x % kWarp;
    float top = 0;
    FL_ROLLED
    for (int64_t k = lane; k < d; k += kWarp) top = larger(fabsf(to_float(ld(row + k))), top);
    const int bits = (254 << 23) - (__float_as_int(warp_max(top)) & 0x7f800000);
    factor = __int_as_float(bits < 1 << 23 ? 1 << 23 : bits);
    square = 0;
    FL_ROLLED
    for (int64_t k = lane; k < d; k += kWarp) {
      const float f = to_float(ld(row + k)) * factor;
      square += f * f;
    }
    square = warp_sum(square);
  }
  const float inverse = factor / sqrtf(square);
  return inverse > 1 / kShortest ? 0.0f : inverse;
}

// N neighbours, in as many 16-byte loads as they take.
template <int N, class T>
FL_DEVICE Pack<T, N> ld_many(const T* p) {
  Pack<T, N> out;
  for (int i = 0; i < N; i += kPack<T>) {
    const Pack<T, kPack<T>> part = ld_pack(p + i);
    for (int k = 0; k < kPack<T>; ++k) out[i + k] = part[k];
  }
  return out;
}

// Blocks for `items` of a warp each.
inline int64_t blocks_of_warps(int64_t items, int threads) {
  return grid_of((items * kWarp + threads - 1) / threads, 32);
}

}  // namespace fused_losses::cuda
