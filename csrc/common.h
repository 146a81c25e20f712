// What every primitive's interface shares.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_losses {

enum class Precision { kFull, kMixed, kBFloat16 };

// Runs body(i) for i in [0, count), on threads or not.
struct Parallel {
  int threads;
  void (*run)(int count, void (*body)(void*, int), void* context);
};

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace fused_losses
