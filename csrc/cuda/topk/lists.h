// Which pairs may join a list of the best; and lists in shared memory, best first.
#pragma once

#include "../warp.h"

namespace fused_losses::cuda::topk {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kBlocks = 4;  // of a multiprocessor: left alone, ptxas spills to fit more

enum Match : int32_t { kAny, kSame, kDifferent };

// What leaves a pair out.
#define PAIR_FIELDS(F)                                       \
  F(const int32_t*, x_labels) /* null unless match counts */ \
  F(const int32_t*, y_labels)                                \
  F(const int32_t*, x_ids) /* null: none */                  \
  F(const int32_t*, y_ids)                                   \
  F(const int32_t*, exclude) /* [n, excluded] columns */     \
  F(int64_t, excluded)                                       \
  F(int32_t, match)                                          \
  F(bool, skip_self)

template <class Arguments>
FL_DEVICE bool allowed(const Arguments& a, int64_t i, int64_t j) {
  if (a.skip_self && i == j) return false;
  if (a.x_labels && (ld(a.x_labels + i) == ld(a.y_labels + j)) != (a.match == kSame)) return false;
  if (a.x_ids && ld(a.x_ids + i) == ld(a.y_ids + j)) return false;
  FL_ROLLED
  for (int64_t e = 0; e < a.excluded; ++e) {
    if (ld(a.exclude + i * a.excluded + e) == j) return false;
  }
  return true;
}

struct WarpTeam {
  static constexpr int kSize = kWarp;
  FL_DEVICE static int rank() { return threadIdx.x % kWarp; }
  FL_DEVICE static void sync() { __syncwarp(); }
};

struct BlockTeam {
  static constexpr int kSize = kThreads;
  FL_DEVICE static int rank() { return threadIdx.x; }
  FL_DEVICE static void sync() { __syncthreads(); }
};

FL_DEVICE bool before(int64_t a, int64_t b) { return a > b; }

// One step of a bitonic network over n entries; runs of `run` alternate in direction.
template <class Team, class Entry>
FL_DEVICE void exchange(Entry* v, int n, int apart, int run) {
  FL_ROLLED
  for (int t = Team::rank(); t < n / 2; t += Team::kSize) {
    const int i = 2 * t - (t & (apart - 1)), j = i + apart;
    const Entry a = v[i], b = v[j];
    if (before(b, a) == ((i & run) == 0)) v[i] = b, v[j] = a;
  }
  Team::sync();
}

// n: a power of two
template <class Team, class Entry>
FL_DEVICE void sort(Entry* v, int n) {
  FL_ROLLED
  for (int run = 2; run <= n; run *= 2) {
    FL_ROLLED
    for (int apart = run / 2; apart > 0; apart /= 2) exchange<Team>(v, n, apart, run);
  }
}

// list [n] = the n best of itself and fresh [count], both sorted; n: a power of two.
template <class Team, class Entry>
FL_DEVICE void merge(Entry* list, int n, const Entry* fresh, int count) {
  FL_ROLLED
  for (int t = Team::rank(); t < n && t < count; t += Team::kSize) {
    if (before(fresh[t], list[n - 1 - t])) list[n - 1 - t] = fresh[t];
  }
  Team::sync();
  // rising, then falling
  FL_ROLLED
  for (int apart = n / 2; apart > 0; apart /= 2) exchange<Team>(list, n, apart, n);
}

}  // namespace fused_losses::cuda::topk
