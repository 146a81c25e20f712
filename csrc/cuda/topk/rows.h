// Rows of any type, in double.
#pragma once

#include "../warp.h"

namespace fused_losses::cuda::topk {

constexpr int32_t kTypeDouble = 4;

enum Kind : int32_t { kDot, kCosine, kSquaredDistance };

FL_DEVICE double to_double(double v) { return v; }
FL_DEVICE double to_double(int8_t v) { return v; }
template <class T>
FL_DEVICE double to_double(T v) {
  return to_float(v);
}

// f(T{}) for any type that rows come in.
template <class F>
int with_row_type(int32_t type, F&& f) {
  if (type == kTypeInt8) return f(int8_t{});
  if (type == kTypeDouble) return f(double{});
  return with_float_type(type, f);
}

FL_DEVICE double load_element(const void* row, int32_t type, int64_t k) {
  switch (type) {
    case kTypeBf16:
      return to_double(ld(static_cast<const Bf16*>(row) + k));
    case kTypeHalf:
      return to_double(ld(static_cast<const Half*>(row) + k));
    case kTypeDouble:
      return ld(static_cast<const double*>(row) + k);
    default:
      return to_double(ld(static_cast<const float*>(row) + k));
  }
}

// How many lanes share a row: as many as have a pack of it.
template <class T>
int sharing(int64_t d) {
  int group = 1;
  while (group < kWarp && int64_t(group) * kPack<T> < d) group *= 2;
  return group;
}

// f(element, its place if the shares of all lanes lay side by side, value) for a lane's share of a
// row: a pack, then the group's next; zeros past the end. The same whether rows are aligned or not.
template <class T, class F>
FL_DEVICE void for_share(const T* row, int64_t d, int group, int part, bool aligned, F f) {
  constexpr int kWide = kPack<T>;
  int64_t place = part;
  for (int64_t k = int64_t(part) * kWide; k < d; k += int64_t(group) * kWide) {
    Pack<T, kWide> v;
    if (aligned && k + kWide <= d) {
      v = ld_pack(row + k);
    } else {
      for (int e = 0; e < kWide; ++e) v[e] = k + e < d ? ld(row + k + e) : T{};
    }
    for (int e = 0; e < kWide; ++e) f(k + e, place + e * group, to_double(v[e]));
    place += int64_t(kWide) * group;
  }
}

// Every lane of a group gets the sum of the group's.
FL_DEVICE double group_sum(double v, int group) {
  FL_ROLLED
  for (int apart = group / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(kAllLanes, v, apart);
  return v;
}

// 1 / |v|, 0 for a row of zeros.
FL_DEVICE double inverse_length(double square) {
#if defined(__CUDA_ARCH__)
  const double inverse = rsqrt(square);  // a root and a quotient call functions, which spill
#else
  const double inverse = 1 / std::sqrt(square);
#endif
  return square <= 1e-24 ? 0.0 : inverse;
}

}  // namespace fused_losses::cuda::topk
