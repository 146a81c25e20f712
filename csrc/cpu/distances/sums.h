// Distances that are sums over coordinates (chebyshev: the largest).
#pragma once

#include "sweep.h"

namespace fused_losses::FL_ISA {

template <class M, class T>
struct SumsPlan {
  int64_t panel_size;  // elements of a thread's panels
  T *row_flags, *column_flags;
  size_t shared_bytes, thread_bytes;
  char* buffer;

  SumsPlan(const DistanceProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    constexpr int64_t kWide = kPanel<Plain<T>>;
    panel_size = std::max<int64_t>(p.d, 1) * kWide;
    Arena arena(base);
    row_flags = arena.take<T>(M::kFlags ? p.n : 0);
    column_flags = arena.take<T>(M::kFlags ? round_up(p.m, kWide) : 0);
    shared_bytes = arena.used();
    Arena one(nullptr);
    one.take<T>(M::kPanels * panel_size);
    thread_bytes = one.used();
  }

  T* panel(int thread) const {
    return reinterpret_cast<T*>(buffer + shared_bytes + thread * thread_bytes);
  }
};

// flags[i] = NaN where a row has one (or with `non_negative` an entry below 0), else 0.
template <class T>
inline void flag_rows(const T* x, int64_t n, int64_t d, bool non_negative, T* flags,
                      const Parallel& parallel) {
  on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
    for (int64_t i = task * 64; i < std::min(n, task * 64 + 64); ++i) {
      const T lowest = non_negative ? T(0) : -std::numeric_limits<T>::infinity();
      int bad = 0;
      for (int64_t k = 0; k < d; ++k) bad |= !(x[i * d + k] >= lowest);
      flags[i] = bad ? std::numeric_limits<T>::quiet_NaN() : T(0);
    }
  });
}

template <class M, class T>
void sums_forward(M metric, const DistanceProblem& p, T* out, void* buffer,
                  const Parallel& parallel) {
  using P = Plain<T>;
  constexpr int64_t kWide = kPanel<P>, kStep = kLanes<T>;
  constexpr int kAtOnce = M::kAtOnce, kSums = M::kSums;
  const SumsPlan<M, T> plan(p, buffer);
  const int64_t d = p.d;
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  const T* w = static_cast<const T*>(p.w);
  const bool streamed = past_caches<T>(p);
  metric.problem = &p;
  metric.row_flags = plan.row_flags;
  metric.column_flags = plan.column_flags;
  if (M::kFlags) {
    std::fill(plan.column_flags, plan.column_flags + round_up(p.m, kWide), T(0));
    flag_rows(x, p.n, d, M::kNonNegative, plan.row_flags, parallel);
    flag_rows(y, p.m, d, M::kNonNegative, plan.column_flags, parallel);
  }
  const auto pack = [&](int thread, int64_t j) {
    pack_panel<P>(y + j * d, p.m - j, d, plan.panel(thread));
    if constexpr (M::kPanels == 2) {
      pack_panel<P>(w + j * d, p.m - j, d, plan.panel(thread) + plan.panel_size);
    }
  };
  const auto add = [&](int thread, int64_t i, int64_t k, int64_t run, T* carry, bool fresh) {
    const T* rows[kAtOnce];
    for (int r = 0; r < kAtOnce; ++r) rows[r] = x + std::min(i + r, p.n - 1) * d;
    const T* panel = plan.panel(thread);
    if constexpr (std::is_same_v<M, Chebyshev<T>>) {
      add_coordinates(metric, rows, panel, k, run, carry, fresh);
    } else {
      const T* second = M::kPanels == 2 ? panel + plan.panel_size : panel;
      add_coordinates(metric, rows, panel, second, w, k, run, carry, fresh);
    }
  };
  const auto finish = [&](int, int64_t i, int64_t count, int64_t j, const T* carry) {
    for (int64_t r = 0; r < count; ++r) {
      Vector<T> values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> sums[kSums];
        for (int s = 0; s < kSums; ++s) {
          sums[s] = load(carry + ((r * kVectors + v) * kSums + s) * kStep);
        }
        values[v] = metric.finish(sums, i + r, j + v * kStep);
      }
      put_distances(out + (i + r) * p.between(), j, p.m, values, streamed);
    }
  };
  sweep_distances<T, kWide, kAtOnce, kSums>(p.n, p.m, d, kDistanceChunk, parallel, pack, add,
                                            finish);
}

}  // namespace fused_losses::FL_ISA
