// Backward of the row statistics: each tile's scores again, its G in place of them, two products.
#pragma once

#include <cstring>

#include "forward.h"

namespace fused_losses::FL_ISA {

template <class PS, class PG, class T>
struct BackwardPlan {
  int64_t padded, tiles, wide;  // wide: d in whole panels
  bool dx, dw;
  bool direct;  // dw leaves the registers finished: one block of rows, no conversion
  typename PS::Word* columns;
  typename PG::Word* rows;  // x as the right operand of G x
  T* dense;
  T *grad_lse, *grad_weighted, *lse;  // [padded], zero past n
  Bent<T> bend;

  struct Thread {
    TileScratch<PS, T> tile;
    typename PG::Word* by_row;    // G as left operand of G x: [tile][words of rows]
    typename PG::Word* by_class;  // G as left operand of G^T w: [words of tile][ld]
    typename PG::Word* weights;   // w as its right operand
    T* along;                     // [tile] sum_i G product, then what w loses of dw
    T* bias;                      // [tile] sum_i G without targets
    T* dw;                        // [tile, wide] unless direct
    T* dx;                        // [padded + kRows, wide]
  };
  size_t shared_bytes, thread_bytes;
  void* buffer;

  BackwardPlan(const Problem& p, bool need_dx, bool need_dw, void* base)
      : dx(need_dx), dw(need_dw), buffer(base) {
    padded = padded_rows(p.n, kPanel<PS>);
    tiles = (p.k + tile_classes(p) - 1) / tile_classes(p);
    wide = round_up(p.d, kPanel<PG>);
    direct = p.n <= kBlockRows && p.w.type == kNative<T> && !uses_blas(p);
    Arena arena(base);
    columns = arena.take<typename PS::Word>(padded * words<PS>(p.d));
    rows = arena.take<typename PG::Word>(dw ? words<PG>(padded) * wide : 0);
    dense = arena.take<T>(p.n * p.d);
    grad_lse = arena.take<T>(padded);
    grad_weighted = arena.take<T>(padded);
    lse = arena.take<T>(padded);
    bend = take_bend<T>(arena, p, padded);
    shared_bytes = arena.used();
    thread_bytes = 0;
    thread_bytes = thread(p, 0).second;
  }

  std::pair<Thread, size_t> thread(const Problem& p, int index) const {
    using Word = typename PG::Word;
    Arena arena(buffer ? static_cast<char*>(buffer) + shared_bytes + index * thread_bytes
                       : nullptr);
    TileScratch<PS, T> tile(arena, p);
    const int64_t n_by_row = tile.tile * tile.ld / PG::kPair;
    const int64_t n_by_class = words<PG>(tile.tile) * tile.ld;
    Word* by_row = arena.take<Word>(n_by_row);
    // float words serve both products from one buffer
    Word* by_class = PG::kPair == 1 ? by_row : arena.take<Word>(n_by_class);
    Word* weights = arena.take<Word>(dx ? words<PG>(tile.tile) * wide : 0);
    T* along = arena.take<T>(tile.tile);
    T* bias = arena.take<T>(tile.tile);
    T* dw_tile = arena.take<T>(dw && !direct ? tile.tile * wide : 0);
    T* dx_sum = arena.take<T>(dx ? (padded + kRows) * wide : 0);
    return {Thread{tile, by_row, by_class, weights, along, bias, dw_tile, dx_sum}, arena.used()};
  }
};

// G of a tile for the rows [row0, row0 + rows), times `inverse`, in the words of both products.
template <class PS, class PG, class T, class Bend>
inline void gradient_of_scores(const Problem& p, const Bend& bend, const BackwardIn& in,
                               const BackwardPlan<PS, PG, T>& plan,
                               typename BackwardPlan<PS, PG, T>::Thread& th,
                               const Tile<PS, T>& tile, const T* scores, int64_t ld, int64_t row0,
                               int64_t rows) {
  constexpr int64_t kStep = kLanes<T>;
  const TileScratch<PS, T>& s = th.tile;
  // with pairs, a class's G waits here for its partner's
  alignas(64) T pending[kBlockRows + 64];
  const auto fill = [&](int64_t c, const T* keep, const Target* begin, const Target* end) {
    const int64_t id = tile.id(c);
    const T inverse = s.inverse[c], bias = bias_of<T>(p, id);
    const T weight = p.weighted ? column_weight_of<T>(p, id) : T(0);
    const T* product = scores + c * ld;
    T* g_out = PG::kPair == 1 ? reinterpret_cast<T*>(th.by_row) + c * s.ld : pending;
    [[maybe_unused]] alignas(64) T current[PG::kPair == 1 ? 1 : kBlockRows + 64];
    if constexpr (PG::kPair == 2) g_out = c % 2 ? current : pending;
    Vector<T> along = {}, total = {};
    for (int64_t i = 0; i < rows; i += kStep) {
      const Vector<T> raw = load(product + i) * inverse;
      const Vector<T> z = bend.psi(raw, row0 + i) + bias;
      Vector<T> g = exp(z - load(plan.lse + row0 + i)) * load(plan.grad_lse + row0 + i);
      if (p.weighted) g += load(plan.grad_weighted + row0 + i) * weight;
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
#if defined(__AVX512BF16__)
    if constexpr (PG::kPair == 2) {
      uint16_t* by_row = reinterpret_cast<uint16_t*>(th.by_row) + c * s.ld;
      for (int64_t i = 0; i < rows; i += 32) {
        const Floats low = load(g_out + i), high = load(g_out + i + 16);
        const auto pair = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        __builtin_memcpy(by_row + i, &pair, 64);
      }
      const bool last = c + 1 == tile.count;
      if (c % 2 || last) {
        uint32_t* by_class = reinterpret_cast<uint32_t*>(th.by_class) + c / 2 * s.ld;
        for (int64_t i = 0; i < rows; i += 16) {
          const Floats partner = c % 2 ? load(current + i) : Floats{};
          store(by_class + i, interleave(load(pending + i), partner));
        }
      }
    }
#endif
  };
  each_class(tile, row0, rows, s.keep, fill);
}

// dx[rows of the block] += G^T w
template <class PS, class PG, class T>
inline void add_dx([[maybe_unused]] const Problem& p, const BackwardPlan<PS, PG, T>& plan,
                   typename BackwardPlan<PS, PG, T>::Thread& th, const Tile<PS, T>& tile,
                   int64_t row0, int64_t real_rows) {
  using Word = typename PG::Word;
  constexpr int64_t kWide = kPanel<PG>;
  const int64_t depth = words<PG>(tile.count), ld = th.tile.ld;
  if constexpr (kPreferBlas) {
    if (uses_blas(p)) {
      return blas(p, false, true, p.d, real_rows, tile.count, tile.row(0), tile.stride(),
                  th.by_class, ld, T(1), th.dx + row0 * plan.wide, plan.wide);
    }
  }
  for (int64_t q = 0; q < plan.wide; q += kWide) {
    const Word* panel = th.weights + q * words<PG>(th.tile.tile);
    for (int64_t i = 0; i < real_rows; i += kRows) {
      const Word* a[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = th.by_class + i + r;
      T* out = th.dx + (row0 + i) * plan.wide + q;
      multiply<PG, false>(a, ld, panel, depth, [&](int r, int v, Vector<T> sum) {
        T* at = out + r * plan.wide + v * kLanes<T>;
        store(at, load(at) + sum);
      });
    }
  }
}

// Where dw of a tile's class c stands.
template <class Tile>
inline int64_t gradient_row(const BackwardOut& out, const Tile& tile, int64_t c) {
  return out.compact ? tile.first + c : tile.id(c);
}

// dw = G x - along w: straight to the output when this is the only block, else into the tile's sum.
template <class PS, class PG, class T>
inline void add_dw(const Problem& p, const BackwardOut& out, const BackwardPlan<PS, PG, T>& plan,
                   typename BackwardPlan<PS, PG, T>::Thread& th, const Tile<PS, T>& tile,
                   int64_t row0, int64_t real_rows) {
  using Word = typename PG::Word;
  constexpr int64_t kWide = kPanel<PG>;
  const int64_t depth = words<PG>(real_rows), left = th.tile.ld / PG::kPair;
  if constexpr (kPreferBlas) {
    if (uses_blas(p)) {
      return blas(p, false, false, p.d, tile.count, real_rows, plan.dense + row0 * p.d, p.d,
                  th.by_row, th.tile.ld, T(row0 ? 1 : 0), th.dw, plan.wide);
    }
  }
  T* dw = static_cast<T*>(out.dw);
  const bool aligned = (reinterpret_cast<uintptr_t>(dw) | p.d * sizeof(T)) % FL_VECTOR_BYTES == 0;
  for (int64_t q = 0; q < plan.wide; q += kWide) {
    const Word* panel = plan.rows + q * words<PG>(plan.padded) + row0 / PG::kPair * kWide;
    for (int64_t c = 0; c < tile.count; c += kRows) {
      const Word* a[kRows];
      for (int r = 0; r < kRows; ++r) a[r] = th.by_row + std::min(c + r, tile.count - 1) * left;
      const int64_t last = tile.count - c;
      if (!plan.direct) {
        T* to = th.dw + c * plan.wide + q;
        multiply<PG, true>(a, 1, panel, depth, [&](int r, int v, Vector<T> sum) {
          T* at = to + r * plan.wide + v * kLanes<T>;
          if (r < last) store(at, row0 == 0 ? sum : load(at) + sum);
        });
        continue;
      }
      multiply<PG, true>(a, 1, panel, depth, [&](int r, int v, Vector<T> sum) {
        const int64_t e = q + v * kLanes<T>;
        if (r >= last || e >= p.d) return;
        const T* w = tile.row(c + r) + e;
        T* at = dw + gradient_row(out, tile, c + r) * p.d + e;
        if (e + kLanes<T> <= p.d) {
          const Vector<T> value = sum - load(w) * th.along[c + r];
          aligned ? stream(at, value) : store(at, value);
        } else {
          for (int64_t i = 0; i < p.d - e; ++i) at[i] = sum[i] - w[i] * th.along[c + r];
        }
      });
    }
  }
}

template <class PS, class PG, class T>
inline void backward_tile(const Problem& p, const BackwardIn& in, const BackwardOut& out,
                          const BackwardPlan<PS, PG, T>& plan,
                          typename BackwardPlan<PS, PG, T>::Thread& th, int64_t index) {
  const TileScratch<PS, T>& s = th.tile;
  const Tile<PS, T> tile(p, s, index);
  if (plan.dx && !uses_blas(p)) {
    pack_rows<PG, T>([&](int64_t c) { return tile.row(c); }, tile.count, p.d,
                     words<PG>(s.tile) * kPanel<PG>, th.weights);
  }
  std::fill_n(th.along, s.tile, T(0));
  std::fill_n(th.bias, s.tile, T(0));
  const int64_t block = round_up(kBlockRows, kPanel<PS>);
  for (int64_t row0 = 0; row0 < plan.padded; row0 += block) {
    const int64_t rows = std::min(block, plan.padded - row0);
    const int64_t real_rows = std::min(rows, p.n - row0);
    const T* kept = kept_scores<T>(p, tile.first, tile.count);
    const T* scores = kept ? kept + row0 : s.scores;
    const int64_t ld = kept ? round_up(p.n, kKeptPadding) : s.ld;
    if (!kept) tile.multiply_rows(plan.columns, plan.dense, row0, rows, s.scores, s.ld);
    with_bend(plan.bend, [&](const auto& bend) {
      gradient_of_scores(p, bend, in, plan, th, tile, scores, ld, row0, rows);
    });
    if (plan.dx) add_dx(p, plan, th, tile, row0, real_rows);
    if (row0 + block >= plan.padded) {
      // <w_hat, dw_hat> w_hat / |w|, as a factor of w
      for (int64_t c = 0; c < tile.count; ++c) {
        th.along[c] *= p.normalize ? s.inverse[c] * s.inverse[c] : T(0);
      }
    }
    if (plan.dw) add_dw(p, out, plan, th, tile, row0, real_rows);
  }
  // 1/|w| is the shift times what stands in G
  for (int64_t c = 0; plan.dw && plan.direct && tile.shifted && c < tile.count; ++c) {
    T* dw = static_cast<T*>(out.dw) + gradient_row(out, tile, c) * p.d;
    for (int64_t e = 0; e < p.d; ++e) dw[e] *= s.shift[c];
  }
  for (int64_t c = 0; plan.dw && !plan.direct && c < tile.count; ++c) {
    T* dw = th.dw + c * plan.wide;
    const T* w = tile.row(c);
    for (int64_t e = 0; e < p.d; ++e) dw[e] = (dw[e] - w[e] * th.along[c]) * s.shift[c];
    write_row(out.dw, p.w.type, gradient_row(out, tile, c) * p.d, p.d, dw);
  }
  for (int64_t c = 0; out.db && c < tile.count; ++c) {
    static_cast<T*>(out.db)[tile.id(c)] = th.bias[c];
  }
}

template <class PS, class PG, class T>
size_t backward_bytes(const Problem& p, int threads, bool dx, bool dw) {
  const BackwardPlan<PS, PG, T> plan(p, dx, dw, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class PG, class T>
void backward(const Problem& p, const BackwardIn& in, const BackwardOut& out, void* buffer,
              const Parallel& parallel) {
  const BackwardPlan<PS, PG, T> plan(p, out.dx, out.dw, buffer);
  const T* x = dense_rows(p, plan.dense);
  pack_columns<PS>(x, p.n, p.d, p.d, plan.padded, plan.columns);
  if (plan.dw) {
    pack_rows<PG, T>([&](int64_t i) { return x + i * p.d; }, p.n, p.d,
                     words<PG>(plan.padded) * kPanel<PG>, plan.rows);
  }
  for (int64_t i = 0; i < plan.padded; ++i) {
    const T lse = i < p.n ? static_cast<const T*>(in.lse)[i] : T(0);
    // a row without other classes has nothing to share out
    const bool live = i < p.n && lse != -std::numeric_limits<T>::infinity();
    plan.lse[i] = live ? lse : T(0);
    plan.grad_lse[i] = live ? static_cast<const T*>(in.grad_lse)[i] : T(0);
    plan.grad_weighted[i] = live && p.weighted ? static_cast<const T*>(in.grad_weighted)[i] : T(0);
  }
  on_threads(parallel, [&](int index) {
    auto th = plan.thread(p, index).first;
    // but for the tile's rows, which come first and are written before they are read
    char* const zeros = reinterpret_cast<char*>(th.tile.narrow);
    char* const after =
        static_cast<char*>(buffer) + plan.shared_bytes + (index + 1) * plan.thread_bytes;
    std::memset(zeros, 0, after - zeros);
    std::fill_n(th.tile.keep, th.tile.ld, T(1));
    int64_t begin, end;
    tiles_of(index, parallel.threads, plan.tiles, &begin, &end);
    for (int64_t t = begin; t < end; ++t) backward_tile<PS, PG, T>(p, in, out, plan, th, t);
  });
  for (int64_t i = 0; plan.dx && i < p.n; ++i) {
    T* first = plan.thread(p, 0).first.dx + i * plan.wide;
    for (int index = 1; index < parallel.threads; ++index) {
      const T* other = plan.thread(p, index).first.dx + i * plan.wide;
      for (int64_t e = 0; e < p.d; ++e) first[e] += other[e];
    }
    write_row(out.dx, p.x.type, i * p.d, p.d, first);
  }
}

}  // namespace fused_losses::FL_ISA
