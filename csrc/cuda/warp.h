// Reductions over a warp and a block, in a fixed order: the same bits in every run.
#pragma once

#include "platform.h"

namespace fused_losses::cuda {

// Every lane gets op over all lanes; each lane combines the same values in the same tree.
template <class T, class Op>
FL_DEVICE T warp_reduce(T v, Op op) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    v = op(v, __shfl_xor_sync(kAllLanes, v, apart));
  }
  return v;
}

template <class T>
FL_DEVICE T warp_sum(T v) {
  return warp_reduce(v, [](T a, T b) { return a + b; });
}

// A NaN is the largest: it must not get lost.
FL_DEVICE float larger(float a, float b) { return a > b || a != a ? a : b; }

FL_DEVICE float warp_max(float v) {
  return warp_reduce(v, [](float a, float b) { return larger(a, b); });
}

// op over a block of whole warps; every thread gets the result. `scratch`: shared, one T a warp,
// free for use again after the next barrier of the caller.
template <class T, class Op>
FL_DEVICE T block_reduce(T v, T* scratch, Op op) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  v = warp_reduce(v, op);
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  v = scratch[0];
  for (int w = 1; w < warps; ++w) v = op(v, scratch[w]);
  return v;
}

template <class T>
FL_DEVICE T block_sum(T v, T* scratch) {
  return block_reduce(v, scratch, [](T a, T b) { return a + b; });
}

}  // namespace fused_losses::cuda
