// What the kernels over rows of embeddings share.
#pragma once

#include "platform.h"

namespace fused_losses::cuda {

constexpr float kZeroNorm = 1e-12f;  // as rows.py

// 1/|w|, 0 for a row that counts as zero; a NaN stays one.
FL_DEVICE float inverse_norm(float square) {
  const float norm = sqrtf(square);
  return norm <= kZeroNorm ? 0.0f : 1.0f / norm;
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
