// The matrix of distances: panels of y in the lanes, rows of x go by, sums in registers.
//
// A task is a panel and a block of rows; it packs its panel itself, so tasks share nothing. Long
// rows go by in chunks whose sums are added up outside, which is also what keeps float sums exact.
#pragma once

#include "../../distances.h"
#include "metrics.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kDistanceChunk = 512;    // coordinates a sum runs over before it is put aside
constexpr int64_t kChunkRows = 96;         // whose sums wait when there are several chunks
constexpr int64_t kStreamBytes = 8 << 20;  // of an output that goes past the caches

// row[j ...] = the distances of a panel's columns, those that exist.
template <class T>
[[gnu::always_inline]] inline void put_distances(T* row, int64_t j, int64_t m, const Vector<T>* v,
                                                 bool past_caches) {
  constexpr int64_t kStep = kLanes<T>;
  T* to = row + j;
  if (j + kVectors * kStep > m) {
    for (int64_t e = 0; e < kVectors && j + e * kStep < m; ++e) {
      store_part(to + e * kStep, v[e], m - j - e * kStep);
    }
  } else if (past_caches && reinterpret_cast<uintptr_t>(to) % FL_VECTOR_BYTES == 0) {
#pragma GCC unroll 4
    for (int e = 0; e < kVectors; ++e) stream(to + e * kStep, v[e]);
  } else {
#pragma GCC unroll 4
    for (int e = 0; e < kVectors; ++e) store(to + e * kStep, v[e]);
  }
}

template <class T>
inline bool past_caches(const DistanceProblem& p) {
  return p.n * p.m * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// Panels of kWide columns by blocks of rows: pack(thread, j), then for each group of kAtOnce rows
// add(thread, i, k, run, carry, fresh) a chunk of `depth` at a time, and finish(thread, i, carry).
template <class T, int64_t kWide, int kAtOnce, int kSums, class Pack, class Add, class Finish>
void sweep_distances(int64_t n, int64_t m, int64_t depth, int64_t chunk, const Parallel& parallel,
                     Pack&& pack, Add&& add, Finish&& finish) {
  const int64_t panels = ceil_div(m, kWide);
  // enough tasks for the threads; a distance does not depend on the task it is in
  const int64_t wanted = std::clamp<int64_t>(ceil_div(8 * parallel.threads, panels), 1,
                                             std::max<int64_t>(1, n / kChunkRows));
  const int64_t rows = even_blocks(n, ceil_div(n, wanted), kAtOnce), blocks = ceil_div(n, rows);
  const int64_t step = depth <= chunk ? kAtOnce : kChunkRows;
  static_assert(kChunkRows % kAtOnce == 0);
  on_tasks(parallel, panels * blocks, [&](int thread, int64_t task) {
    alignas(64) T carry[kChunkRows * kSums * kWide];
    constexpr int64_t kGroup = kAtOnce * kSums * kWide;
    const int64_t j = task / blocks * kWide, first = task % blocks * rows;
    const int64_t last = std::min(first + rows, n);
    pack(thread, j);
    for (int64_t i = first; i < last; i += step) {
      const int64_t end = std::min(i + step, last);
      for (int64_t k = 0; k == 0 || k < depth; k += chunk) {
        for (int64_t r = i; r < end; r += kAtOnce) {
          add(thread, r, k, std::min(chunk, depth - k), carry + (r - i) / kAtOnce * kGroup, k == 0);
        }
      }
      for (int64_t r = i; r < end; r += kAtOnce) {
        finish(thread, r, std::min<int64_t>(kAtOnce, last - r), j,
               carry + (r - i) / kAtOnce * kGroup);
      }
    }
  });
}

// carry (+)= the sums of kAtOnce rows with a panel over coordinates [k, k + run).
template <class M, class T>
[[gnu::always_inline]] inline void add_coordinates(const M& metric, const T* const* rows,
                                                   const T* panel, const T* second,
                                                   const T* weights, int64_t k, int64_t run,
                                                   T* carry, bool fresh) {
  constexpr int kAtOnce = M::kAtOnce, kSums = M::kSums;
  constexpr int64_t kStep = kLanes<T>, kWide = kVectors * kStep;
  Vector<T> sums[kAtOnce][kVectors][kSums] = {};
  const T* x[kAtOnce];
#pragma GCC unroll 6
  for (int r = 0; r < kAtOnce; ++r) x[r] = rows[r] + k;
  const T* y = panel + k * kWide;
  const T* w = second + k * kWide;
  for (int64_t e = 0; e < run; ++e, y += kWide, w += kWide) {
    Vector<T> columns[kVectors], scales[kVectors] = {};
    const T weight = M::kWeights ? weights[k + e] : T(1);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = load(y + v * kStep);
      if constexpr (M::kPanels == 2) scales[v] = load(w + v * kStep);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        metric.add(sums[r][v], x[r][e], columns[v], scales[v], weight);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
      for (int s = 0; s < kSums; ++s) {
        T* to = carry + ((r * kVectors + v) * kSums + s) * kStep;
        store(to, fresh ? sums[r][v][s] : load(to) + sums[r][v][s]);
      }
    }
  }
}

// As above for chebyshev, whose chunks are joined by their larger.
template <class T>
[[gnu::always_inline]] inline void add_coordinates(const Chebyshev<T>& metric, const T* const* rows,
                                                   const T* panel, int64_t k, int64_t run, T* carry,
                                                   bool fresh) {
  using Bits = Vector<Code<T>>;
  constexpr int64_t kStep = kLanes<T>;
  alignas(64) T part[kRows * kVectors * kStep];
  add_coordinates(metric, rows, panel, panel, panel, k, run, part, true);
  for (int64_t e = 0; e < kRows * kVectors * kStep; e += kStep) {
    const Bits a = (Bits)load(part + e), b = (Bits)load(carry + e);
    store(carry + e, (Vector<T>)(fresh || a > b ? a : b));
  }
}

}  // namespace fused_losses::FL_ISA
