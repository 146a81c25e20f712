// Backward of the divergences: both tiles again, a G of each side that asks, their products.
#pragma once

#include "forward.h"

namespace fused_losses::FL_ISA {

// What rows bring to their slopes, [padded] each; gradients are zero past n.
template <class T>
struct SlopeRows {
  SoftmaxRows<T> softmaxes;
  T* asked;  // 0 where all that comes in is 0: such a row has no gradient, whatever its scores are
  T *g_lse, *g_teacher_lse;
  T* g[2];
  T* power_lse;
  T *s_high, *s_low, *t_high, *t_low;  // of the means, pairs

  SlopeRows(Arena& arena, int64_t padded) : softmaxes(arena, padded) {
    asked = arena.take<T>(padded);
    g_lse = arena.take<T>(padded);
    g_teacher_lse = arena.take<T>(padded);
    for (T*& rows : g) rows = arena.take<T>(padded);
    for (T** rows : {&power_lse, &s_high, &s_low, &t_high, &t_low}) {
      *rows = arena.take<T>(padded);
    }
  }

  void set(const DivergenceProblem& p, const DivergenceBackwardIn& in, int64_t padded) const {
    const int64_t n = p.student.n;
    const bool power = p.kind == DivergenceKind::kPower;
    softmaxes.set(n, padded, in.lse, in.teacher_lse, [&](int64_t i) { return mean(p, in, 0, i); });
    const int differentiable = power ? 2 : 1;
    for (int64_t i = 0; i < padded; ++i) {
      // a row without other classes has nothing to share out
      const bool live = i < n && in.lse[i] != kNoClass;
      const auto gradient = [&](const void* rows, int64_t at) {
        return live ? static_cast<const T*>(rows)[at] : T(0);
      };
      g_lse[i] = gradient(in.grad_lse, i);
      g_teacher_lse[i] = gradient(in.grad_teacher_lse, i);
      for (int k = 0; k < 2; ++k) {
        g[k][i] = k < differentiable ? gradient(in.grad_folds, k * n + i) : T(0);
      }
      const bool some = g_lse[i] != 0 || g_teacher_lse[i] != 0 || g[0][i] != 0 || g[1][i] != 0;
      asked[i] = some ? T(1) : T(0);
      power_lse[i] = power && i >= n ? -kApart<T> : T(live && power ? in.folds[i] : 0);
      split(live ? mean(p, in, 1, i) : Mean{}, s_high + i, s_low + i);
      split(live ? mean(p, in, kept_of(p.kind) / 2 - 1, i) : Mean{}, t_high + i, t_low + i);
    }
  }

  // A pair that the forward kept of a row; of folds that others joined, what these tell.
  static Mean mean(const DivergenceProblem& p, const DivergenceBackwardIn& in, int at, int64_t i) {
    using K = DivergenceKind;
    const int64_t n = p.student.n;
    if (!kept_of(p.kind)) return {in.lse[i] - in.teacher_lse[i], 0};
    if (in.kept) return {in.kept[2 * at * n + i], in.kept[(2 * at + 1) * n + i]};
    const double between = in.lse[i] - in.teacher_lse[i];
    if (p.kind == K::kPower) return {at ? in.folds[n + i] : in.lse[i] - in.folds[i], 0};
    if (at == 0) return {between, 0};
    if (p.kind == K::kForward) return {between - in.folds[i], 0};
    if (p.kind == K::kReverse) return {between + in.folds[i], 0};
    return {in.folds[at * n + i], 0};
  }

  divergence_rules::DivergenceRow<Vector<T>> at(int64_t i) const {
    return {load(softmaxes.lse + i),
            load(softmaxes.teacher_lse + i),
            load(softmaxes.gap_high + i),
            load(softmaxes.gap_low + i),
            load(s_high + i),
            load(s_low + i),
            load(t_high + i),
            load(t_low + i),
            load(g_lse + i),
            load(g_teacher_lse + i),
            {load(g[0] + i), load(g[1] + i)},
            load(power_lse + i)};
  }
};

// One class's slopes over the rows [0, rows) from row0 on; both sides' with g_v.
template <class T>
using SlopesOfClass = void (*)(const SlopeRows<T>&, int64_t row0, int64_t rows, const T* u,
                               T student_bias, const T* v, T teacher_bias, const T* apart,
                               T apart_bias, T param, T* g_u, T* g_v);

template <class T, DivergenceKind kind, bool both>
void slopes_of_class(const SlopeRows<T>& of_rows, int64_t row0, int64_t rows, const T* u,
                     T student_bias, const T* v, T teacher_bias, const T* apart, T apart_bias,
                     T param, T* g_u, T* g_v) {
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    const Vector<T> zero = {};
    const auto asked = load(of_rows.asked + row0 + i) > zero;
    Vector<T> of_u, of_v;
    divergence_rules::slopes<DivergenceMath<T>, kind>(
        of_rows.at(row0 + i), load(u + i) + student_bias, load(v + i) + teacher_bias,
        load(apart + i) + apart_bias, param, &of_u, &of_v);
    store(g_u + i, asked ? of_u : zero);
    if constexpr (both) store(g_v + i, asked ? of_v : zero);
  }
}

template <class T, bool both>
SlopesOfClass<T> slopes_for(DivergenceKind kind) {
  using K = DivergenceKind;
  switch (kind) {
    case K::kForward:
      return slopes_of_class<T, K::kForward, both>;
    case K::kReverse:
      return slopes_of_class<T, K::kReverse, both>;
    case K::kPower:
      return slopes_of_class<T, K::kPower, both>;
    case K::kJensenShannon:
      return slopes_of_class<T, K::kJensenShannon, both>;
    case K::kTotalVariation:
      return slopes_of_class<T, K::kTotalVariation, both>;
    case K::kBernoulli:
      return slopes_of_class<T, K::kBernoulli, both>;
    case K::kBernoulliNorm:
      return slopes_of_class<T, K::kBernoulliNorm, both>;
    default:
      return slopes_of_class<T, K::kSquared, both>;
  }
}

struct NoRows {};

// Both sides' plans after each other in one buffer, then what the pair has beside them.
template <class PS, class PG, class T>
struct DivergenceBackwardPlan {
  using Side = GradientPlan<PS, PG, T, NoRows>;
  Side student, teacher;
  struct Thread {
    PairScratch<T> pair;
    T* g_teacher;  // [ld] of a class of a teacher that is dense
    T* dscale;     // [padded]
  };
  struct Shared {
    SlopeRows<T> rows;
    DifferenceRows<PS, T> difference;
    Shared(Arena& arena, const DivergenceProblem& p, int64_t padded)
        : rows(arena, padded), difference(arena, p, padded) {}
  };
  size_t pair_at, shared_at, pair_bytes;
  char* base;

  DivergenceBackwardPlan(const DivergenceProblem& p, const DivergenceBackwardOut& out, int threads,
                         void* buffer)
      : student(p.student, out.student.dx, out.student.dw, buffer, none),
        teacher(p.teacher, out.teacher.dx, out.teacher.dw,
                buffer ? static_cast<char*>(buffer) + bytes(student, threads) : nullptr, none),
        base(static_cast<char*>(buffer)) {
    shared_at = bytes(student, threads) + bytes(teacher, threads);
    Arena arena(nullptr);
    Shared(arena, p, student.padded);
    pair_at = shared_at + arena.used();
    pair_bytes = 0;
    pair_bytes = thread(p, 0).second;
  }

  static size_t bytes(const Side& side, int threads) {
    return side.shared_bytes + threads * side.thread_bytes;
  }
  size_t bytes(int threads) const { return pair_at + threads * pair_bytes; }

  Shared shared(const DivergenceProblem& p) const {
    Arena arena(base + shared_at);
    return Shared(arena, p, student.padded);
  }

  std::pair<Thread, size_t> thread(const DivergenceProblem& p, int index) const {
    Arena arena(base ? base + pair_at + index * pair_bytes : nullptr);
    const auto tile = student.thread(p.student, 0).first.tile;
    PairScratch<T> pair(arena, p, tile.tile, tile.ld, may_be_near<PS>(p));
    T* g = arena.take<T>(p.dense.data ? tile.ld : 0);
    T* dscale = arena.take<T>(p.dense.data ? student.padded : 0);
    return {Thread{pair, g, dscale}, arena.used()};
  }

 private:
  static NoRows none(Arena&, int64_t) { return {}; }
};

// G of one class, in place: what its bias and its norm take of it, then the words of both products.
template <class T, class Scores, class Words, class Thread>
inline void take_gradient(const Target* begin, const Target* end, const T* target,
                          const T* g_target, const Scores& score, int64_t row0, int64_t rows,
                          int64_t c, int64_t count, Words& words, Thread& th) {
  T* g = words.row(c);
  const T inverse = th.tile.inverse[c];
  Vector<T> along = {}, total = {};
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    const Vector<T> of_score = load(g + i);
    total += of_score;
    along += of_score * score(i);
    store(g + i, of_score * inverse);
  }
  th.along[c] += sum<T>(along);
  th.bias[c] += sum<T>(total);
  for (const Target* t = begin; t != end; ++t) {
    const int64_t i = t->row - row0;
    if (i < 0 || i >= rows) continue;
    g[i] = g_target[t->row] * inverse;
    th.along[c] += g_target[t->row] * target[i];
    th.bias[c] += g_target[t->row];
  }
  words.finish(c, count, rows);
}

// Of a dense teacher's scores, whose G has been left in their place.
template <class PS, class T>
inline void take_dense(const DivergenceProblem& p, const DivergenceBackwardOut& out,
                       const TilePair<PS, T>& pair, T* dscale, int64_t row0, int64_t rows) {
  const int64_t real = std::min(rows, p.student.n - row0);
  for (int64_t i = 0; i < real; ++i) {
    const int64_t row = row0 + i;
    const T factor = scale_of<T>(p.dense, row);
    T total = 0;
    with_dense(p.dense, [&](const auto* data) {
      for (int64_t c = 0; c < pair.student.count; ++c) {
        const int64_t id = pair.student.id(c);
        const T g = pair.apart[c * pair.ld + i];
        if (g != 0)
          total += g * widened<T>(data[row * p.dense.row_stride + id * p.dense.column_stride]);
        if (out.ddense) static_cast<T*>(out.ddense)[row * out.dense_columns + id] = g * factor;
      }
    });
    dscale[row] += total;
  }
}

template <class PS, class PG, class T>
size_t divergence_backward_bytes(const DivergenceProblem& given, const DivergenceBackwardOut& out,
                                 int threads) {
  return DivergenceBackwardPlan<PS, PG, T>(in_step(given), out, threads, nullptr).bytes(threads);
}

template <class PS, class PG, class T>
void divergence_backward(const DivergenceProblem& given, const DivergenceBackwardIn& in,
                         const DivergenceBackwardOut& out, void* buffer, const Parallel& parallel) {
  const DivergenceProblem p = in_step(given);
  const DivergenceBackwardPlan<PS, PG, T> plan(p, out, parallel.threads, buffer);
  using Thread = typename GradientPlan<PS, PG, T, NoRows>::Thread;
  pack_operands(p.student, plan.student, parallel);
  pack_operands(p.teacher, plan.teacher, parallel);
  const auto shared = plan.shared(p);
  const SlopeRows<T>& of_rows = shared.rows;
  of_rows.set(p, in, plan.student.padded);
  PairRows<PS, T> x = {plan.student.columns, plan.student.x(p.student), plan.teacher.columns,
                       plan.teacher.x(p.teacher)};
  shared.difference.add_to(x, p, plan.student.padded);
  const bool dense = p.dense.data && (out.ddense || out.dscale || out.teacher.db);
  const bool both = dense || out.teacher.dx || out.teacher.dw || out.teacher.db;
  const auto slopes = both ? slopes_for<T, true>(p.kind) : slopes_for<T, false>(p.kind);
  const auto* g_target = static_cast<const T*>(in.grad_target);
  const auto* g_teacher_target = static_cast<const T*>(in.grad_teacher_target);
  on_tasks(parallel, parallel.threads, [&](int, int64_t run) {
    Thread student = cleared_thread(p.student, plan.student, run);
    Thread teacher = cleared_thread(p.teacher, plan.teacher, run);
    auto own = plan.thread(p, run).first;
    if (p.dense.data) std::fill_n(own.dscale, plan.student.padded, T(0));
    int64_t begin, end;
    tiles_of(run, parallel.threads, plan.student.tiles, &begin, &end);
    const int64_t block = round_up(kBlockRows, kPanel<PS>);
    for (int64_t t = begin; t < end; ++t) {
      const TilePair<PS, T> pair(p, x, student.tile, teacher.tile, own.pair, t, Kept::kRead);
      const int64_t count = pair.student.count;
      open_tile(p.student, plan.student, student, pair.student);
      open_tile(p.teacher, plan.teacher, teacher, pair.teacher);
      for (int64_t row0 = 0; row0 < plan.student.padded; row0 += block) {
        const int64_t rows = std::min(block, plan.student.padded - row0);
        pair.score(row0, rows);
        GradientWords<PG, T, Thread> words(student), teacher_words(teacher);
        const Target* next = pair.student.targets;
        for (int64_t c = 0; c < count; ++c) {
          const Target* first = next;
          while (next != pair.student.targets_end && next->position == pair.student.first + c) {
            ++next;
          }
          T *u = pair.u + c * pair.ld, *v = pair.v + c * pair.ld, *apart = pair.apart + c * pair.ld;
          slopes(of_rows, row0, rows, u, own.pair.student_bias[c], v, own.pair.teacher_bias[c],
                 apart, own.pair.apart_bias[c], static_cast<T>(p.param), words.row(c),
                 both ? teacher_words.row(c) : nullptr);
          take_gradient(
              first, next, own.pair.student_target, g_target,
              [&](int64_t i) { return load(u + i); }, row0, rows, c, count, words, student);
          if (!both) continue;
          if (dense) std::copy_n(teacher_words.row(c), rows, own.g_teacher);
          take_gradient(
              first, next, own.pair.teacher_target, g_teacher_target,
              [&](int64_t i) { return load(v + i); }, row0, rows, c, count, teacher_words, teacher);
          if (!dense) continue;
          std::copy_n(own.g_teacher, rows, apart);
          for (const Target* at = first; at != next; ++at) {
            const int64_t i = at->row - row0;
            if (i >= 0 && i < rows) apart[i] = g_teacher_target[at->row];
          }
        }
        if (dense) take_dense<PS, T>(p, out, pair, own.dscale, row0, rows);
        multiply_block(p.student, out.student, plan.student, student, pair.student, row0, rows);
        multiply_block(p.teacher, out.teacher, plan.teacher, teacher, pair.teacher, row0, rows);
      }
      close_tile(p.student, out.student, plan.student, student, pair.student);
      close_tile(p.teacher, out.teacher, plan.teacher, teacher, pair.teacher);
    }
  });
  write_dx(p.student, out.student, plan.student, parallel);
  write_dx(p.teacher, out.teacher, plan.teacher, parallel);
  for (int64_t i = 0; out.dscale && i < p.student.n; ++i) {
    T total = 0;
    for (int index = 0; index < parallel.threads; ++index) {
      total += plan.thread(p, index).first.dscale[i];
    }
    static_cast<T*>(out.dscale)[i] = total;
  }
}

}  // namespace fused_losses::FL_ISA
