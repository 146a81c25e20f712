// Forward of the class rules: one sweep of tiles, each class's cosine from its centres, its terms.
#pragma once

#include "../row_statistics/gradient.h"
#include "pool.h"

namespace fused_losses::FL_ISA {

template <class PS, class T>
struct ClassForwardPlan {
  int64_t padded, tiles;
  typename PS::Word* columns;
  T* dense;
  RuleRows<T> rule;
  RuleLoops<T> loops;
  struct Thread {
    TileScratch<PS, T> tile;
    T* best;                             // [padded] highest cosine of the negatives
    int64_t* hardest;                    // [padded] its class
    T* top;                              // [S][padded] what the sum is relative to, of an lse
    double* total;                       // [S][padded]
    T *tile_best, *tile_top, *tile_sum;  // [block], [S][block], [S][block]
  };
  size_t shared_bytes, thread_bytes;
  void* buffer;

  ClassForwardPlan(const ClassProblem& c, void* base) : loops(loops_of<T>(c)), buffer(base) {
    const Problem& p = c.rows;
    padded = padded_rows(p.n, kPanel<PS>);
    tiles = (p.k + tile_classes(p) - 1) / tile_classes(p);
    Arena arena(base);
    columns = arena.take<typename PS::Word>(padded * words<PS>(p.d));
    dense = arena.take<T>(p.n * p.d);
    rule = {take_rows<T>(arena, c.values, c.value_rows, p.n, padded), nullptr, nullptr, padded};
    shared_bytes = arena.used();
    thread_bytes = 0;
    thread_bytes = thread(c, 0).second;
  }

  static constexpr int64_t kBlock = kBlockRows + 64;

  std::pair<Thread, size_t> thread(const ClassProblem& c, int index) const {
    Arena arena(buffer ? static_cast<char*>(buffer) + shared_bytes + index * thread_bytes
                       : nullptr);
    TileScratch<PS, T> tile(arena, c.rows);
    T* best = arena.take<T>(padded);
    auto* hardest = arena.take<int64_t>(padded);
    T* top = arena.take<T>(loops.statistics * padded);
    auto* total = arena.take<double>(loops.statistics * padded);
    T* tile_best = arena.take<T>(kBlock);
    T* tile_top = arena.take<T>(loops.statistics * kBlock);
    T* tile_sum = arena.take<T>(loops.statistics * kBlock);
    return {Thread{tile, best, hardest, top, total, tile_best, tile_top, tile_sum}, arena.used()};
  }
};

// What exponents are taken relative to: nothing, as long as there is nothing finite.
template <class T>
inline T shift_of(T top) {
  return std::isfinite(top) ? top : T(0);
}

// The first of a tile's classes with this cosine that is none of the row's labels.
template <class T>
inline int64_t find_hardest(const ClassProblem& c, const T* cosines, int64_t next, int64_t first,
                            int64_t count, int64_t row, T best) {
  const auto before = [](const ClassLabel& a, const ClassLabel& b) {
    return a.position != b.position ? a.position < b.position : a.row < b.row;
  };
  for (int64_t j = 0; j < count; ++j) {
    if (cosines[j * next] != best) continue;
    const ClassLabel own = {first + j, row, 0};
    if (std::binary_search(c.labels, c.labels + c.label_count, own, before)) continue;
    return c.rows.ids ? c.rows.ids[(first + j) * c.rows.group] / c.rows.group : first + j;
  }
  return -1;
}

// Copies a tile's products to where the backward finds them: here cosines take their places.
template <class PS, class T>
inline void keep_products(const Problem& p, const TileScratch<PS, T>& s, const Tile<PS, T>& tile,
                          int64_t row0, int64_t rows) {
  T* kept = kept_scores<T>(p, tile.first, tile.count);
  if (!kept) return;
  const int64_t ld = round_up(p.n, kKeptPadding);
  for (int64_t c = 0; c < tile.count; ++c) {
    std::copy_n(s.scores + c * s.ld, rows, kept + c * ld + row0);
  }
}

template <class PS, class T>
inline void fold_classes(const ClassProblem& c, const ClassForwardPlan<PS, T>& plan,
                         typename ClassForwardPlan<PS, T>::Thread& th, const Tile<PS, T>& tile,
                         int64_t row0, int64_t rows) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  constexpr int64_t kBlock = ClassForwardPlan<PS, T>::kBlock;
  const Problem& p = c.rows;
  const TileScratch<PS, T>& s = th.tile;
  const RuleLoops<T>& loops = plan.loops;
  const int64_t centers = p.group, first = tile.first / centers, count = tile.count / centers;
  const int64_t next = centers * s.ld, live = std::min(rows, p.n - row0);
  const auto each = [&](auto&& body) {
    each_labelled_class<T>(c, first, count, row0, rows, s.keep,
                           [&](int64_t j, const T* keep, const ClassLabel*, const ClassLabel*) {
                             body(j, CosineRow<T>{s.scores + j * next, keep, row0, rows});
                           });
  };

  std::fill_n(th.tile_best, rows, kNone);
  const T sharpness = sharpness_of<T>(c);
  each([&](int64_t j, const CosineRow<T>& at) {
    T* cosine = s.scores + j * next;
    const Centers<T> of = {cosine, s.ld, s.inverse + j * centers, centers, rows, sharpness};
    pool_centers<T>(of, cosine, nullptr, nullptr);
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
      const Vector<T> v = load(cosine + i), best = load(th.tile_best + i);
      Vector<T> candidate = v;
      if (at.keep) candidate = load(at.keep + i) > T(0) ? v : broadcast(kNone);
      store(th.tile_best + i, candidate > best ? candidate : best);
    }
  });
  for (int64_t i = 0; i < live; ++i) {
    const T best = th.tile_best[i];
    if (!(best > th.best[row0 + i])) continue;
    th.best[row0 + i] = best;
    th.hardest[row0 + i] = find_hardest(c, s.scores + i, next, first, count, row0 + i, best);
  }

  std::fill_n(th.tile_top, loops.statistics * kBlock, kNone);
  std::fill_n(th.tile_sum, loops.statistics * kBlock, T(0));
  if (loops.lse[0]) {
    each([&](int64_t, const CosineRow<T>& at) {
      loops.peak(c.params, plan.rule, at, th.tile_top, kBlock);
    });
  }
  for (int64_t k = 0; k < loops.statistics; ++k) {
    T* tops = th.top + k * plan.padded + row0;
    for (int64_t i = 0; i < rows; ++i) {
      T& found = th.tile_top[k * kBlock + i];
      if (found > tops[i]) {
        const double moved = static_cast<double>(shift_of(tops[i])) - shift_of(found);
        double& total = th.total[k * plan.padded + row0 + i];
        // of no class yet: 0, however far it moves
        if (total != 0) total *= std::exp(moved);
        tops[i] = found;
      }
      found = shift_of(tops[i]);
    }
  }
  each([&](int64_t, const CosineRow<T>& at) {
    loops.add(c.params, plan.rule, at, th.tile_top, th.tile_sum, kBlock);
  });
  for (int64_t k = 0; k < loops.statistics; ++k) {
    double* total = th.total + k * plan.padded + row0;
    for (int64_t i = 0; i < rows; ++i) total[i] += th.tile_sum[k * kBlock + i];
  }
}

// A statistic of row i from those of the threads.
template <class Threads>
inline double merged_statistic(const Threads& threads, int count, bool lse, int64_t at) {
  double total = 0, top = -std::numeric_limits<double>::infinity();
  for (int t = 0; lse && t < count; ++t) {
    top = std::max<double>(top, threads(t).top[at]);
  }
  const double shift = shift_of(top);
  for (int t = 0; t < count; ++t) {
    const auto th = threads(t);
    // a thread without classes has 0, whatever that is relative to
    if (th.total[at] == 0) continue;
    total += lse ? th.total[at] * std::exp(shift_of<double>(th.top[at]) - shift) : th.total[at];
  }
  if (!lse) return total;
  // an infinite term: its exponential was cut
  if (top == std::numeric_limits<double>::infinity() && total == total) return top;
  return shift + std::log(total);
}

template <class PS, class T>
size_t class_forward_bytes(const ClassProblem& c, int threads) {
  const ClassForwardPlan<PS, T> plan(c, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class T>
void class_forward(const ClassProblem& c, const ClassForwardOut& out, void* buffer,
                   const Parallel& parallel) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const ClassForwardPlan<PS, T> plan(c, buffer);
  const Problem& p = c.rows;
  const int64_t sums = plan.loops.statistics * plan.padded;
  pack_columns<PS>(dense_rows(p, plan.dense), p.n, p.d, p.d, plan.padded, plan.columns);
  on_tasks(parallel, parallel.threads, [&](int, int64_t run) {
    auto th = plan.thread(c, run).first;
    std::fill_n(th.tile.keep, th.tile.ld, T(1));
    std::fill_n(th.best, plan.padded, kNone);
    std::fill_n(th.hardest, plan.padded, int64_t(-1));
    std::fill_n(th.top, sums, kNone);
    std::fill_n(th.total, sums, 0.0);
    int64_t begin, end;
    tiles_of(run, parallel.threads, plan.tiles, &begin, &end);
    const int64_t block = round_up(kBlockRows, kPanel<PS>);
    for (int64_t t = begin; t < end; ++t) {
      const Tile<PS, T> tile(p, th.tile, t);
      for (int64_t row0 = 0; row0 < plan.padded; row0 += block) {
        const int64_t rows = std::min(block, plan.padded - row0);
        tile.multiply_rows(plan.columns, plan.dense, row0, rows, th.tile.scores, th.tile.ld);
        keep_products<PS, T>(p, th.tile, tile, row0, rows);
        fold_classes<PS, T>(c, plan, th, tile, row0, rows);
      }
    }
  });
  const auto threads = [&](int index) { return plan.thread(c, index).first; };
  for (int64_t i = 0; i < p.n; ++i) {
    for (int64_t k = 0; k < plan.loops.statistics; ++k) {
      out.statistics[k * p.n + i] =
          merged_statistic(threads, parallel.threads, plan.loops.lse[k], k * plan.padded + i);
    }
    T best = kNone;
    out.hardest[i] = -1;
    for (int t = 0; t < parallel.threads; ++t) {
      const auto th = threads(t);
      if (!(th.best[i] > best)) continue;
      best = th.best[i];
      out.hardest[i] = th.hardest[i];
    }
    static_cast<T*>(out.hardest_score)[i] = best;
  }
}

}  // namespace fused_losses::FL_ISA
