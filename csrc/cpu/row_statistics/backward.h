// Backward of the row statistics: each tile's scores again, its G in place of them, two products.
#pragma once

#include "gradient.h"

namespace fused_losses::FL_ISA {

template <class T>
struct BackwardRows {
  T *grad_lse, *grad_weighted, *lse;  // [padded], zero past n
  Bent<T> bend;
};

template <class PS, class PG, class T>
using BackwardPlan = GradientPlan<PS, PG, T, BackwardRows<T>>;

template <class PS, class PG, class T>
inline BackwardPlan<PS, PG, T> backward_plan(const Problem& p, bool dx, bool dw, void* base) {
  return BackwardPlan<PS, PG, T>(p, dx, dw, base, [&](Arena& arena, int64_t padded) {
    BackwardRows<T> rows;
    rows.grad_lse = arena.take<T>(padded);
    rows.grad_weighted = arena.take<T>(padded);
    rows.lse = arena.take<T>(padded);
    rows.bend = take_bend<T>(arena, p, padded);
    return rows;
  });
}

// G of a tile for the rows [row0, row0 + rows), times `inverse`, in the words of both products.
template <class PS, class PG, class T, class Bend>
inline void gradient_of_scores(const Problem& p, const Bend& bend, const BackwardIn& in,
                               const BackwardRows<T>& of_rows,
                               typename BackwardPlan<PS, PG, T>::Thread& th,
                               const Tile<PS, T>& tile, const T* scores, int64_t ld, int64_t row0,
                               int64_t rows) {
  constexpr int64_t kStep = kLanes<T>;
  const TileScratch<PS, T>& s = th.tile;
  GradientWords<PG, T, typename BackwardPlan<PS, PG, T>::Thread> words(th);
  const auto fill = [&](int64_t c, const T* keep, const Target* begin, const Target* end) {
    const int64_t id = tile.id(c);
    const T inverse = s.inverse[c], bias = bias_of<T>(p, id);
    const T weight = p.weighted ? column_weight_of<T>(p, id) : T(0);
    const T* product = scores + c * ld;
    T* g_out = words.row(c);
    Vector<T> along = {}, total = {};
    for (int64_t i = 0; i < rows; i += kStep) {
      const Vector<T> raw = load(product + i) * inverse;
      const Vector<T> z = bend.psi(raw, row0 + i) + bias;
      Vector<T> g = exp(z - load(of_rows.lse + row0 + i)) * load(of_rows.grad_lse + row0 + i);
      if (p.weighted) g += load(of_rows.grad_weighted + row0 + i) * weight;
      if (keep) g = load(keep + i) > T(0) ? g : Vector<T>{};
      total += g;
      g = bend.through(g, raw, row0 + i);
      along += g * raw;
      store(g_out + i, g * inverse);
    }
    T along_sum = sum<T>(along);
    for (const Target* t = begin; keep && t != end; ++t) {
      const int64_t i = t->row - row0;
      if (i < 0 || i >= rows) continue;
      const T g = static_cast<const T*>(in.grad_target)[t->row];
      along_sum += g * product[i] * inverse;
      g_out[i] = g * inverse;
    }
    th.along[c] += along_sum;
    th.bias[c] += sum<T>(total);
    words.finish(c, tile.count, rows);
  };
  each_class(tile, row0, rows, s.keep, fill);
}

template <class PS, class PG, class T>
size_t backward_bytes(const Problem& p, int threads, bool dx, bool dw) {
  const auto plan = backward_plan<PS, PG, T>(p, dx, dw, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class PG, class T>
void backward(const Problem& p, const BackwardIn& in, const BackwardOut& out, void* buffer,
              const Parallel& parallel) {
  const auto plan = backward_plan<PS, PG, T>(p, out.dx, out.dw, buffer);
  const BackwardRows<T>& rows = plan.own;
  for (int64_t i = 0; i < plan.padded; ++i) {
    const T lse = i < p.n ? static_cast<const T*>(in.lse)[i] : T(0);
    // a row without other classes has nothing to share out
    const bool live = i < p.n && lse != -std::numeric_limits<T>::infinity();
    rows.lse[i] = live ? lse : T(0);
    rows.grad_lse[i] = live ? static_cast<const T*>(in.grad_lse)[i] : T(0);
    rows.grad_weighted[i] = live && p.weighted ? static_cast<const T*>(in.grad_weighted)[i] : T(0);
  }
  sweep_gradient(
      p, out, plan, parallel,
      [&](auto& th, const auto& tile, const T* scores, int64_t ld, int64_t row0, int64_t count) {
        with_bend(rows.bend, [&](const auto& bend) {
          gradient_of_scores<PS, PG, T>(p, bend, in, rows, th, tile, scores, ld, row0, count);
        });
      });
}

}  // namespace fused_losses::FL_ISA
