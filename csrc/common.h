// What every primitive's interface shares.
#pragma once

#include <cstddef>
#include <cstdint>

// A function of both sides of a CUDA source, always inlined.
#if defined(__CUDACC__)
#define FL_RULE __host__ __device__ __forceinline__
#else
#define FL_RULE [[gnu::always_inline]] inline
#endif

namespace fused_losses {

enum class Precision { kFull, kMixed, kBFloat16 };

// How rows lie that are read a block at a time: in the type that sums are held in, or in 16 bits.
enum class Stored { kWide, kBFloat16, kHalf };

// Runs body(0) and body(i) of some other i in [0, count), on threads or not: of those that come in
// time. So a body claims its part of the work, it is dealt none.
struct Parallel {
  int threads;
  void (*run)(int count, void (*body)(void*, int), void* context);
};

FL_RULE constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

}  // namespace fused_losses
