// Forward of the row statistics: one sweep of tiles, online maximum, sums apart from the target.
#pragma once

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
  T* dense;
  T* row;  // [d]
  Bent<T> bend;
  struct Thread {
    TileScratch<PS, T> tile;
    RowSums<T> sums;
    T* tile_best;
    T* tile_sum;
  };
  size_t shared_bytes, thread_bytes;
  void* buffer;

  ForwardPlan(const Problem& p, void* base) : buffer(base) {
    padded = padded_rows(p.n, kPanel<PS>);
    tiles = (p.k + tile_classes(p) - 1) / tile_classes(p);
    Arena arena(base);
    columns = arena.take<typename PS::Word>(padded * words<PS>(p.d));
    dense = arena.take<T>(p.n * p.d);
    row = arena.take<T>(p.d);
    bend = take_bend<T>(arena, p, padded);
    shared_bytes = arena.used();
    thread_bytes = 0;
    thread_bytes = thread(p, 0).second;
  }

  std::pair<Thread, size_t> thread(const Problem& p, int index) const {
    Arena arena(buffer ? static_cast<char*>(buffer) + shared_bytes + index * thread_bytes
                       : nullptr);
    TileScratch<PS, T> tile(arena, p);
    RowSums<T> sums(arena, padded);
    T* best = arena.take<T>(kBlockRows);
    T* sum = arena.take<T>(kBlockRows);
    return {Thread{tile, sums, best, sum}, arena.used()};
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

// The first class of the tile whose score is highest for row i, target left out.
template <class Tile, class T, class Bend>
inline int64_t find_hardest(const Problem& p, const Bend& bend, const Tile& tile,
                            const TileScratch<typename Tile::Scores, T>& s, const T* scores,
                            int64_t ld, int64_t row0, int64_t i) {
  int64_t target = -1;
  for (const Target* t = tile.targets; t != tile.targets_end; ++t) {
    if (t->row == row0 + i) target = t->position - tile.first;
  }
  int64_t found = -1;
  T best = -std::numeric_limits<T>::infinity();
  for (int64_t c = 0; c < tile.count; ++c) {
    const T raw = scores[c * ld + i] * s.inverse[c];
    const T z = bend.psi(raw, row0 + i) + bias_of<T>(p, tile.id(c));
    if (c != target && z > best) {
      best = z;
      found = c;
    }
  }
  return found < 0 ? -1 : tile.id(found);
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

  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = row0 + i;
    if (row < p.n && th.tile_best[i] > th.sums.best[row]) {
      th.sums.total[row] *= std::exp(static_cast<double>(th.sums.best[row] - th.tile_best[i]));
      th.sums.best[row] = th.tile_best[i];
      th.sums.hardest[row] = find_hardest(p, bend, tile, s, scores, ld, row0, i);
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
    tile.multiply_rows(plan.columns, plan.dense, row0, rows, scores, ld);
    with_bend(plan.bend, [&](const auto& bend) {
      fold_scores<PS, T>(p, bend, th, tile, scores, ld, row0, rows);
    });
  }
}

// <x_i, w_y> (over |w_y|) in double, from the rows themselves: O(n d), and free of the tile's
// rounding, which a confident row would multiply.
template <class T>
inline void write_targets(const Problem& p, const T* x, T* row, double* target) {
  std::fill_n(target, p.n, 0.0);
  for (int64_t t = 0; t < p.target_count; ++t) {
    const Target& at = p.targets[t];
    const int64_t id = p.ids ? p.ids[at.position] : at.position;
    if (t == 0 || p.targets[t - 1].position != at.position) read_row(p.w, id, p.d, row);
    double product, square;
    const auto multiply = [&] {
      product = square = 0;
      for (int64_t e = 0; e < p.d; ++e) {
        product += static_cast<double>(x[at.row * p.d + e]) * row[e];
        square += static_cast<double>(row[e]) * row[e];
      }
    };
    multiply();
    if (p.normalize && !usual(square)) {
      bring_near_one(row, p.d);
      multiply();
    }
    if (p.normalize) product = square == 0 ? 0 * product : product / std::sqrt(square);
    target[at.row] = product;
  }
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
  pack_columns<PS>(dense_rows(p, plan.dense), p.n, p.d, p.d, plan.padded, plan.columns);
  write_targets(p, plan.dense, plan.row, out.target);
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
  for (int64_t i = 0; i < p.n; ++i) {
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
  }
}

}  // namespace fused_losses::FL_ISA
