// What makes a product a score: the projection, the bend and the bias.
#pragma once

#include "../rows.h"
#include "../warp.h"

namespace fused_losses::cuda::row_statistics {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kFour = 4;

FL_DEVICE float negative_infinity() { return -__int_as_float(0x7f800000); }

// exp(z - from); from = -inf stands for rows without any other score.
FL_DEVICE float exp_from(float z, float from) { return exp2f((z - from) * kLog2E); }

// What a row's products become before the bias is added: z up to t, p + q z + r z^2 above it.
template <bool kBent>
struct Bend {
  Pack<float, kFour> tpqr = {};

  // `bends`: [rows, 4], 16-byte aligned.
  FL_DEVICE Bend(const void* bends, int64_t row) {
    if constexpr (kBent) {
      tpqr = ld_pack(static_cast<const float*>(bends) + kFour * row);
    }
  }

  FL_DEVICE float value(float z) const {
    return kBent && z > tpqr[0] ? tpqr[1] + (tpqr[2] + tpqr[3] * z) * z : z;
  }

  FL_DEVICE float slope(float z) const {
    return kBent && z > tpqr[0] ? tpqr[2] + 2 * tpqr[3] * z : 1;
  }
};

// What makes a product a score, of the tile's columns; any may be null.
struct Columns {
  const float* inverse;  // 1/|w_j|
  const float* bias;
  const float* weight;  // v_j; null: 1
  int64_t length;

  // Columns j .. j+3 of one of them; `fill` past the last, or where it is null.
  FL_DEVICE Pack<float, kFour> at(const float* p, int64_t j, float fill) const {
    if (p != nullptr && packs(p, 0) && j + kFour <= length) return ld_pack(p + j);
    Pack<float, kFour> out;
    for (int k = 0; k < kFour; ++k) {
      out[k] = p != nullptr && j + k < length ? ld(p + j + k) : fill;
    }
    return out;
  }

  // The products at columns j .. j+3 over |w_j|; j is a multiple of 4.
  FL_DEVICE Pack<float, kFour> scaled(Pack<float, kFour> z, int64_t j) const {
    if (inverse != nullptr) {
      const Pack<float, kFour> scale = at(inverse, j, 0);
      for (int k = 0; k < kFour; ++k) z[k] *= scale[k];
    }
    return z;
  }

  // Scores of those.
  template <bool kBent>
  FL_DEVICE Pack<float, kFour> scores(Pack<float, kFour> z, int64_t j,
                                      const Bend<kBent>& bend) const {
    for (int k = 0; k < kFour; ++k) z[k] = bend.value(z[k]);
    if (bias != nullptr) {
      const Pack<float, kFour> shift = at(bias, j, 0);
      for (int k = 0; k < kFour; ++k) z[k] += shift[k];
    }
    return z;
  }
};

}  // namespace fused_losses::cuda::row_statistics
