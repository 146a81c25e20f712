// Rows of any type as floats, and rows of bits.
#pragma once

#include "math.h"

namespace fused_losses::cuda::distances {

// Words of a row of bits, for which nothing is converted.
constexpr int32_t kTypeWords = -1;

struct Rows {
  const void* at;
  int64_t stride, count;
  int32_t d, type;
};

FL_DEVICE float element(const Rows& rows, int64_t i, int32_t k) {
  const int64_t at = i * rows.stride + k;
  if (rows.type == kTypeFloat) return ld(static_cast<const float*>(rows.at) + at);
  if (rows.type == kTypeBf16) return to_float(ld(static_cast<const Bf16*>(rows.at) + at));
  return to_float(ld(static_cast<const Half*>(rows.at) + at));
}

template <class V, class T>
FL_DEVICE V widened(T v) {
  if constexpr (std::is_same_v<V, T>) {
    return v;
  } else {
    return to_float(v);
  }
}

// A pack of a row from coordinate k on, zeros past its end.
template <class T, class V>
FL_DEVICE void load_pack(const T* row, int32_t k, int32_t d, bool packed, V* v) {
  constexpr int kWide = kPack<T>;
  if (packed && k + kWide <= d) {
    const auto pack = ld_pack(row + k);
    for (int c = 0; c < kWide; ++c) v[c] = widened<V>(pack[c]);
  } else {
    for (int c = 0; c < kWide; ++c) v[c] = k + c < d ? widened<V>(ld(row + k + c)) : V(0);
  }
}

// Four numbers `stride` apart of which `real` exist, zeros after them; `packed`: neighbours that
// can be read at once.
FL_DEVICE void load_four(const float* p, int64_t stride, int64_t real, bool packed, float* v) {
  if (packed && real >= 4) {
    const auto pack = ld_pack(p);
    for (int c = 0; c < 4; ++c) v[c] = pack[c];
  } else {
    for (int c = 0; c < 4; ++c) v[c] = c < real ? ld(p + c * stride) : 0.0f;
  }
}

FL_DEVICE void store_four(float* p, int64_t real, bool packed, const float* v) {
  if (packed && real >= 4) {
    st_pack(p, Pack<float, 4>{{v[0], v[1], v[2], v[3]}});
  } else {
    for (int c = 0; c < 4; ++c) {
      if (c < real) st(p + c, v[c]);
    }
  }
}

// f(rows as pointers to their type, whether they can be read in packs).
template <class V, class F>
FL_DEVICE void with_rows(const Rows& rows, F&& f) {
  if constexpr (std::is_same_v<V, uint32_t>) {
    const auto* at = static_cast<const uint32_t*>(rows.at);
    f(at, packs(at, rows.stride));
  } else if (rows.type == kTypeFloat) {
    const auto* at = static_cast<const float*>(rows.at);
    f(at, packs(at, rows.stride));
  } else if (rows.type == kTypeBf16) {
    const auto* at = static_cast<const Bf16*>(rows.at);
    f(at, packs(at, rows.stride));
  } else {
    const auto* at = static_cast<const Half*>(rows.at);
    f(at, packs(at, rows.stride));
  }
}

}  // namespace fused_losses::cuda::distances
