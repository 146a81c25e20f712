// hamming and jaccard of booleans, 64 coordinates a word.
#pragma once

#include "sweep.h"

namespace fused_losses::FL_ISA {

inline int64_t bit_words(int64_t d) { return ceil_div(d, 64); }

inline size_t bits_bytes(const DistanceProblem& p) {
  Arena arena(nullptr);
  arena.take<uint64_t>((p.n + p.m) * bit_words(p.d));
  return arena.used();
}

// hamming and jaccard of booleans: 64 coordinates a step.
inline void bits_forward(const DistanceProblem& p, float* out, void* buffer,
                         const Parallel& parallel) {
  const int64_t wide = bit_words(p.d);
  uint64_t* packed = static_cast<uint64_t*>(buffer);
  const bool jaccard = p.kind == Distance::kJaccard;
  on_tasks(parallel, ceil_div(p.n + p.m, 64), [&](int, int64_t task) {
    for (int64_t i = task * 64; i < std::min(task * 64 + 64, p.n + p.m); ++i) {
      const uint8_t* row = i < p.n ? static_cast<const uint8_t*>(p.x) + i * p.d
                                   : static_cast<const uint8_t*>(p.y) + (i - p.n) * p.d;
      for (int64_t k = 0; k < wide; ++k) {
        uint64_t word = 0;
        for (int64_t e = k * 64; e < std::min(k * 64 + 64, p.d); ++e) {
          word |= static_cast<uint64_t>(row[e] != 0) << (e - k * 64);
        }
        packed[i * wide + k] = word;
      }
    }
  });
  constexpr int64_t kTall = 16, kColumns = 512;
  const int64_t blocks = ceil_div(p.m, kColumns);
  on_tasks(parallel, ceil_div(p.n, kTall) * blocks, [&](int, int64_t task) {
    const int64_t j0 = task % blocks * kColumns, count = std::min(kColumns, p.m - j0);
    const uint64_t* y = packed + (p.n + j0) * wide;
    int32_t differ[kColumns], either[kColumns];
    for (int64_t i = task / blocks * kTall; i < std::min((task / blocks + 1) * kTall, p.n); ++i) {
      const uint64_t* x = packed + i * wide;
      for (int64_t j = 0; j < count; ++j) {
        int64_t apart = 0, set = 0;
        for (int64_t k = 0; k < wide; ++k) {
          apart += __builtin_popcountll(x[k] ^ y[j * wide + k]);
          if (jaccard) set += __builtin_popcountll(x[k] | y[j * wide + k]);
        }
        differ[j] = static_cast<int32_t>(apart);
        either[j] = static_cast<int32_t>(set);
      }
      float* row = out + i * p.between() + j0;
      const float total = static_cast<float>(p.d);
      for (int64_t j = 0; j < count; ++j) {
        const float of = jaccard ? static_cast<float>(std::max(either[j], 1)) : total;
        row[j] = static_cast<float>(differ[j]) / of;
      }
    }
  });
}

}  // namespace fused_losses::FL_ISA
