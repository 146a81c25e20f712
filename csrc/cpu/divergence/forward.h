// Forward of the divergences: one sweep of tile pairs; a second one for what needs both softmaxes.
#pragma once

#include "sums.h"

namespace fused_losses::FL_ISA {

template <class T>
struct RowRuns {
  Run* runs;          // [padded]
  PowerRun* powers;   // [padded]
  double* folds;      // [kMostFolds, padded]
  SharedRun* shared;  // [2, padded]

  RowRuns(Arena& arena, int64_t padded) {
    runs = arena.take<Run>(padded);
    powers = arena.take<PowerRun>(padded);
    folds = arena.take<double>(kMostFolds * padded);
    shared = arena.take<SharedRun>(2 * padded);
  }
};

template <class PS, class T>
struct DivergencePlan {
  int64_t padded, tiles;
  typename PS::Word *columns, *teacher_columns;
  T *dense, *teacher_dense;
  T* row;  // [the larger d]
  struct Thread {
    TileScratch<PS, T> student, teacher;
    PairScratch<T> pair;
    RowRuns<T> rows;
  };
  struct Shared {
    DifferenceRows<PS, T> difference;
    SoftmaxRows<T> softmaxes;
    Shared(Arena& arena, const DivergenceProblem& p, int64_t padded)
        : difference(arena, p, padded), softmaxes(arena, padded) {}
  };
  size_t shared_bytes, thread_bytes;
  void* buffer;

  DivergencePlan(const DivergenceProblem& p, void* base) : buffer(base) {
    padded = padded_rows(p.student.n, kPanel<PS>);
    tiles = (p.student.k + pair_tile(p) - 1) / pair_tile(p);
    Arena arena(base);
    columns = arena.take<typename PS::Word>(padded * words<PS>(p.student.d));
    teacher_columns = arena.take<typename PS::Word>(padded * words<PS>(p.teacher.d));
    dense = arena.take<T>(p.student.n * p.student.d);
    teacher_dense = arena.take<T>(p.teacher.n * p.teacher.d);
    row = arena.take<T>(std::max(p.student.d, p.teacher.d));
    shared_at_ = arena.used();
    Shared(arena, p, padded);
    shared_bytes = arena.used();
    thread_bytes = 0;
    thread_bytes = thread(p, 0).second;
  }

  Shared shared(const DivergenceProblem& p) const {
    Arena arena(static_cast<char*>(buffer) + shared_at_);
    return Shared(arena, p, padded);
  }

  std::pair<Thread, size_t> thread(const DivergenceProblem& p, int index) const {
    Arena arena(buffer ? static_cast<char*>(buffer) + shared_bytes + index * thread_bytes
                       : nullptr);
    TileScratch<PS, T> student(arena, p.student), teacher(arena, p.teacher);
    PairScratch<T> pair(arena, p, student.tile, student.ld, may_be_near<PS>(p));
    RowRuns<T> rows(arena, padded);
    return {Thread{student, teacher, pair, rows}, arena.used()};
  }

  // body(thread's scratch, tile pair, first row, rows) of all tiles and blocks of rows.
  template <class Body>
  void sweep(const DivergenceProblem& p, const PairRows<PS, T>& x, const Parallel& parallel,
             Kept kept, Body&& body) const {
    on_tasks(parallel, parallel.threads, [&](int, int64_t run) {
      auto th = thread(p, run).first;
      int64_t begin, end;
      tiles_of(run, parallel.threads, tiles, &begin, &end);
      const int64_t block = round_up(kBlockRows, kPanel<PS>);
      for (int64_t t = begin; t < end; ++t) {
        const TilePair<PS, T> pair(p, x, th.student, th.teacher, th.pair, t, kept);
        for (int64_t row0 = 0; row0 < padded; row0 += block) {
          const int64_t rows = std::min(block, padded - row0);
          pair.score(row0, rows);
          body(th, pair, row0, rows);
        }
      }
    });
  }

 private:
  size_t shared_at_;
};

// u, v and apart = u - v of a tile pair, with bias.
template <class PS, class T>
struct SidesOf {
  Scores<T> u, v, apart;
  SidesOf(const TilePair<PS, T>& pair, const PairScratch<T>& own)
      : u{pair.u, own.student_bias, pair.ld},
        v{pair.v, own.teacher_bias, pair.ld},
        apart{pair.apart, own.apart_bias, pair.ld} {}
};

// sum exp(eps v - top), and of u under it, into the rows' runs.
template <class T>
inline void fold_power(const Scores<T>& u, const Scores<T>& v, T eps, int64_t count, int64_t rows,
                       int64_t real_rows, PowerRun* runs) {
  const Vector<T> zero = {};
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    Vector<T> at;
    const Vector<T> most =
        TileSums<T>::highest(
            count, [&](int64_t c) { return v(c, i); }, [&](int64_t c) { return u(c, i); }, &at) *
        eps;
    Vector<T> total = zero, moment = zero;
    for (int64_t c = 0; c < count; ++c) {
      const Vector<T> w = exp(v(c, i) * eps - most);
      total += w;
      moment += w * (u(c, i) - at);
    }
    for (int64_t l = 0; l < kLanes<T> && i + l < real_rows; ++l) {
      if (total[l] == 0) continue;
      const double sum = total[l];
      runs[i + l].add({most[l] + std::log(sum), {at[l], moment[l] / sum}});
    }
  }
}

// Sums over a tile's classes of body(c, i, out) into folds[k * ld + row].
template <int kFolds, class T, class Body>
inline void fold_terms(int64_t count, int64_t rows, int64_t real_rows, int64_t ld, double* folds,
                       Body&& body) {
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    Vector<T> sums[kFolds] = {};
    for (int64_t c = 0; c < count; ++c) {
      Vector<T> terms[kFolds];
      body(c, i, terms);
      for (int k = 0; k < kFolds; ++k) sums[k] += terms[k];
    }
    for (int k = 0; k < kFolds; ++k) {
      for (int64_t l = 0; l < kLanes<T> && i + l < real_rows; ++l) {
        folds[k * ld + i + l] += sums[k][l];
      }
    }
  }
}

// The mean of a tile's slopes under one softmax, into the rows' runs.
template <class T, class Slope>
inline void fold_shared(const Scores<T>& scores, const T* lse, const Slope& slope, int64_t count,
                        int64_t rows, int64_t real_rows, SharedRun* runs) {
  for (int64_t i = 0; i < rows; i += kLanes<T>) {
    Vector<T> most = broadcast(-std::numeric_limits<T>::infinity()), at = {};
    Vector<T> total = {}, moment = {};
    // about the best class so far: what is summed moves with it
    for (int64_t c = 0; c < count; ++c) {
      const Vector<T> z = scores(c, i), x = slope(c, i), w = exp(z - load(lse + i));
      const auto higher = z > most;
      moment = higher ? moment + total * (at - x) : moment + w * (x - at);
      at = higher ? x : at;
      most = higher ? z : most;
      total += w;
    }
    for (int64_t l = 0; l < kLanes<T> && i + l < real_rows; ++l) {
      if (total[l] == 0) continue;
      runs[i + l].add({double(total[l]), {at[l], double(moment[l]) / total[l]}});
    }
  }
}

// The sums of both softmaxes, and of kinds that need no softmax, of a block of a tile pair.
template <class PS, class T>
inline void fold_pair(const DivergenceProblem& p, const TilePair<PS, T>& pair,
                      const PairScratch<T>& own, const RowRuns<T>& into, int64_t padded,
                      int64_t row0, int64_t rows) {
  using K = DivergenceKind;
  const SidesOf<PS, T> of(pair, own);
  const int64_t count = pair.student.count, real = std::min(rows, p.student.n - row0);
  TileSums<T> sums;
  const auto student_leads = [&](int64_t c, int64_t i) {
    return Compared<T>{of.u(c, i), of.v(c, i), of.apart(c, i)};
  };
  const auto teacher_leads = [&](int64_t c, int64_t i) {
    return Compared<T>{of.v(c, i), of.u(c, i), -of.apart(c, i)};
  };
  if (p.kind == K::kReverse) {
    sums.fold(student_leads, count, rows);
  } else {
    sums.fold(teacher_leads, count, rows);
  }
  for (int64_t i = 0; i < real; ++i) into.runs[row0 + i].add(sums.run(i));
  const auto param = static_cast<T>(p.param);
  if (p.kind == K::kPower) {
    return fold_power(of.u, of.v, param, count, rows, real, into.powers + row0);
  }
  const auto sum_terms = [&](auto kind) {
    fold_terms<1, T>(count, rows, real, padded, into.folds + row0,
                     [&](int64_t c, int64_t i, Vector<T>* out) {
                       out[0] = divergence_rules::class_term<DivergenceMath<T>>(
                           kind(), of.u(c, i), of.v(c, i), of.apart(c, i), param);
                     });
  };
  if (p.kind == K::kSquared) sum_terms([] { return K::kSquared; });
  if (p.kind == K::kBernoulli) sum_terms([] { return K::kBernoulli; });
  if (p.kind == K::kBernoulliNorm) sum_terms([] { return K::kBernoulliNorm; });
}

// The sums of kinds that need both softmaxes, whose lse are known.
template <class PS, class T>
inline void fold_softmaxes(const DivergenceProblem& p, const TilePair<PS, T>& pair,
                           const PairScratch<T>& own, const SoftmaxRows<T>& of_rows,
                           const RowRuns<T>& into, int64_t padded, int64_t row0, int64_t rows) {
  using K = DivergenceKind;
  const SidesOf<PS, T> of(pair, own);
  const int64_t count = pair.student.count, real = std::min(rows, p.student.n - row0);
  const auto beta = static_cast<T>(p.param);
  const auto gap_of = [&](int64_t c, int64_t i) {
    const int64_t row = row0 + i;
    return (of.apart(c, i) - load(of_rows.gap_high + row)) - load(of_rows.gap_low + row);
  };
  const auto sum_terms = [&](auto kind) {
    fold_terms<3, T>(
        count, rows, real, padded, into.folds + row0, [&](int64_t c, int64_t i, Vector<T>* out) {
          const int64_t row = row0 + i;
          divergence_rules::softmax_terms<DivergenceMath<T>>(
              kind(), exp(of.u(c, i) - load(of_rows.lse + row)),
              exp(of.v(c, i) - load(of_rows.teacher_lse + row)), gap_of(c, i), beta, out);
        });
    const auto slope = [&](int64_t c, int64_t i, int side) {
      Vector<T> out[2];
      divergence_rules::shared_slopes<DivergenceMath<T>>(kind(), gap_of(c, i), beta, out, out + 1);
      return out[side];
    };
    const Scores<T>* sides[2] = {&of.u, &of.v};
    const T* lse[2] = {of_rows.lse, of_rows.teacher_lse};
    for (int side = 0; side < 2; ++side) {
      fold_shared<T>(
          *sides[side], lse[side] + row0, [&](int64_t c, int64_t i) { return slope(c, i, side); },
          count, rows, real, into.shared + side * padded + row0);
    }
  };
  if (p.kind == K::kJensenShannon) sum_terms([] { return K::kJensenShannon; });
  if (p.kind == K::kTotalVariation) sum_terms([] { return K::kTotalVariation; });
}

// The targets' scores, with bias and scale, in double.
template <class T>
inline void write_both_targets(const DivergenceProblem& p, const T* x, const T* teacher, T* row,
                               const DivergenceForwardOut& out) {
  write_targets(p.student, x, row, out.target);
  if (p.dense.data) {
    std::fill_n(out.teacher_target, p.student.n, 0.0);
  } else {
    write_targets(p.teacher, teacher, row, out.teacher_target);
  }
  for (int64_t t = 0; t < p.student.target_count; ++t) {
    const Target& at = p.student.targets[t];
    const int64_t id = p.student.ids ? p.student.ids[at.position] : at.position;
    if (p.dense.data) {
      with_dense(p.dense, [&](const auto* data) {
        const auto score = data[at.row * p.dense.row_stride + id * p.dense.column_stride];
        out.teacher_target[at.row] =
            static_cast<double>(widened<T>(score)) * scale_of<T>(p.dense, at.row);
      });
    }
    out.target[at.row] += bias_of<T>(p.student, id);
    out.teacher_target[at.row] += bias_of<T>(p.teacher, id);
  }
}

template <class PS, class T>
size_t divergence_forward_bytes(const DivergenceProblem& given, int threads) {
  const DivergenceProblem p = in_step(given);
  const DivergencePlan<PS, T> plan(p, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class T>
void divergence_forward(const DivergenceProblem& given, const DivergenceForwardOut& out,
                        void* buffer, const Parallel& parallel) {
  using K = DivergenceKind;
  const DivergenceProblem p = in_step(given);
  const int64_t n = p.student.n;
  const DivergencePlan<PS, T> plan(p, buffer);
  const int64_t padded = plan.padded;
  const auto pack = [&](const Problem& side, T* dense, typename PS::Word* columns) {
    pack_columns<PS>(dense_rows(side, dense), side.n, side.d, side.d, padded, columns);
  };
  pack(p.student, plan.dense, plan.columns);
  if (!p.dense.data) pack(p.teacher, plan.teacher_dense, plan.teacher_columns);
  const auto shared = plan.shared(p);
  PairRows<PS, T> x = {plan.columns, plan.dense, plan.teacher_columns, plan.teacher_dense};
  shared.difference.add_to(x, p, padded);
  write_both_targets(p, plan.dense, plan.teacher_dense, plan.row, out);
  for (int index = 0; index < parallel.threads; ++index) {
    const auto rows = plan.thread(p, index).first.rows;
    std::fill_n(rows.runs, padded, Run{});
    std::fill_n(rows.powers, padded, PowerRun{});
    std::fill_n(rows.folds, kMostFolds * padded, 0.0);
    std::fill_n(rows.shared, 2 * padded, SharedRun{});
  }
  plan.sweep(p, x, parallel, Kept::kWritten,
             [&](const auto& th, const auto& pair, int64_t row0, int64_t rows) {
               fold_pair<PS, T>(p, pair, th.pair, th.rows, padded, row0, rows);
             });
  const auto keep = [&](int at, int64_t i, const Mean& mean) {
    double* to = out.folds + (folds_of(p.kind) + at) * n + i;
    to[0] = mean.anchor;
    to[n] = mean.offset;
  };
  for (int64_t i = 0; i < n; ++i) {
    Run run;
    PowerRun power;
    for (int index = 0; index < parallel.threads; ++index) {
      const auto rows = plan.thread(p, index).first.rows;
      run.add(rows.runs[i]);
      power.add(rows.powers[i]);
    }
    const double other = run.other_lse();
    const bool turned = p.kind == K::kReverse;
    out.lse[i] = turned ? run.lead : other;
    out.teacher_lse[i] = turned ? other : run.lead;
    out.folds[i] = p.kind == K::kPower ? power.lse : run.divergence();
    if (p.kind == K::kPower) out.folds[n + i] = power.mean.value();
    if (!kept_of(p.kind)) continue;
    // of u - v, whichever side leads
    Mean gap = run.between(), mean = run.center;
    Mean& turns = turned ? gap : mean;
    turns = {-turns.anchor, -turns.offset};
    if (p.kind == K::kPower) {
      mean = power.mean;
      if (p.param != 1) gap = {power.lse == kNoClass ? 0 : out.lse[i] - power.lse, 0};
    }
    keep(0, i, gap);
    if (kept_of(p.kind) == 4) keep(2, i, mean);
  }
  const bool of_softmaxes = p.kind == K::kJensenShannon || p.kind == K::kTotalVariation;
  if (of_softmaxes) {
    const SoftmaxRows<T>& softmaxes = shared.softmaxes;
    const double* kept = out.folds + folds_of(p.kind) * n;
    softmaxes.set(n, padded, out.lse, out.teacher_lse,
                  [&](int64_t i) { return Mean{kept[i], kept[n + i]}; });
    plan.sweep(p, x, parallel, Kept::kRead,
               [&](const auto& th, const auto& pair, int64_t row0, int64_t rows) {
                 fold_softmaxes<PS, T>(p, pair, th.pair, softmaxes, th.rows, padded, row0, rows);
               });
  }
  if (of_softmaxes || p.kind >= K::kBernoulli) {
    for (int k = 0; k < folds_of(p.kind); ++k) {
      for (int64_t i = 0; i < n; ++i) {
        double total = 0;
        for (int index = 0; index < parallel.threads; ++index) {
          total += plan.thread(p, index).first.rows.folds[k * padded + i];
        }
        out.folds[k * n + i] = total;
      }
    }
  }
  for (int side = 0; of_softmaxes && side < 2; ++side) {
    for (int64_t i = 0; i < n; ++i) {
      SharedRun run;
      for (int index = 0; index < parallel.threads; ++index) {
        run.add(plan.thread(p, index).first.rows.shared[side * padded + i]);
      }
      const double sum = out.folds[(1 + side) * n + i];
      // the sum of terms that are not negative is the better where no class has nearly all
      const bool one = std::abs(run.mean.offset) * 16 <= std::abs(sum);
      keep(2 + 2 * side, i, one ? run.mean : Mean{sum, 0});
    }
  }
}

}  // namespace fused_losses::FL_ISA
