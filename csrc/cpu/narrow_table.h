// The table of an instruction set that multiplies in bfloat16 itself: what does so is made for it,
// all else is avx512's.
#pragma once

#include "table.h"

namespace fused_losses::FL_ISA {

// Whether a call of a problem multiplies in bfloat16; in tile registers float32 may, too.
template <bool kBackward>
inline bool is_ours(const auto& p) {
  if (is_double(p)) return false;
#if defined(__AMX_BF16__)
  return true;
#endif
  return precision(p) == Precision::kBFloat16 || (kBackward && precision(p) == Precision::kMixed);
}
template <bool>
inline bool is_ours(const MaxSimProblem& p) {
  return !p.is_double && p.precision == Precision::kBFloat16;
}
template <bool>
inline bool is_ours(const TopkProblem& p) {
  return p.bf16;
}
// no metric but those of products has a form in bfloat16
template <bool kBackward>
inline bool is_ours(const DistanceProblem& p) {
  if (p.is_double || p.is_bool || !made_of_products(simplified(p))) return false;
  return p.precision == Precision::kBFloat16 || (kBackward && p.precision == Precision::kMixed);
}

constexpr auto kRowTable = row_table();
constexpr auto kClassTable = class_table();
constexpr auto kPairTable = pair_table();
constexpr auto kMaxSimTable = maxsim_table();
constexpr auto kTopkTable = topk_table();
constexpr auto kProductsTable = products_table<Pairs, float>();
constexpr auto kDivergenceTable = divergence_table();

// A kernel of one of avx512's groups, and for what is ours that of the same group here.
template <auto kGroup, auto kKernel, const auto& kOurs, bool kBackward, class Function>
struct Either;
template <auto kGroup, auto kKernel, const auto& kOurs, bool kBackward, class R, class P,
          class... Rest>
struct Either<kGroup, kKernel, kOurs, kBackward, R (*)(const P&, Rest...)> {
  static R call(const P& p, Rest... rest) {
    if (is_ours<kBackward>(p)) return (kOurs.*kKernel)(p, rest...);
    return (avx512_kernels()->*kGroup.*kKernel)(p, rest...);
  }
};

inline Kernels table(const char* capability) {
  Kernels k = *avx512_kernels();
  k.capability = capability;
  k.bf16 = true;
  k.peaks.bf16 = peak_table().bf16;
#if defined(__AMX_BF16__)
  k.split_least = &split_least;
#endif
#define FL_EITHER(group, kernel, ours, backward)                                       \
  k.group.kernel = Either<&Kernels::group, &decltype(k.group)::kernel, ours, backward, \
                          decltype(k.group.kernel)>::call
  FL_EITHER(rows, forward_bytes, kRowTable, false);
  FL_EITHER(rows, forward, kRowTable, false);
  FL_EITHER(rows, backward_bytes, kRowTable, true);
  FL_EITHER(rows, backward, kRowTable, true);
  FL_EITHER(classes, forward_bytes, kClassTable, false);
  FL_EITHER(classes, forward, kClassTable, false);
  FL_EITHER(classes, backward_bytes, kClassTable, true);
  FL_EITHER(classes, backward, kClassTable, true);
  FL_EITHER(pairs, kept, kPairTable, false);
  FL_EITHER(pairs, forward_bytes, kPairTable, false);
  FL_EITHER(pairs, forward, kPairTable, false);
  FL_EITHER(pairs, backward_bytes, kPairTable, true);
  FL_EITHER(pairs, backward, kPairTable, true);
  FL_EITHER(pairs, attention_bytes, kPairTable, false);
  FL_EITHER(pairs, attention, kPairTable, false);
  FL_EITHER(pairs, attention_backward_bytes, kPairTable, true);
  FL_EITHER(pairs, attention_backward, kPairTable, true);
  FL_EITHER(maxsim, forward_bytes, kMaxSimTable, false);
  FL_EITHER(maxsim, forward, kMaxSimTable, false);
  FL_EITHER(topk, bytes, kTopkTable, false);
  FL_EITHER(topk, run, kTopkTable, false);
  FL_EITHER(topk, scores, kTopkTable, false);
  FL_EITHER(distances, forward_bytes, kProductsTable, false);
  FL_EITHER(distances, forward, kProductsTable, false);
  FL_EITHER(distances, backward_bytes, kProductsTable, true);
  FL_EITHER(distances, backward, kProductsTable, true);
  FL_EITHER(divergence, forward_bytes, kDivergenceTable, false);
  FL_EITHER(divergence, forward, kDivergenceTable, false);
  FL_EITHER(divergence, backward_bytes, kDivergenceTable, true);
  FL_EITHER(divergence, backward, kDivergenceTable, true);
#undef FL_EITHER
  return k;
}

}  // namespace fused_losses::FL_ISA
