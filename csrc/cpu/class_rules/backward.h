// Backward of the class rules: a class's slope, spread over its centres, in the tile's G.
#pragma once

#include "forward.h"

namespace fused_losses::FL_ISA {

template <class PS, class PG, class T>
using ClassBackwardPlan = GradientPlan<PS, PG, T, RuleRows<T>>;

template <class PS, class PG, class T>
inline ClassBackwardPlan<PS, PG, T> class_backward_plan(const ClassProblem& c,
                                                        const ClassBackwardIn& in, bool dx, bool dw,
                                                        void* base) {
  const int statistics = loops_of<T>(c).statistics;
  return ClassBackwardPlan<PS, PG, T>(c.rows, dx, dw, base, [&](Arena& arena, int64_t padded) {
    const int64_t n = c.rows.n;
    RuleRows<T> rows;
    rows.values = take_rows<T>(arena, c.values, c.value_rows, n, padded);
    rows.merged = take_rows<T>(arena, in.statistics, statistics, n, padded);
    rows.grads = take_rows<T>(arena, in.grad_statistics, statistics, n, padded);
    rows.padded = padded;
    return rows;
  });
}

// A row without negatives, or of infinitely low ones alone, has nothing to share out.
template <class T>
inline void drop_empty_rows(const RuleLoops<T>& loops, const RuleRows<T>& rows) {
  for (int64_t at = 0; at < loops.statistics * rows.padded; ++at) {
    const bool empty =
        loops.lse[at / rows.padded] && rows.merged[at] == -std::numeric_limits<T>::infinity();
    if (!empty) continue;
    rows.merged[at] = 0;
    rows.grads[at] = 0;
  }
}

// G of a tile for the rows [row0, row0 + rows), times `inverse`, in the words of both products.
template <class PS, class PG, class T>
inline void gradient_of_classes(const ClassProblem& c, const ClassBackwardIn& in,
                                const RuleLoops<T>& loops, const RuleRows<T>& of_rows,
                                typename ClassBackwardPlan<PS, PG, T>::Thread& th,
                                const Tile<PS, T>& tile, const T* scores, int64_t ld, int64_t row0,
                                int64_t rows) {
  const Problem& p = c.rows;
  const TileScratch<PS, T>& s = th.tile;
  const int64_t centers = p.group, count = tile.count / centers;
  const T sharpness = sharpness_of<T>(c);
  GradientWords<PG, T, typename ClassBackwardPlan<PS, PG, T>::Thread> words(th);
  alignas(64) T cosine[kBlockRows + 64], g[kBlockRows + 64];
  const auto fill = [&](int64_t j, const T* keep, const ClassLabel* begin, const ClassLabel* end) {
    const int64_t from = j * centers;
    PoolGradient<T> pool({scores + from * ld, ld, s.inverse + from, centers, rows, sharpness},
                         cosine);
    loops.slope(c.params, of_rows, {cosine, keep, row0, rows}, g);
    for (const ClassLabel* l = begin; keep && l != end; ++l) {
      const int64_t i = l->row - row0;
      if (i < 0 || i >= rows) continue;
      g[i] += static_cast<const T*>(in.grad_targets)[l->row * c.slots + l->slot];
    }
    for (int64_t k = from; k < from + centers; ++k) {
      T* g_out = words.row(k);
      th.along[k] += pool.centre(k - from, g, g_out);
      words.finish(k, tile.count, rows);
    }
  };
  each_labelled_class<T>(c, tile.first / centers, count, row0, rows, s.keep, fill);
}

template <class PS, class PG, class T>
size_t class_backward_bytes(const ClassProblem& c, int threads, bool dx, bool dw) {
  const auto plan = class_backward_plan<PS, PG, T>(c, {}, dx, dw, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class PG, class T>
void class_backward(const ClassProblem& c, const ClassBackwardIn& in, const BackwardOut& out,
                    void* buffer, const Parallel& parallel) {
  const RuleLoops<T> loops = loops_of<T>(c);
  const auto plan = class_backward_plan<PS, PG, T>(c, in, out.dx, out.dw, buffer);
  drop_empty_rows(loops, plan.own);
  sweep_gradient(
      c.rows, out, plan, parallel,
      [&](auto& th, const auto& tile, const T* scores, int64_t ld, int64_t row0, int64_t rows) {
        gradient_of_classes<PS, PG, T>(c, in, loops, plan.own, th, tile, scores, ld, row0, rows);
      });
}

}  // namespace fused_losses::FL_ISA
