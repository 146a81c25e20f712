// Small right kernels, each with faults to plant: what executes kernels must notice every one.
#include "cuda/platform.h"

namespace fused_losses::cuda {

#define HARNESS_FIELDS(F) \
  F(const void*, x)       \
  F(const void*, y) F(void*, out) F(int64_t, n) F(int64_t, d) F(int32_t, blocks) F(int32_t, fault)
FL_ARGUMENTS(HarnessArguments, HARNESS_FIELDS)

// As test_cuda_harness.py numbers them.
enum Fault : int32_t {
  kNone,
  kNoBarrier,         // between writing shared memory and reading it
  kNoStepBarrier,     // between the steps of a tree
  kNoLastBarrier,     // before shared memory is written again
  kSkippedBarrier,    // some threads go past
  kTwoBarriers,       // threads of a block at different ones
  kEarlyExit,         // threads end before a barrier
  kGlobalShift,       // an index one too large, in global memory
  kSharedShift,       // and in shared
  kSharedPastEnd,     // a load one past shared memory
  kUninitialised,     // shared memory that nobody wrote
  kNoMask,            // no test of the tail
  kNoStoreMask,       // nor for the stores
  kMisaligned,        // a pack where rows are not aligned
  kWrongBuffer,       // a store to an input
  kNotAtomic,         // load, add, store
  kAbsentLane,        // a shuffle that one lane does not come to
  kForeignLane,       // a shuffle that reads a lane out of its mask
  kOwnLane,           // a shuffle with a mask without the caller
  kMixedCollectives,  // half a warp shuffles, half votes
  kMissingStep,       // a reduction one step short
  kNoWarpBarrier,     // between lanes' writing shared memory and others' reading it
  kHalfWarpBarrier,   // reached by half of its mask
};

FL_DEVICE const float* floats(const void* p) { return static_cast<const float*>(p); }

// ---- sums of rows: a tree in shared memory -----------------------------------------------------

struct SumShared {
  float part[128];
};

FL_KERNEL(128) row_sums(HarnessArguments a) {
  FL_SHARED(SumShared, s);
  const int t = threadIdx.x;
  if (a.fault == kEarlyExit && t == 127) return;
  for (int64_t i = blockIdx.x; i < a.n; i += gridDim.x) {
    const float* x = floats(a.x) + i * a.d + (a.fault == kGlobalShift);
    const int64_t end = a.fault == kNoMask ? (a.d + 127) / 128 * 128 : a.d;
    float total = 0;
    for (int64_t k = t; k < end; k += 128) total += ld(x + k);
    if (a.fault != kUninitialised || t != 77) s.part[t + (a.fault == kSharedShift)] = total;
    if (a.fault == kTwoBarriers) {
      if (t < 64) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (a.fault != kNoBarrier && !(a.fault == kSkippedBarrier && t >= 100)) {
      __syncthreads();
    }
    for (int half = 64; half > 0; half /= 2) {
      if (t < half) s.part[t] += s.part[t + half];
      if (a.fault != kNoStepBarrier) __syncthreads();
    }
    if (t == 5) st(static_cast<float*>(a.out) + i, s.part[0]);  // which thread 0 writes
    if (a.fault != kNoLastBarrier) __syncthreads();
  }
}

int run_row_sums(const HarnessArguments& a, Stream stream) {
  return launch(row_sums, a.blocks, 128, 0, stream, a);
}
FL_EXPORT(harness_row_sums, HarnessArguments, HARNESS_FIELDS, run_row_sums)

// ---- the place of the largest of each row: one warp a row, shuffles ----------------------------

FL_KERNEL(64) row_argmax(HarnessArguments a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t(gridDim.x) * 2;
  for (int64_t i = blockIdx.x * 2 + threadIdx.x / kWarp; i < a.n; i += warps) {
    const float* x = floats(a.x) + i * a.d;
    const int64_t end = a.fault == kNoMask ? (a.d + 31) / 32 * 32 : a.d;
    float best = -INFINITY;
    int at = -1;
    for (int64_t k = lane; k < end; k += kWarp) {
      const float v = ld(x + k);
      if (v > best) best = v, at = static_cast<int>(k);
    }
    const unsigned mask = a.fault == kOwnLane       ? 0xffffu
                          : a.fault == kForeignLane ? (lane < 20 ? 0xfffffu : 0xfff00000u)
                                                    : kAllLanes;
    if (a.fault == kMixedCollectives && lane < 16) __ballot_sync(kAllLanes, 1);
    if (a.fault == kAbsentLane && lane == 31) continue;
    for (int apart = 16; apart > (a.fault == kMissingStep ? 1 : 0); apart /= 2) {
      const float v = __shfl_xor_sync(mask, best, apart);
      const int other = __shfl_xor_sync(mask, at, apart);
      if (v > best || (v == best && other < at)) best = v, at = other;
    }
    if (lane == 0) st(static_cast<int32_t*>(a.out) + i, at);
  }
}

int run_row_argmax(const HarnessArguments& a, Stream stream) {
  return launch(row_argmax, a.blocks, 64, 0, stream, a);
}
FL_EXPORT(harness_row_argmax, HarnessArguments, HARNESS_FIELDS, run_row_argmax)

// ---- a transpose, tile by tile -----------------------------------------------------------------

struct TileShared {
  float at[32][33];
};

FL_KERNEL(256) transpose(HarnessArguments a) {
  FL_SHARED(TileShared, s);
  const int64_t across = (a.d + 31) / 32, tiles = (a.n + 31) / 32 * across;
  const int column = threadIdx.x % 32;
  float* out = static_cast<float*>(a.out) + (a.fault == kGlobalShift);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t i = tile / across * 32, j = tile % across * 32;
    for (int row = threadIdx.x / 32; row < 32; row += 8) {
      if ((i + row < a.n && j + column < a.d) || a.fault == kNoMask) {
        s.at[row][column] = ld(floats(a.x) + (i + row) * a.d + j + column);
      }
    }
    if (a.fault != kNoBarrier) __syncthreads();
    for (int row = threadIdx.x / 32; row < 32; row += 8) {
      if ((j + row < a.d && i + column < a.n) || a.fault == kNoStoreMask) {
        st(out + (j + row) * a.n + i + column, s.at[column][row + (a.fault == kSharedShift)]);
      }
    }
    if (a.fault != kNoLastBarrier) __syncthreads();
  }
}

int run_transpose(const HarnessArguments& a, Stream stream) {
  return launch(transpose, a.blocks, 256, 0, stream, a);
}
FL_EXPORT(harness_transpose, HarnessArguments, HARNESS_FIELDS, run_transpose)

// ---- sums over the columns with y != 0, rows read in packs -------------------------------------

FL_KERNEL(32) masked_sums(HarnessArguments a) {
  const bool aligned = packs(floats(a.x), a.d) || a.fault == kMisaligned;
  const int64_t whole = a.fault == kGlobalShift ? a.d + 4 : aligned ? a.d / 4 * 4 : 0;
  for (int64_t i = blockIdx.x; i < a.n; i += gridDim.x) {
    const float* x = floats(a.x) + i * a.d;
    const auto kept = [&](int64_t k, float v) {
      return a.fault == kNoMask || ld(floats(a.y) + k) != 0 ? v : 0.0f;
    };
    float total = 0;
    for (int64_t k = threadIdx.x * 4; k < whole; k += kWarp * 4) {
      const auto pack = ld_pack(x + k);
      for (int j = 0; j < 4; ++j) total += kept(k + j, pack[j]);
    }
    for (int64_t k = whole + threadIdx.x; k < a.d; k += kWarp) total += kept(k, ld(x + k));
    for (int apart = 16; apart > 0; apart /= 2) total += __shfl_xor_sync(kAllLanes, total, apart);
    float* out = static_cast<float*>(a.fault == kWrongBuffer ? const_cast<void*>(a.y) : a.out);
    if (threadIdx.x == 0) st(out + i, total);
  }
}

int run_masked_sums(const HarnessArguments& a, Stream stream) {
  return launch(masked_sums, a.blocks, 32, 0, stream, a);
}
FL_EXPORT(harness_masked_sums, HarnessArguments, HARNESS_FIELDS, run_masked_sums)

// ---- counts of the numbers below d, in shared memory first -------------------------------------

constexpr int kBins = 64;
struct CountShared {
  int32_t of[kBins];
};

FL_KERNEL(128) histogram(HarnessArguments a) {
  FL_SHARED(CountShared, s);
  if (a.fault != kUninitialised && threadIdx.x < kBins) s.of[threadIdx.x] = 0;
  if (a.fault != kNoBarrier) __syncthreads();
  const int64_t step = int64_t(gridDim.x) * 128;
  const int64_t end = a.fault == kNoMask ? (a.n + 127) / 128 * 128 : a.n;
  for (int64_t i = blockIdx.x * 128 + threadIdx.x; i < end; i += step) {
    const int32_t bin = ld(static_cast<const int32_t*>(a.x) + i);
    atomicAdd(&s.of[bin + (a.fault == kSharedShift)], 1);
  }
  if (a.fault != kNoLastBarrier) __syncthreads();
  int32_t* out = static_cast<int32_t*>(a.out);
  if (a.fault == kNotAtomic) {
    // every thread its own share of the counts: all write to the same places
    for (int bin = 0; bin < a.d; ++bin) {
      st(out + bin, ld(out + bin) + (threadIdx.x == 0 ? s.of[bin] : 0));
    }
  } else if (threadIdx.x < a.d) {
    atomicAdd(out + threadIdx.x, s.of[threadIdx.x]);
  }
}

int run_histogram(const HarnessArguments& a, Stream stream) {
  return launch(histogram, a.blocks, 128, 0, stream, a);
}
FL_EXPORT(harness_histogram, HarnessArguments, HARNESS_FIELDS, run_histogram)

// ---- rows turned round through dynamic shared memory -------------------------------------------

FL_KERNEL(64) reverse_rows(HarnessArguments a) {
  float* row = reinterpret_cast<float*>(dynamic_shared());
  for (int64_t i = blockIdx.x; i < a.n; i += gridDim.x) {
    const float* x = floats(a.x) + i * a.d;
    for (int64_t k = threadIdx.x; k < a.d; k += 64) {
      if (a.fault != kUninitialised || k != 3) row[k + (a.fault == kSharedShift)] = ld(x + k);
    }
    if (a.fault != kNoBarrier) __syncthreads();
    for (int64_t k = threadIdx.x; k < a.d; k += 64) {
      const int64_t from = a.d - 1 - k + (a.fault == kSharedPastEnd);
      st(static_cast<float*>(a.out) + i * a.d + k, row[from]);
    }
    if (a.fault != kNoLastBarrier) __syncthreads();
  }
}

int run_reverse_rows(const HarnessArguments& a, Stream stream) {
  return launch(reverse_rows, a.blocks, 64, sizeof(float) * a.d, stream, a);
}
FL_EXPORT(harness_reverse_rows, HarnessArguments, HARNESS_FIELDS, run_reverse_rows)

// ---- prefix sums of rows of 32: one warp a row, through shared memory --------------------------

struct PrefixShared {
  float sum[4][kWarp];
};

FL_KERNEL(128) prefix_sums(HarnessArguments a) {
  FL_SHARED(PrefixShared, s);
  const int lane = threadIdx.x % kWarp;
  float* sum = s.sum[threadIdx.x / kWarp];
  const int64_t i = blockIdx.x * 4 + threadIdx.x / kWarp;
  if (i >= a.n) return;
  float total = ld(floats(a.x) + i * kWarp + lane);
  sum[lane] = total;
  for (int apart = 1; apart < kWarp; apart *= 2) {
    if (a.fault == kHalfWarpBarrier && lane < 16) continue;
    if (a.fault != kNoWarpBarrier) __syncwarp();
    const float before = lane >= apart ? sum[lane - apart] : 0.0f;
    if (a.fault != kNoStepBarrier) __syncwarp();
    total += before;
    sum[lane] = total;
  }
  st(static_cast<float*>(a.out) + i * kWarp + lane, total);
}

int run_prefix_sums(const HarnessArguments& a, Stream stream) {
  return launch(prefix_sums, (a.n + 3) / 4, 128, 0, stream, a);
}
FL_EXPORT(harness_prefix_sums, HarnessArguments, HARNESS_FIELDS, run_prefix_sums)

}  // namespace fused_losses::cuda

#if defined(__CUDACC__)
FL_PUBLIC const char* fused_losses_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
#endif
