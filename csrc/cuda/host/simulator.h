// Executes kernels on the host: the threads of a block are fibers, run in a seeded random order.
//
// A fiber runs until it waits: at a barrier, in a collective of its warp until every lane of the
// mask has come, or now and then before an access to global memory. What a thread may see of
// another before such a point depends on the order, which `FUSED_LOSSES_CUDA_SEED` changes, so a
// missing barrier shows up as a wrong or NaN result. Between two barriers either all warps come on
// at about the same pace, or one runs as far as it can before the next: each finds what the other
// cannot. Faults stop the launch and say why: an address outside the buffers that were announced,
// or misaligned; a store to a buffer that is read only; a store beside a shared variable; a barrier
// that some threads never reach, or two that meet; a collective whose lanes do not come, or
// disagree. One block at a time, on one thread; blocks come in random order, too.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <source_location>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

namespace fused_losses::host {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

// What the kernel asks of its place.
struct Place {
  Index thread, block, block_size, grid_size;
};
extern Place place;

enum class Access { kLoad, kStore, kAtomic };

// Checks an access to global memory against the announced buffers, if any are, and counts it.
void touch(const void* p, size_t bytes, size_t alignment, Access access);

// The shared variable of this key, once a block full of NaN; what lies beside it is guarded.
void* shared(const void* key, size_t bytes);
char* dynamic_shared();

struct Launch {
  const void* kernel;
  int64_t blocks;
  int threads;
  size_t shared;
  const void* arguments;
  size_t argument_bytes;
};

// 0, or 1 after a fault (fused_losses_error says which). With a hook set, the hook runs instead.
int run(const Launch& launch, void (*body)(const Launch&));
int processors();

[[noreturn]] void fault(const char* format, ...);

// ---- what a thread calls -----------------------------------------------------------------------

enum class Collective { kShuffle, kVote, kWarpBarrier };

// Gives `value`, gets that of lane `source` when every lane of the mask has come.
uint64_t exchange(unsigned mask, uint64_t value, int source);
unsigned ballot(unsigned mask, bool predicate);
void sync_warp(unsigned mask);
using Site = std::source_location;
// How many threads of the block came with a true predicate.
int sync_block(bool predicate, const Site& site);
int lane();

template <class T>
T shuffle(unsigned mask, T v, int source) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  memcpy(&bits, &v, sizeof(T));
  bits = exchange(mask, bits, source);
  memcpy(&v, &bits, sizeof(T));
  return v;
}

template <class T, class Op>
T atomic(T* p, Op op) {
  touch(p, sizeof(T), alignof(T), Access::kAtomic);
  const T old = *p;
  *p = op(old);
  return old;
}

}  // namespace fused_losses::host

#define threadIdx (::fused_losses::host::place.thread)
#define blockIdx (::fused_losses::host::place.block)
#define blockDim (::fused_losses::host::place.block_size)
#define gridDim (::fused_losses::host::place.grid_size)

// ---- CUDA's own names --------------------------------------------------------------------------

using FusedLossesSite = fused_losses::host::Site;
inline void __syncthreads(const FusedLossesSite& site = FusedLossesSite::current()) {
  fused_losses::host::sync_block(false, site);
}
inline int __syncthreads_count(int p, const FusedLossesSite& site = FusedLossesSite::current()) {
  return fused_losses::host::sync_block(p != 0, site);
}
inline int __syncthreads_or(int p, const FusedLossesSite& site = FusedLossesSite::current()) {
  return fused_losses::host::sync_block(p != 0, site) > 0;
}
inline int __syncthreads_and(int p, const FusedLossesSite& site = FusedLossesSite::current()) {
  return fused_losses::host::sync_block(p == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { fused_losses::host::sync_warp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const int lane = fused_losses::host::lane();
  return fused_losses::host::shuffle(mask, v, lane / width * width + source % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int other, int width = 32) {
  const int lane = fused_losses::host::lane(), source = lane ^ other;
  return fused_losses::host::shuffle(mask, v, source / width > lane / width ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int lane = fused_losses::host::lane(), source = lane - static_cast<int>(by);
  return fused_losses::host::shuffle(mask, v, source < lane / width * width ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32) {
  const int lane = fused_losses::host::lane(), source = lane + static_cast<int>(by);
  return fused_losses::host::shuffle(mask, v, source >= (lane / width + 1) * width ? lane : source);
}

inline unsigned __ballot_sync(unsigned mask, int p) {
  return fused_losses::host::ballot(mask, p != 0);
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, p) == mask; }

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline void __threadfence() {}

inline int __float_as_int(float v) {
  int out;
  memcpy(&out, &v, 4);
  return out;
}
inline float __int_as_float(int v) {
  float out;
  memcpy(&out, &v, 4);
  return out;
}
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

template <class T>
T atomicAdd(T* p, T v) {
  return fused_losses::host::atomic(p, [&](T old) { return static_cast<T>(old + v); });
}
template <class T>
T atomicMax(T* p, T v) {
  return fused_losses::host::atomic(p, [&](T old) { return old > v ? old : v; });
}
template <class T>
T atomicMin(T* p, T v) {
  return fused_losses::host::atomic(p, [&](T old) { return old < v ? old : v; });
}
template <class T>
T atomicOr(T* p, T v) {
  return fused_losses::host::atomic(p, [&](T old) { return static_cast<T>(old | v); });
}
template <class T>
T atomicExch(T* p, T v) {
  return fused_losses::host::atomic(p, [&](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  return fused_losses::host::atomic(p, [&](T old) { return old == expected ? v : old; });
}
