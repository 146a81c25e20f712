// Forward of the row statistics: one sweep of tiles, online maximum, sums apart from the target.
#pragma once

#include "../sums.h"
#include "tiles.h"

namespace fused_losses::FL_ISA {

// Calls body(c, keep, begin, end) for each class of the tile and its targets [begin, end); keep is
// null, or 0 at those of their rows that lie in the block.
template <class Tile, class T, class Body>
inline void each_class(const Tile& tile, int64_t row0, int64_t rows, T* keep, Body&& body) {
  const Target* next = tile.targets;
  for (int64_t c = 0; c < tile.count; ++c) {
    const Target* begin = next;
    bool marked = false;
    for (; next != tile.targets_end && next->position == tile.first + c; ++next) {
      const int64_t i = next->row - row0;
      if (i >= 0 && i < rows) {
        keep[i] = 0;
        marked = true;
      }
    }
    body(c, marked ? keep : nullptr, begin, next);
    for (const Target* t = begin; marked && t != next; ++t) {
      const int64_t i = t->row - row0;
      if (i >= 0 && i < rows) keep[i] = 1;
    }
  }
}

template <class T>
struct RowSums {
  T* best;           // [padded] running maximum over the other classes
  int64_t* hardest;  // [padded] its class
  double* total;     // [padded] sum of exp(z - best)
  double* weighted;  // [padded]

  RowSums(Arena& arena, int64_t padded) {
    best = arena.take<T>(padded);
    hardest = arena.take<int64_t>(padded);
    total = arena.take<double>(padded);
    weighted = arena.take<double>(padded);
  }
};

template <class PS, class T>
struct ForwardPlan {
  int64_t padded, tiles;
  typename PS::Word* columns;
  T* dense;  // where x does not lie so
  Bent<T> bend;
  struct Thread {
    TileScratch<PS, T> tile;
    RowSums<T> sums;
    T* tile_best;
    T* tile_sum;
    T* own;  // where a row's target stands in the tile, or -1
    T* row;  // [d]
  };
  size_t shared_bytes, thread_bytes;
  void* buffer;

  ForwardPlan(const Problem& p, void* base) : buffer(base) {
    padded = padded_rows(p.n, kPanel<PS>);
    tiles = (p.k + tile_classes(p) - 1) / tile_classes(p);
    Arena arena(base);
    columns = arena.take<typename PS::Word>(padded * words<PS>(p.d));
    dense = arena.take<T>(lies_dense<T>(p) ? 0 : p.n * p.d);
    bend = take_bend<T>(arena, p, padded);
    shared_bytes = arena.used();
    thread_bytes = 0;
    thread_bytes = thread(p, 0).second;
  }

  const T* x(const Problem& p) const {
    return lies_dense<T>(p) ? static_cast<const T*>(p.x.data) : dense;
  }

  std::pair<Thread, size_t> thread(const Problem& p, int index) const {
    Arena arena(buffer ? static_cast<char*>(buffer) + shared_bytes + index * thread_bytes
                       : nullptr);
    TileScratch<PS, T> tile(arena, p);
    RowSums<T> sums(arena, padded);
    T* best = arena.take<T>(kBlockRows);
    T* sum = arena.take<T>(kBlockRows);
    T* own = arena.take<T>(round_up(kBlockRows, kPanel<PS>));
    T* row = arena.take<T>(p.d);
    return {Thread{tile, sums, best, sum, own, row}, arena.used()};
  }
};

template <class T>
inline T bias_of(const Problem& p, int64_t id) {
  return p.bias ? static_cast<const T*>(p.bias)[id] : T(0);
}

template <class T>
inline T column_weight_of(const Problem& p, int64_t id) {
  return p.column_weight ? static_cast<const T*>(p.column_weight)[id] : T(1);
}

// Where in the block's rows' targets stand among the tile's classes, -1: not there.
template <class Tile, class T>
inline void find_own(const Tile& tile, int64_t row0, int64_t rows, T* own) {
  std::fill_n(own, rows, T(-1));
  for (const Target* t = tile.targets; t != tile.targets_end; ++t) {
    const int64_t i = t->row - row0;
    if (i >= 0 && i < rows) own[i] = static_cast<T>(t->position - tile.first);
  }
}

// The first class of the tile whose score is highest, -1: none, of a vector's rows from i on; their
// targets are left out.
template <class Tile, class T, class Bend>
inline void find_hardest(const Problem& p, const Bend& bend, const Tile& tile,
                         const TileScratch<typename Tile::Scores, T>& s, const T* scores,
                         int64_t ld, int64_t row0, int64_t i, const T* own, T* found) {
  Vector<T> best = broadcast(-std::numeric_limits<T>::infinity()), at = broadcast(T(-1));
  const Vector<T> target = load(own + i);
  for (int64_t c = 0; c < tile.count; ++c) {
    const Vector<T> raw = load(scores + c * ld + i) * s.inverse[c], place = broadcast(T(c));
    const Vector<T> z = bend.psi(raw, row0 + i) + bias_of<T>(p, tile.id(c));
    const auto higher = (z > best) & (target != place);
    best = higher ? z : best;
    at = higher ? place : at;
  }
  store(found, at);
}

// Folds the scores of a tile into the sums of the rows [row0, row0 + rows).
template <class PS, class T, class Bend>
inline void fold_scores(const Problem& p, const Bend& bend, typename ForwardPlan<PS, T>::Thread& th,
                        const Tile<PS, T>& tile, const T* scores, int64_t ld, int64_t row0,
                        int64_t rows) {
  constexpr int64_t kStep = kLanes<T>;
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const TileScratch<PS, T>& s = th.tile;
  for (int64_t i = 0; i < rows; ++i) th.tile_best[i] = kNone;
  for (int64_t i = 0; i < rows; ++i) th.tile_sum[i] = 0;
  const auto maximum = [&](int64_t c, const T* keep, const Target*, const Target*) {
    const T inverse = s.inverse[c], bias = bias_of<T>(p, tile.id(c));
    const T* z = scores + c * ld;
    for (int64_t i = 0; i < rows; i += kStep) {
      Vector<T> v = bend.psi(load(z + i) * inverse, row0 + i) + bias;
      if (keep) v = load(keep + i) > T(0) ? v : broadcast(kNone);
      const Vector<T> best = load(th.tile_best + i);
      store(th.tile_best + i, v > best ? v : best);
    }
    if (p.weighted) {
      const T weight = column_weight_of<T>(p, tile.id(c));
      for (int64_t i = 0; i < rows; ++i) {
        const T v = (bend.psi(z[i] * inverse, row0 + i) + bias) * weight;
        if (!keep || keep[i] > 0) th.sums.weighted[row0 + i] += v;
      }
    }
  };
  each_class(tile, row0, rows, s.keep, maximum);

  bool own = false;
  T found[kStep];
  for (int64_t i = 0, looked = -1; i < rows; ++i) {
    const int64_t row = row0 + i, lane = i % kStep;
    if (row < p.n && th.tile_best[i] > th.sums.best[row]) {
      th.sums.total[row] *= std::exp(static_cast<double>(th.sums.best[row] - th.tile_best[i]));
      th.sums.best[row] = th.tile_best[i];
      if (!own) find_own(tile, row0, rows, th.own);
      own = true;
      if (looked != i - lane) {
        looked = i - lane;
        find_hardest(p, bend, tile, s, scores, ld, row0, looked, th.own, found);
      }
      th.sums.hardest[row] = found[lane] < 0 ? -1 : tile.id(static_cast<int64_t>(found[lane]));
    }
    // what a score is shifted by: nothing, as long as no other class has been seen
    th.tile_best[i] = th.sums.best[row] > kNone ? th.sums.best[row] : T(0);
  }
  const auto add = [&](int64_t c, const T* keep, const Target*, const Target*) {
    const T inverse = s.inverse[c], bias = bias_of<T>(p, tile.id(c));
    const T* z = scores + c * ld;
    for (int64_t i = 0; i < rows; i += kStep) {
      const Vector<T> v = bend.psi(load(z + i) * inverse, row0 + i) + bias;
      Vector<T> e = exp(v - load(th.tile_best + i));
      if (keep) e = load(keep + i) > T(0) ? e : Vector<T>{};
      store(th.tile_sum + i, load(th.tile_sum + i) + e);
    }
  };
  each_class(tile, row0, rows, s.keep, add);
  for (int64_t i = 0; i < rows; ++i) th.sums.total[row0 + i] += th.tile_sum[i];
}

template <class PS, class T>
inline void forward_tile(const Problem& p, const ForwardPlan<PS, T>& plan,
                         typename ForwardPlan<PS, T>::Thread& th, int64_t index) {
  const TileScratch<PS, T>& s = th.tile;
  const Tile<PS, T> tile(p, s, index);
  const int64_t block = round_up(kBlockRows, kPanel<PS>);
  for (int64_t row0 = 0; row0 < plan.padded; row0 += block) {
    const int64_t rows = std::min(block, plan.padded - row0);
    T* kept = kept_scores<T>(p, tile.first, tile.count);
    T* scores = kept ? kept + row0 : s.scores;
    const int64_t ld = kept ? round_up(p.n, kKeptPadding) : s.ld;
    tile.multiply_rows(plan.columns, plan.x(p), row0, rows, scores, ld);
    with_bend(plan.bend, [&](const auto& bend) {
      fold_scores<PS, T>(p, bend, th, tile, scores, ld, row0, rows);
    });
  }
}

// <x_i, w_y> (over |w_y|) in double, of the targets [first, end), from the rows themselves: O(n d),
// and free of the tile's rounding, which a confident row would multiply.
template <class T>
inline void write_targets(const Problem& p, const T* x, T* row, double* target, int64_t first,
                          int64_t end) {
  for (int64_t t = first; t < end; ++t) {
    const Target& at = p.targets[t];
    const int64_t id = p.ids ? p.ids[at.position] : at.position;
    if (t == first || p.targets[t - 1].position != at.position) read_row(p.w, id, p.d, row);
    double square = sum_of<Product>(row, row, p.d);
    if (p.normalize && !usual(square)) {
      bring_near_one(row, p.d);
      square = sum_of<Product>(row, row, p.d);
    }
    double product = sum_of<Product>(x + at.row * p.d, row, p.d);
    if (p.normalize) product = square == 0 ? 0 * product : product / std::sqrt(square);
    target[at.row] = product;
  }
}

template <class T>
inline void write_targets(const Problem& p, const T* x, T* row, double* target) {
  std::fill_n(target, p.n, 0.0);
  write_targets(p, x, row, target, 0, p.target_count);
}

template <class PS, class T>
size_t forward_bytes(const Problem& p, int threads) {
  const ForwardPlan<PS, T> plan(p, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class T>
void forward(const Problem& p, const ForwardOut& out, void* buffer, const Parallel& parallel) {
  constexpr T kNone = -std::numeric_limits<T>::infinity();
  const ForwardPlan<PS, T> plan(p, buffer);
  pack_rows_of_x<PS>(p, plan.dense, plan.padded, plan.columns, parallel);
  std::fill_n(out.target, p.n, 0.0);
  const auto runs = [](int64_t count) { return (count + kRowsAtOnce - 1) / kRowsAtOnce; };
  on_tasks(parallel, runs(p.target_count), [&](int thread, int64_t task) {
    const int64_t first = task * kRowsAtOnce, end = std::min(first + kRowsAtOnce, p.target_count);
    write_targets(p, plan.x(p), plan.thread(p, thread).first.row, out.target, first, end);
  });
  on_tasks(parallel, parallel.threads, [&](int, int64_t run) {
    auto th = plan.thread(p, run).first;
    std::fill_n(th.tile.keep, th.tile.ld, T(1));
    std::fill_n(th.sums.best, plan.padded, kNone);
    std::fill_n(th.sums.hardest, plan.padded, int64_t(-1));
    std::fill_n(th.sums.total, plan.padded, 0.0);
    std::fill_n(th.sums.weighted, plan.padded, 0.0);
    int64_t begin, end;
    tiles_of(run, parallel.threads, plan.tiles, &begin, &end);
    for (int64_t t = begin; t < end; ++t) forward_tile<PS, T>(p, plan, th, t);
  });
  const auto merge = [&](int64_t i) {
    T best = kNone;
    int64_t hardest = -1;
    for (int index = 0; index < parallel.threads; ++index) {
      const RowSums<T> sums = plan.thread(p, index).first.sums;
      if (sums.best[i] > best) {
        best = sums.best[i];
        hardest = sums.hardest[i];
      }
    }
    double total = 0, weighted = 0;
    for (int index = 0; index < parallel.threads; ++index) {
      const RowSums<T> sums = plan.thread(p, index).first.sums;
      const double shift = sums.best[i] > kNone ? sums.best[i] : T(0);
      // a sum over no class is 0; a NaN score leaves best alone and the sum NaN
      if (sums.total[i] != 0) total += sums.total[i] * std::exp(shift - (best > kNone ? best : 0));
      weighted += sums.weighted[i];
    }
    out.lse[i] = (best > kNone ? best : 0) + std::log(total);
    if (out.weighted_sum) static_cast<T*>(out.weighted_sum)[i] = static_cast<T>(weighted);
    out.hardest[i] = hardest;
    static_cast<T*>(out.hardest_score)[i] = best;
  };
  on_tasks(parallel, runs(p.n), [&](int, int64_t task) {
    const int64_t end = std::min((task + 1) * kRowsAtOnce, p.n);
    for (int64_t i = task * kRowsAtOnce; i < end; ++i) merge(i);
  });
}

}  // namespace fused_losses::FL_ISA
