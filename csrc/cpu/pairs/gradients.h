// Backward of the statistics of pairs: dL/du of a tile.
#pragma once

#include "backward.h"

namespace fused_losses::FL_ISA {

// One side's vectors as the tiles read them: [class][count] in T.
template <class T>
struct SideVectors {
  T *lse, *rest, *share, *rate;
  int64_t count;
  bool any_share[kClasses] = {};

  static int64_t size(int64_t count) { return 4 * kClasses * count; }

  // g q + t as rest q + share (q - rate): near zero loss g -> -t count, and that difference is
  // taken in double. Reductions that sum f(z): rest f'(z) + share.
  SideVectors(const PairProblem& p, const double* grad, const double* stats, int64_t n, T* memory)
      : count(n) {
    lse = memory, rest = lse + kClasses * n, share = rest + kClasses * n;
    rate = share + kClasses * n;
    for (int64_t k = 0; k < kClasses * n; ++k) {
      const double g = grad[k], t = grad[kClasses * n + k];
      const double value = stats[kValue * kClasses * n + k];
      const double pairs = stats[kCount * kClasses * n + k];
      const bool is_lse = p.reduction == Reduction::kLse;
      lse[k] = value == kNone<double> ? T(0) : static_cast<T>(value);
      rest[k] = static_cast<T>(is_lse ? g + t * pairs : g);
      share[k] = static_cast<T>(is_lse ? -t * pairs : t);
      rate[k] = static_cast<T>(1 / std::max(pairs, 1.0));
      if (t != 0) any_share[k / n] = true;
    }
  }
};

// th.gradient (+)= dL/du of one class through the sides asked for; terms and slope are at hand.
template <class T, class Thread>
inline void add_slopes(const PairProblem& p, const PairTile& t, Thread& th, int64_t ld, PairClass c,
                       const SideVectors<T>* rows, const SideVectors<T>* columns, bool fresh) {
  constexpr int64_t kStep = kLanes<T>;
  const Vector<T> zero = {}, none = zero + kNone<T>;
  const int64_t wide = round_up(t.columns, kStep);
  // the columns' vectors, readable past the last column
  alignas(64) T of[4][kTileColumns + 64] = {};
  if (columns) {
    const T* from[4] = {columns->lse, columns->rest, columns->share, columns->rate};
    for (int v = 0; v < 4; ++v) {
      const T* at = from[v] + c * columns->count + t.column0;
      std::copy(at, at + t.columns, of[v]);
    }
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t k = rows ? c * rows->count + t.row0 + i : 0;
    for (int64_t j = 0; j < wide; j += kStep) {
      const Vector<T> z = load(th.terms + i * ld + j);
      T* to = th.gradient + i * ld + j;
      if (!any(z != none)) {
        if (fresh) store(to, zero);
        continue;
      }
      Vector<T> g = zero;
      if (rows) {
        g += pair_rules::side_slope<PairMath<T>>(p.reduction, z, zero + rows->lse[k],
                                                 zero + rows->rate[k], zero + rows->rest[k],
                                                 zero + rows->share[k]);
      }
      if (columns) {
        g += pair_rules::side_slope<PairMath<T>>(p.reduction, z, load(of[0] + j), load(of[3] + j),
                                                 load(of[1] + j), load(of[2] + j));
      }
      g = z == none ? zero : g * load(th.slope + i * ld + j);
      store(to, fresh ? g : load(to) + g);
    }
  }
}

// As `add_slopes`, of a linear score and plain sums: G = e^{z - K} (A_i + B_j), one exponential for
// both sides. False, and nothing done, where the tile's spread is too wide for one K.
template <class T, class Thread>
inline bool shared_slopes(const PairProblem& p, const PairTile& t, Thread& th, int64_t ld,
                          PairClass c, const SideVectors<T>& rows, const SideVectors<T>* columns,
                          bool fresh) {
  constexpr int64_t kStep = kLanes<T>;
  const Vector<T> zero = {}, none = zero + kNone<T>;
  const T* row_lse = rows.lse + c * rows.count + t.row0;
  const T* column_lse = columns ? columns->lse + c * columns->count + t.column0 : row_lse;
  const int64_t column_count = columns ? t.columns : t.rows;
  const auto [row_low, row_high] = std::minmax_element(row_lse, row_lse + t.rows);
  const auto [low, high] = std::minmax_element(column_lse, column_lse + column_count);
  const T top = std::max(*row_high, *high);
  // written so that a NaN goes the general way
  if (!(top - std::min(*row_low, *low) <= T(kSpread))) return false;
  const T factor = static_cast<T>(p.rule[c].factor);
  const T* row_rest = rows.rest + c * rows.count + t.row0;
  for (int64_t i = 0; i < t.rows; ++i) th.row_factor[i] = top - row_lse[i];
  for (int64_t i = 0; i < t.rows; i += kStep) {
    store(th.row_factor + i, exp(load(th.row_factor + i)));
  }
  for (int64_t i = 0; i < t.rows; ++i) th.row_factor[i] *= row_rest[i] * factor;
  std::fill(th.column_factor, th.column_factor + kTileColumns + 64, T(0));
  if (columns) {
    const T* rest = columns->rest + c * columns->count + t.column0;
    for (int64_t j = 0; j < t.columns; ++j) th.column_factor[j] = top - column_lse[j];
    for (int64_t j = 0; j < t.columns; j += kStep) {
      store(th.column_factor + j, exp(load(th.column_factor + j)));
    }
    for (int64_t j = 0; j < t.columns; ++j) th.column_factor[j] *= rest[j] * factor;
  }
  for (int64_t i = 0; i < t.rows; ++i) {
    const Vector<T> own = zero + th.row_factor[i];
    for (int64_t j = 0; j < t.columns; j += kStep) {
      const Vector<T> z = load(th.terms + i * ld + j);
      T* to = th.gradient + i * ld + j;
      if (t.mixed && !any(z != none)) {
        if (fresh) store(to, zero);
        continue;
      }
      Vector<T> g = exp(z - top) * (own + load(th.column_factor + j));
      // a factor that is NaN is so for the class's own pairs alone
      if (t.mixed) g = z == none ? zero : g;
      store(to, fresh ? g : load(to) + g);
    }
  }
  return true;
}

template <class T, class Thread>
inline void tile_gradient(const PairProblem& p, const PairTile& t, Thread& th, int64_t ld,
                          const SideVectors<T>& rows, const SideVectors<T>* columns) {
  const bool windows = p.rows.window || p.columns.window;
  if (t.mixed) t.codes(p, th.codes, ld);
  bool fresh = true;
  // the negatives first, who fill a tile: the positives are then added where there are any
  for (const PairClass c : {kNegative, kPositive}) {
    const int k = c;
    if (!t.mixed && t.pure != c) continue;
    if (t.mixed && c == kPositive && !p.rows.labels) continue;
    const Code<T>* codes = t.mixed ? th.codes : nullptr;
    const bool plain = !windows && p.score == Score::kLinear &&
                       p.rule[k].reach == std::numeric_limits<double>::infinity() &&
                       p.reduction == Reduction::kLse && !rows.any_share[k] &&
                       !(columns && columns->any_share[k]);
    const Window first = p.rows.window ? Window::kRows : Window::kNone;
    fill_terms<T>(p, t, th.scores, ld, codes, c, first, th.terms, plain ? nullptr : th.slope);
    if (plain) {
      if (shared_slopes<T>(p, t, th, ld, c, rows, columns, fresh)) {
        fresh = false;
        continue;
      }
      fill_terms<T>(p, t, th.scores, ld, codes, c, first, th.terms, th.slope);
    }
    add_slopes<T>(p, t, th, ld, c, &rows, windows ? nullptr : columns, fresh);
    fresh = false;
    if (windows && columns) {
      const Window second = p.columns.window ? Window::kColumns : Window::kNone;
      fill_terms<T>(p, t, th.scores, ld, codes, c, second, th.terms, th.slope);
      add_slopes<T>(p, t, th, ld, c, static_cast<const SideVectors<T>*>(nullptr), columns, false);
    }
  }
}

template <class PS, class PG, class T>
size_t pair_backward_bytes(const PairProblem& p, const PairBackwardOut& out, int threads) {
  Arena arena(nullptr);
  const int64_t n = p.rows.count, m = p.both && !p.triangle ? p.columns.count : 0;
  const int64_t vectors = SideVectors<T>::size(n) + SideVectors<T>::size(m);
  const PairBackwardPlan<PS, PG, T> plan(p, out, vectors, arena);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class PG, class T>
void pair_backward(const PairProblem& p, const PairBackwardIn& in, const PairBackwardOut& out,
                   void* buffer, const Parallel& parallel) {
  Arena arena(buffer);
  const int64_t n = p.rows.count, m = p.both && !p.triangle ? p.columns.count : 0;
  const int64_t vectors = SideVectors<T>::size(n) + SideVectors<T>::size(m);
  PairBackwardPlan<PS, PG, T> plan(p, out, vectors, arena);
  const SideVectors<T> rows(p, in.grad_rows, in.rows, n, plan.vectors);
  const SideVectors<T> apart(p, in.grad_columns, in.columns, m,
                             plan.vectors + SideVectors<T>::size(n));
  const SideVectors<T>* columns = p.triangle ? &rows : p.both ? &apart : nullptr;
  const auto nothing = [](auto...) {};
  sweep_backward<PS, PG, T>(
      p, plan, out, parallel,
      [&](auto& th, PairTile& t, int64_t ld, int64_t, int64_t) {
        if (!t.skip) tile_gradient<T>(p, t, th, ld, rows, columns);
      },
      nothing, nothing, nothing);
}

}  // namespace fused_losses::FL_ISA
