// Distances that are made of products: dot, sqeuclidean, euclidean. Pairs too near for
// |x|^2 + |y|^2 - 2 <x, y> are summed again as (x - y)^2.
#pragma once

#include "sweep.h"

namespace fused_losses::FL_ISA {

using distance_rules::kNear;

// <x, x> of each row, summed by chunks; of the words that products see.
template <class P, class T>
inline T squared_norm(const typename P::Word* row, int64_t depth) {
  T total = 0;
  for (int64_t k0 = 0; k0 < depth; k0 += kDistanceChunk) {
    const int64_t end = std::min(depth, k0 + kDistanceChunk);
    Vector<T> sums[2] = {};
    int64_t k = k0;
    T rest = 0;
    if constexpr (P::kPair == 1) {
      for (; k + 2 * kLanes<T> <= end; k += 2 * kLanes<T>) {
        const Vector<T> a = load(row + k), b = load(row + k + kLanes<T>);
        sums[0] += a * a;
        sums[1] += b * b;
      }
      for (; k < end; ++k) rest += row[k] * row[k];
    } else {
      for (; k < end; ++k) {
        const T a = from_bf16(static_cast<uint16_t>(row[k])), b = from_bf16(row[k] >> 16);
        rest += a * a + b * b;
      }
    }
    total += sum<T>(sums[0] + sums[1]) + rest;
  }
  return total;
}

template <class P, class T>
struct ProductsPlan {
  using Word = typename P::Word;
  int64_t depth, panel_size;
  Word* left;                   // x in words, unless words are elements
  T *row_norms, *column_norms;  // squared
  size_t shared_bytes, thread_bytes;
  char* buffer;

  struct Thread {
    Word* panel;
    T* plain;  // the panel in elements, unless words are elements: for near pairs
  };

  ProductsPlan(const DistanceProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    constexpr int64_t kWide = kPanel<P>;
    depth = words<P>(p.d);
    panel_size = std::max<int64_t>(p.d, 1) * kWide;
    const bool norms = p.kind != Distance::kDot;
    Arena arena(base);
    left = arena.take<Word>(P::kPair == 2 ? p.n * depth : 0);
    row_norms = arena.take<T>(norms ? p.n : 0);
    column_norms = arena.take<T>(norms ? round_up(p.m, kWide) : 0);
    shared_bytes = arena.used();
    Arena one(nullptr);
    take(one);
    thread_bytes = one.used();
  }

  Thread thread(int index) const {
    Arena arena(buffer + shared_bytes + index * thread_bytes);
    return take(arena);
  }

 private:
  Thread take(Arena& arena) const {
    Word* panel = arena.take<Word>(std::max<int64_t>(depth, 1) * kPanel<P>);
    return {panel, arena.take<T>(P::kPair == 2 ? panel_size : 0)};
  }
};

// |x|^2 + |y|^2 - 2 <x, y> of a vector of columns; adds up which are too near for it.
template <class T>
[[gnu::always_inline]] inline Vector<T> from_product(Vector<T> size, Vector<T> product,
                                                     Lanes* near) {
  const Vector<T> apart = distance_rules::from_product<DistanceMath<T>>(size, product);
  *near |= below(apart, size * kNear<T>);
  return apart;
}

// carry [kRows][kPanel] from products to squared distances, of near pairs as sum (x - y)^2.
template <class T>
[[gnu::noinline]] void mend_near(const T* const* rows, const T* row_norms, const T* panel,
                                 const T* column_norms, int64_t d, int64_t count, T* carry) {
  constexpr int64_t kStep = kLanes<T>;
  alignas(64) T exact[kRows * kVectors * kStep];
  for (int64_t k = 0; k == 0 || k < d; k += kDistanceChunk) {
    add_coordinates(Squares<T>{}, rows, panel, panel, panel, k, std::min(kDistanceChunk, d - k),
                    exact, k == 0);
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = (r * kVectors + v) * kStep;
      Lanes near = 0;
      const Vector<T> size = load(column_norms + v * kStep) + row_norms[r];
      store(carry + at, from_product<T>(size, load(carry + at), &near));
      for (; near; near &= near - 1) {
        const int lane = __builtin_ctz(near);
        carry[at + lane] = exact[at + lane];
      }
    }
  }
}

template <class P, class T>
void products_forward(const DistanceProblem& p, T* out, void* buffer, const Parallel& parallel) {
  using Word = typename P::Word;
  constexpr int64_t kWide = kPanel<P>, kStep = kLanes<T>;
  const ProductsPlan<P, T> plan(p, buffer);
  const int64_t d = p.d, depth = plan.depth;
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  const bool streamed = past_caches<T>(p), dot = p.kind == Distance::kDot;
  const bool rooted = p.kind == Distance::kEuclidean;
  const Word* left = plan.left;
  if constexpr (P::kPair == 1) left = x;
  on_tasks(parallel, ceil_div(p.n, 64), [&](int, int64_t task) {
    const int64_t first = task * 64, last = std::min(first + 64, p.n);
    if constexpr (P::kPair == 2) {
      narrow_rows<P>(x + first * d, last - first, d, plan.left + first * depth);
    }
    for (int64_t i = first; i < last && !dot; ++i) {
      plan.row_norms[i] = squared_norm<P, T>(left + i * depth, depth);
    }
  });
  if (!dot) std::fill(plan.column_norms, plan.column_norms + round_up(p.m, kWide), T(0));
  on_tasks(parallel, dot ? 0 : ceil_div(p.m, 64), [&](int thread, int64_t task) {
    for (int64_t j = task * 64; j < std::min(task * 64 + 64, p.m); ++j) {
      if constexpr (P::kPair == 2) {
        Word* row = plan.thread(thread).panel;
        narrow_row<P>(y + j * d, d, row);
        plan.column_norms[j] = squared_norm<P, T>(row, depth);
      } else {
        plan.column_norms[j] = squared_norm<P, T>(y + j * d, d);
      }
    }
  });
  const auto pack = [&](int thread, int64_t j) {
    const auto own = plan.thread(thread);
    pack_panel<P>(y + j * d, p.m - j, d, own.panel);
    if constexpr (P::kPair == 2) own.plain[0] = std::numeric_limits<T>::quiet_NaN();
  };
  const auto add = [&](int thread, int64_t i, int64_t k, int64_t run, T* carry, bool fresh) {
    const Word* rows[P::kAtOnce];
    for (int r = 0; r < P::kAtOnce; ++r) rows[r] = left + std::min(i + r, p.n - 1) * depth + k;
    const Word* panel = plan.thread(thread).panel + k * kWide;
    multiply<P, true>(rows, 1, panel, run, [&](int r, int v, Vector<T> sum) {
      T* to = carry + (r * kVectors + v) * kStep;
      store(to, fresh ? sum : load(to) + sum);
    });
  };
  const auto finish = [&](int thread, int64_t i, int64_t count, int64_t j, T* carry) {
    Lanes near = 0;
    const auto put = [&](int64_t r, auto&& distance) {
      Vector<T> values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        values[v] = distance(v, load(carry + (r * kVectors + v) * kStep));
      }
      put_distances(out + (i + r) * p.between(), j, p.m, values, streamed);
    };
    if (dot) {
      for (int64_t r = 0; r < count; ++r) put(r, [](int, Vector<T> product) { return product; });
      return;
    }
    for (int64_t r = 0; r < count; ++r) {
      const T a = plan.row_norms[i + r];
      put(r, [&](int v, Vector<T> product) {
        const Vector<T> size = load(plan.column_norms + j + v * kStep) + a;
        const Vector<T> apart = from_product<T>(size, product, &near);
        return rooted ? root(apart) : apart;
      });
    }
    if (!near) [[likely]]
      return;
    const T* panel;
    if constexpr (P::kPair == 2) {
      // packed when the panel first has a near pair
      panel = plan.thread(thread).plain;
      if (*panel != *panel) {
        pack_panel<Plain<T>>(y + j * d, p.m - j, d, plan.thread(thread).plain);
      }
    } else {
      panel = plan.thread(thread).panel;
    }
    for (int64_t r0 = 0; r0 < count; r0 += kRows) {
      const T* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = x + std::min(i + r0 + r, p.n - 1) * d;
      mend_near(rows, plan.row_norms + i + r0, panel, plan.column_norms + j, d,
                std::min<int64_t>(kRows, count - r0), carry + r0 * kWide);
    }
    for (int64_t r = 0; r < count; ++r) {
      put(r, [&](int, Vector<T> apart) { return rooted ? root(apart) : apart; });
    }
  };
  sweep_distances<T, kWide, P::kAtOnce, 1>(p.n, p.m, depth, kDistanceChunk / P::kPair, parallel,
                                           pack, add, finish);
}

}  // namespace fused_losses::FL_ISA
