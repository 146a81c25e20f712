// The peak of the products that the tile loops are made of.
#pragma once

#include "../peaks.h"
#include "product.h"

namespace fused_losses::FL_ISA {

// As many sums as `multiply` has: enough of them to hide a step's latency.
template <class P>
inline double multiply_registers(int64_t steps, typename P::Word one) {
  using Sum = Vector<typename P::Sum>;
  constexpr int kSums = kRows * kVectors;
  Sum sums[kSums];
  // no two alike, or the compiler would keep one
  for (int i = 0; i < kSums; ++i) sums[i] = broadcast(static_cast<typename P::Sum>(i));
  // what the compiler knew would be no product
  volatile typename P::Word hidden = one;
  const typename P::Word left = hidden;
  const auto right = broadcast<typename P::Word>(hidden);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 24
    for (int i = 0; i < kSums; ++i) {
      // a product of two that stay would be taken out of the loop
      if constexpr (P::kPair == 1) {
        sums[i] = P::multiply_add(right, left, sums[i]);
      } else {
        sums[i] = P::multiply_add(sums[i], left, right);
      }
    }
  }
  Sum total = {};
  for (int i = 0; i < kSums; ++i) total += sums[i];
  // read by nobody, but computed
  [[maybe_unused]] volatile typename P::Sum kept = sum<typename P::Sum>(total);
  return 2.0 * P::kPair * kSums * kLanes<typename P::Sum> * static_cast<double>(steps);
}

constexpr PeakKernels peak_table() {
  PeakKernels k{};
  k.fp32 = [](int64_t steps) { return multiply_registers<Plain<float>>(steps, 1.0f); };
#if defined(__AMX_BF16__)
  k.bf16 = multiply_tiles_alone;
#elif defined(__AVX512BF16__)
  k.bf16 = [](int64_t steps) { return multiply_registers<Pairs>(steps, 0x3f803f80u); };
#endif
  return k;
}

}  // namespace fused_losses::FL_ISA
