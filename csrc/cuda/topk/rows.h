// Rows of any type, in double.
#pragma once

#include "../warp.h"

namespace fused_losses::cuda::topk {

constexpr int32_t kTypeDouble = 4;
constexpr double kZeroSquare = 1e-24;  // of a row that counts as zeros

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

FL_DEVICE double inverse_root(double v) {
#if defined(__CUDA_ARCH__)
  return rsqrt(v);  // a root and a quotient call functions, which spill
#else
  return 1 / std::sqrt(v);
#endif
}

// 1 / |v|, 0 for a row of zeros.
FL_DEVICE double inverse_length(double square) {
  const double inverse = inverse_root(square);
  return square <= kZeroSquare ? 0.0 : inverse;
}

// <x, y> / (|x| |y|), exactly 1 for equal rows and the same for rows of integers in one direction:
// the root of a quotient of sums, each rounded once (but for a case in 2^50).
FL_DEVICE double cosine_of(double product, double x_square, double y_square) {
  if (x_square <= kZeroSquare || y_square <= kZeroSquare) return 0 * product;
  const double square = x_square * y_square, over = product * product;
  double cosine = std::abs(product) * inverse_root(x_square) * inverse_root(y_square);
  if (square < 1e300) {
    const double inverse = inverse_root(square);
    double each = inverse * inverse;
    each = std::fma(std::fma(-square, each, 1.0), each, each);
    double quotient = over * each;
    quotient = std::fma(std::fma(-square, quotient, over), each, quotient);
    const double root = quotient * inverse_root(quotient);
    cosine = std::fma(std::fma(-root, root, quotient), 0.5 * inverse_root(quotient), root);
    if (quotient == 0) cosine = 0;
  }
  cosine = cosine > 1 ? 1.0 : cosine;
  return product < 0 ? -cosine : cosine;
}

}  // namespace fused_losses::cuda::topk
