// Attention over one class of pairs: softmax of the terms times values, forward and backward.
#pragma once

#include "backward.h"

namespace fused_losses::FL_ISA {

inline PairClass class_of(const AttentionIn& a) { return a.positives ? kPositive : kNegative; }

// Terms of the class asked for over a tile, -inf elsewhere.
template <class T, class Thread>
inline void attention_terms(const PairProblem& p, const PairTile& t, Thread& th, const T* scores,
                            int64_t ld, PairClass c, T* slope) {
  if (t.mixed) t.codes(p, th.codes, ld);
  const Window window = p.rows.window ? Window::kRows : Window::kNone;
  fill_terms<T>(p, t, scores, ld, t.mixed ? th.codes : nullptr, c, window, th.terms, slope);
}

inline bool attends(const PairTile& t, PairClass c) { return !t.skip && (t.mixed || t.pure == c); }

// Rows of one strip: its scores a tile of columns at a time, the output under a running maximum.
template <class PS, class PG, class T>
struct AttentionPlan {
  using WordS = typename PS::Word;
  using WordG = typename PG::Word;
  int64_t tile_rows, block_columns, depth, value_words, wide, work;
  WordS *left, *panels;
  WordG* values;  // a block of them, as the right operand
  T *best, *mass;
  T *held, *held_values;  // a block of y and of the values, unless they lie in T
  size_t shared_bytes, thread_bytes;
  char* buffer;

  struct Thread {
    T *products, *terms;
    Code<T>* codes;
    GradientBlock<PG> weights;
    SplitRoom split;
    Thread(Arena& arena, int64_t tile_rows, int64_t work)
        : products(arena.take<T>(tile_rows * kTileColumns)),
          terms(arena.take<T>(tile_rows * kTileColumns)),
          codes(arena.take<Code<T>>(tile_rows * kTileColumns)),
          weights(arena, tile_rows, kTileColumns),
          split(split_room<PS>(arena, tile_rows, work)) {}
  };

  AttentionPlan(const PairProblem& p, const AttentionIn& a, void* base)
      : buffer(static_cast<char*>(base)) {
    const int64_t n = p.rows.count;
    tile_rows = pair_tile_rows(std::max(p.d, a.width));
    depth = words<PS>(p.d);
    work = work_of(p);
    block_columns = even_blocks(p.columns.count, kBlockColumns, kPanel<PS>);
    Arena arena(base);
    left = arena.take<WordS>(PS::kPair == 2 ? n * depth : 0);
    panels = arena.take<WordS>(block_columns * depth);
    wide = round_up(a.width, kPanel<PG>);
    value_words = words<PG>(block_columns);
    values = arena.take<WordG>(value_words * wide);
    best = arena.take<T>(n);
    mass = arena.take<T>(n);
    const int64_t read = p.stored == Stored::kWide ? 0 : block_columns;
    held = arena.take<T>(read * p.d);
    held_values = arena.take<T>(read * a.width);
    shared_bytes = arena.used();
    Arena scratch(nullptr);
    Thread thread(scratch, tile_rows, work);
    thread_bytes = scratch.used();
  }

  Thread thread(int index) const {
    Arena arena(buffer + shared_bytes + index * thread_bytes);
    return Thread(arena, tile_rows, work);
  }
};

template <class PS, class PG, class T>
size_t attention_bytes(const PairProblem& p, const AttentionIn& a, int threads) {
  const AttentionPlan<PS, PG, T> plan(p, a, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

// Terms of a tile become weights exp(z - best), the strip's output shrinks where its best grew.
template <class T>
inline void online_weights(T* terms, int64_t ld, const PairTile& t, T* best, T* mass, T* out,
                           int64_t width) {
  constexpr int64_t kStep = kLanes<T>;
  const Vector<T> zero = {};
  const int64_t wide = round_up(t.columns, kStep);
  for (int64_t i = 0; i < t.rows; ++i) {
    Vector<T> top = zero + best[i];
    for (int64_t j = 0; j < wide; j += kStep) top = larger<T>(load(terms + i * ld + j), top);
    const T fresh = largest<T>(top), safe = fresh == kNone<T> ? T(0) : fresh;
    Vector<T> total = zero;
    for (int64_t j = 0; j < wide; j += kStep) {
      const Vector<T> e = exp(load(terms + i * ld + j) - safe);
      store(terms + i * ld + j, e);
      total += e;
    }
    if (fresh != best[i]) {
      const T shrink = std::exp(best[i] - safe);
      mass[i] *= shrink;
      for (int64_t e = 0; e < width; ++e) out[i * width + e] *= shrink;
      best[i] = fresh;
    }
    mass[i] += sum<T>(total);
  }
}

template <class PS, class PG, class T>
void attention(const PairProblem& p, const AttentionIn& a, const AttentionForwardOut& result,
               void* buffer, const Parallel& parallel) {
  using Word = typename PS::Word;
  const AttentionPlan<PS, PG, T> plan(p, a, buffer);
  const int64_t n = p.rows.count, m = p.columns.count, d = p.d;
  const T* x = static_cast<const T*>(p.rows.data);
  T* out = static_cast<T*>(result.out);
  const PairClass c = class_of(a);
  const Word* left = plan.left;
  if constexpr (PS::kPair != 2) left = x;
  on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
    const int64_t i = task * 64, rows = std::min<int64_t>(64, n - i);
    if constexpr (PS::kPair == 2) narrow_rows<PS>(x + i * d, rows, d, plan.left + i * plan.depth);
    std::fill_n(out + i * a.width, rows * a.width, T(0));
    std::fill_n(plan.best + i, rows, kNone<T>);
    std::fill_n(plan.mass + i, rows, T(0));
  });
  for (int64_t j0 = 0; j0 < m; j0 += plan.block_columns) {
    const int64_t width = std::min(plan.block_columns, m - j0);
    const int64_t panels = ceil_div(width, kPanel<PS>), right = ceil_div(a.width, kPanel<PG>);
    const T* y = block_of(p.stored, p.columns.data, j0, width, d, plan.held, parallel);
    const T* values = block_of(p.stored, a.values, j0, width, a.width, plan.held_values, parallel);
    on_tasks(parallel, panels + right, [&](int, int64_t k) {
      if (k < panels) {
        const int64_t j = k * kPanel<PS>;
        pack_panel<PS>(y + j * d, width - j, d, plan.panels + j * plan.depth);
        return;
      }
      pack_right<PG>(values, width, a.width, k - panels, plan.value_words, plan.values);
    });
    on_tasks(parallel, ceil_div(n, plan.tile_rows), [&](int thread, int64_t tile) {
      auto th = plan.thread(thread);
      const int64_t i = tile * plan.tile_rows, tall = std::min(plan.tile_rows, n - i);
      for (int64_t j = 0; j < width; j += kTileColumns) {
        const PairTile t(p, i, tall, j0 + j, std::min(kTileColumns, width - j), kPanel<PS>);
        if (!attends(t, c)) continue;
        const int64_t ld = round_up(t.columns, kPanel<PS>);
        multiply_tile<PS>(left + i * plan.depth, tall, plan.depth, plan.panels + j * plan.depth, ld,
                          th.products, ld, th.split);
        if (p.apart) mend_tile<T>(p, t, y + j * d, th.products, ld, th.products, nullptr);
        attention_terms<T>(p, t, th, th.products, ld, c, nullptr);
        online_weights<T>(th.terms, ld, t, plan.best + i, plan.mass + i, out + i * a.width,
                          a.width);
        th.weights.put(th.terms, ld, 0, 0, tall, t.columns);
        add_rows<PG>(th.weights, 0, tall, 0, ceil_div(t.columns, kPanel<PG>),
                     plan.values + j / PG::kPair * kPanel<PG>, plan.value_words, a.width,
                     out + i * a.width, th.split);
      }
    });
  }
  on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
    const int64_t end = std::min(n, task * 64 + 64);
    for (int64_t i = task * 64; i < end; ++i) {
      const T mass = plan.mass[i], inverse = mass == 0 ? T(0) : T(1) / mass;
      for (int64_t e = 0; e < a.width; ++e) out[i * a.width + e] *= inverse;
      result.lse[i] = mass == 0 ? kNone<double> : double(plan.best[i]) + std::log(double(mass));
    }
  });
}

template <class PS, class PG, class T>
struct AttentionBackward {
  PairBackwardPlan<PS, PG, T> plan;
  GradientBlock<PG> weights;
  typename PS::Word *grad_left, *value_panels;
  typename PG::Word* grad_turned;
  T *dvalues_turned, *shift, *lse, *held_values;
  int64_t depth;

  AttentionBackward(const PairProblem& p, const AttentionIn& a, const PairBackwardOut& out,
                    bool dvalues, Arena& arena)
      : plan(p, out, 0, arena),
        weights(arena, dvalues ? plan.block_rows : 0, dvalues ? plan.block_columns : 0) {
    const int64_t n = p.rows.count;
    depth = words<PS>(a.width);
    grad_left = arena.take<typename PS::Word>(PS::kPair == 2 ? n * depth : 0);
    value_panels = arena.take<typename PS::Word>(plan.block_columns * depth);
    grad_turned = arena.take<typename PG::Word>(dvalues ? a.width * plan.x_words : 0);
    dvalues_turned = arena.take<T>(dvalues ? a.width * plan.block_columns : 0);
    shift = arena.take<T>(n);
    lse = arena.take<T>(n);
    held_values = arena.take<T>(p.stored == Stored::kWide ? 0 : plan.block_columns * a.width);
    plan.shared_bytes = arena.used();
  }
};

template <class PS, class PG, class T>
size_t attention_backward_bytes(const PairProblem& p, const AttentionIn& a,
                                const PairBackwardOut& out, bool dvalues, int threads) {
  Arena arena(nullptr);
  const AttentionBackward<PS, PG, T> all(p, a, out, dvalues, arena);
  return all.plan.shared_bytes + threads * all.plan.thread_bytes;
}

template <class PS, class PG, class T>
void attention_backward(const PairProblem& p, const AttentionIn& a, const AttentionBackwardIn& in,
                        const PairBackwardOut& out, void* dvalues, void* buffer,
                        const Parallel& parallel) {
  constexpr int64_t kStep = kLanes<T>;
  Arena arena(buffer);
  AttentionBackward<PS, PG, T> all(p, a, out, dvalues, arena);
  auto& plan = all.plan;
  const int64_t n = p.rows.count, width = a.width;
  const PairClass c = class_of(a);
  const T* grad = static_cast<const T*>(in.grad_out);
  for (int64_t i = 0; i < n; ++i) {
    all.shift[i] = static_cast<T>(in.shift[i]);
    all.lse[i] = in.lse[i] == kNone<double> ? T(0) : static_cast<T>(in.lse[i]);
  }
  const typename PS::Word* grad_left = all.grad_left;
  if constexpr (PS::kPair != 2) grad_left = grad;
  on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
    const int64_t i = task * 64, rows = std::min<int64_t>(64, n - i);
    if constexpr (PS::kPair == 2) {
      narrow_rows<PS>(grad + i * width, rows, width, all.grad_left + i * all.depth);
    }
    if (dvalues) {
      turn_rows<PG>(grad + i * width, rows, width, all.grad_turned + i / PG::kPair, plan.x_words);
    }
  });
  const auto gradient = [&](auto& th, PairTile& t, int64_t ld, int64_t row, int64_t column) {
    if (t.pure != c && !t.mixed) t.skip = true;
    if (t.skip) {
      if (dvalues) all.weights.put_zero(row, column, t.rows, t.columns);
      return;
    }
    attention_terms<T>(p, t, th, th.scores, ld, c, th.slope);
    // <grad_out, v> in place of the products
    multiply_tile<PS>(grad_left + t.row0 * all.depth, t.rows, all.depth,
                      all.value_panels + column * all.depth, ld, th.products, ld, th.split);
    const Vector<T> zero = {};
    for (int64_t i = 0; i < t.rows; ++i) {
      const T lse = all.lse[t.row0 + i], shift = all.shift[t.row0 + i];
      for (int64_t j = 0; j < ld; j += kStep) {
        const Vector<T> z = load(th.terms + i * ld + j);
        const Vector<T> weight = z == zero + kNone<T> ? zero : exp(z - lse);
        const Vector<T> g =
            weight * (load(th.products + i * ld + j) - shift) * load(th.slope + i * ld + j);
        store(th.terms + i * ld + j, weight);
        store(th.gradient + i * ld + j, g);
      }
    }
    if (dvalues) all.weights.put(th.terms, ld, row, column, t.rows, t.columns);
  };
  const auto begin = [&](int64_t j0, int64_t count) {
    const T* values = block_of(p.stored, a.values, j0, count, width, all.held_values, parallel);
    on_tasks(parallel, ceil_div(count, kPanel<PS>), [&](int, int64_t k) {
      const int64_t j = k * kPanel<PS>;
      pack_panel<PS>(values + j * width, count - j, width, all.value_panels + j * all.depth);
    });
    if (dvalues) std::fill_n(all.dvalues_turned, width * plan.block_columns, T(0));
  };
  const auto end_block = [&](int64_t i0, int64_t tall, int64_t count) {
    if (!dvalues) return;
    const int64_t panels = ceil_div(count, kPanel<PG>), strip = std::min<int64_t>(192, width);
    on_tasks(parallel, panels * ceil_div(width, strip), [&](int thread, int64_t task) {
      const int64_t panel = task % panels, e = task / panels * strip;
      add_columns<PG>(all.weights, tall, panel, panel + 1, all.grad_turned + i0 / PG::kPair,
                      plan.x_words, e, std::min(strip, width - e), all.dvalues_turned,
                      plan.block_columns, plan.thread(thread).split);
    });
  };
  const auto end_columns = [&](int64_t j0, int64_t count) {
    T part[kPart];
    for (int64_t j = 0; dvalues && j < count; ++j) {
      for (int64_t e0 = 0; e0 < width; e0 += kPart) {
        const int64_t wide = std::min(kPart, width - e0);
        const T* from = all.dvalues_turned + e0 * plan.block_columns + j;
        for (int64_t e = 0; e < wide; ++e) part[e] = from[e * plan.block_columns];
        write_part(p.stored, dvalues, (j0 + j) * width + e0, wide, part);
      }
    }
  };
  sweep_backward<PS, PG, T>(p, plan, out, parallel, gradient, begin, end_block, end_columns);
}

}  // namespace fused_losses::FL_ISA
