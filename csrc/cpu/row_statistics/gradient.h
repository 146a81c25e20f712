// Gradients by tiles: whatever G a primitive leaves of a tile's scores, and its two products.
#pragma once

#include "forward.h"

namespace fused_losses::FL_ISA {

// Own: what else a primitive wants of all threads' memory, made by own(arena, padded).
template <class PS, class PG, class T, class Own>
struct GradientPlan {
  int64_t padded, tiles, wide;  // wide: d in whole panels
  bool dx, dw;
  bool direct;  // dw leaves the registers finished: one block of rows, no conversion
  typename PS::Word* columns;
  typename PG::Word* rows;  // x as the right operand of G x
  T* dense;                 // where x does not lie so
  Own own;

  struct Thread {
    TileScratch<PS, T> tile;
    typename PG::Word* by_row;    // G as left operand of G x: [tile][words of rows]
    typename PG::Word* by_class;  // G as left operand of G^T w: [words of tile][ld]
    typename PG::Word* turned;    // some rows of that along the words, for tile registers
    typename PG::Word* weights;   // w as its right operand
    T* along;                     // [tile] sum_i G product, then what w loses of dw
    T* bias;                      // [tile] sum_i G without targets
    T* dw;                        // [tile, wide] unless direct
    T* dx;                        // [padded + kAtOnce, wide]
  };
  size_t shared_bytes, thread_bytes;
  void* buffer;

  template <class Make>
  GradientPlan(const Problem& p, bool need_dx, bool need_dw, void* base, Make&& make)
      : dx(need_dx), dw(need_dw), buffer(base) {
    padded = padded_rows(p.n, kPanel<PS>);
    tiles = (p.k + tile_classes(p) - 1) / tile_classes(p);
    wide = round_up(p.d, kPanel<PG>);
    direct = p.n <= kBlockRows && p.w.type == kNative<T> && !uses_blas(p);
    Arena arena(base);
    columns = arena.take<typename PS::Word>(padded * words<PS>(p.d));
    rows = arena.take<typename PG::Word>(dw ? words<PG>(padded) * wide : 0);
    dense = arena.take<T>(lies_dense<T>(p) ? 0 : p.n * p.d);
    own = make(arena, padded);
    shared_bytes = arena.used();
    thread_bytes = 0;
    thread_bytes = thread(p, 0).second;
  }

  const T* x(const Problem& p) const {
    return lies_dense<T>(p) ? static_cast<const T*>(p.x.data) : dense;
  }

  std::pair<Thread, size_t> thread(const Problem& p, int index) const {
    using Word = typename PG::Word;
    Arena arena(buffer ? static_cast<char*>(buffer) + shared_bytes + index * thread_bytes
                       : nullptr);
    TileScratch<PS, T> tile(arena, p);
    const int64_t n_by_row = tile.tile * tile.ld / PG::kPair;
    const int64_t deep = round_up(words<PG>(tile.tile), kInTiles<PG> ? 16 : 1);
    Word* by_row = arena.take<Word>(n_by_row);
    // float words serve both products from one buffer
    Word* by_class = PG::kPair == 1 ? by_row : arena.take<Word>(deep * tile.ld);
    Word* turned = arena.take<Word>(dx && kInTiles<PG> ? PG::kAtOnce * deep : 0);
    Word* weights = arena.take<Word>(dx ? words<PG>(tile.tile) * wide : 0);
    T* along = arena.take<T>(tile.tile);
    T* bias = arena.take<T>(tile.tile);
    T* dw_tile = arena.take<T>(dw && !direct ? tile.tile * wide : 0);
    T* dx_sum = arena.take<T>(dx ? (padded + PG::kAtOnce) * wide : 0);
    return {Thread{tile, by_row, by_class, turned, weights, along, bias, dw_tile, dx_sum},
            arena.used()};
  }
};

// Where the G of one class after the other is put, and from there into the words of both products.
template <class PG, class T, class Thread>
class GradientWords {
 public:
  explicit GradientWords(Thread& th) : th_(th) {}

  // [rows] of class c, G times what its weights are divided by.
  T* row(int64_t c) {
    if constexpr (PG::kPair == 1) return reinterpret_cast<T*>(th_.by_row) + c * th_.tile.ld;
    return c % 2 ? current_ : pending_;
  }

  // Called once row(c) is full, by increasing c.
  void finish([[maybe_unused]] int64_t c, [[maybe_unused]] int64_t count,
              [[maybe_unused]] int64_t rows) {
#if defined(__AVX512BF16__)
    if constexpr (PG::kPair == 2) {
      const T* g = row(c);
      uint16_t* by_row = reinterpret_cast<uint16_t*>(th_.by_row) + c * th_.tile.ld;
      for (int64_t i = 0; i < rows; i += 32) {
        const Floats low = load(g + i), high = load(g + i + 16);
        const auto pair = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        __builtin_memcpy(by_row + i, &pair, 64);
      }
      const bool last = c + 1 == count;
      if (c % 2 || last) {
        uint32_t* by_class = reinterpret_cast<uint32_t*>(th_.by_class) + c / 2 * th_.tile.ld;
        for (int64_t i = 0; i < rows; i += 16) {
          const Floats partner = c % 2 ? load(current_ + i) : Floats{};
          store(by_class + i, interleave(load(pending_ + i), partner));
        }
      }
    }
#endif
  }

 private:
  static constexpr int64_t kWaiting = PG::kPair == 1 ? 1 : kBlockRows + 64;
  Thread& th_;
  // with pairs, a class's G waits here for its partner's
  alignas(64) T pending_[kWaiting];
  [[maybe_unused]] alignas(64) T current_[kWaiting];
};

// dx[rows of the block] += G^T w
template <class PS, class PG, class T, class Own>
inline void add_dx([[maybe_unused]] const Problem& p, const GradientPlan<PS, PG, T, Own>& plan,
                   typename GradientPlan<PS, PG, T, Own>::Thread& th, const Tile<PS, T>& tile,
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
  const auto of_row = [&](int64_t i, int64_t k) { return th.by_class + k * ld + i; };
  const auto of_panel = [&](int64_t panel, int64_t k) {
    return th.weights + panel * kWide * words<PG>(th.tile.tile) + k * kWide;
  };
  const auto finish = [&](int64_t i, int64_t panel, int v, Vector<T> sum, bool) {
    T* at = th.dx + (row0 + i) * plan.wide + panel * kWide + v * kLanes<T>;
    store(at, load(at) + sum);
  };
  if (multiply_split<PG, true>(th.tile.split, of_row, real_rows, depth, of_panel, plan.wide / kWide,
                               finish)) {
    return;
  }
  const Word* a[PG::kAtOnce];
  const auto add = [&](int64_t i, int64_t q) {
    const Word* panel = th.weights + q * words<PG>(th.tile.tile);
    T* out = th.dx + (row0 + i) * plan.wide + q;
    multiply<PG, kInTiles<PG>>(a, ld, panel, depth, [&](int r, int v, Vector<T> sum) {
      T* at = out + r * plan.wide + v * kLanes<T>;
      store(at, load(at) + sum);
    });
  };
  if constexpr (kInTiles<PG>) {
    for (int64_t i = 0; i < real_rows; i += PG::kAtOnce) {
      const int64_t apart = round_up(depth, 16);
      for (int64_t k = 0; k < depth; k += 16) {
        transpose16(th.by_class + k * ld + i, ld, th.turned + k, apart);
      }
      for (int r = 0; r < PG::kAtOnce; ++r) a[r] = th.turned + r * apart;
      for (int64_t q = 0; q < plan.wide; q += kWide) add(i, q);
    }
  } else {
    for (int64_t q = 0; q < plan.wide; q += kWide) {
      for (int64_t i = 0; i < real_rows; i += kRows) {
        for (int r = 0; r < kRows; ++r) a[r] = th.by_class + i + r;
        add(i, q);
      }
    }
  }
}

// Where dw of a tile's class c stands.
template <class Tile>
inline int64_t gradient_row(const BackwardOut& out, const Tile& tile, int64_t c) {
  return out.compact ? tile.first + c : tile.id(c);
}

// dw = G x - along w: straight to the output when this is the only block, else into the tile's sum.
template <class PS, class PG, class T, class Own>
inline void add_dw(const Problem& p, const BackwardOut& out,
                   const GradientPlan<PS, PG, T, Own>& plan,
                   typename GradientPlan<PS, PG, T, Own>::Thread& th, const Tile<PS, T>& tile,
                   int64_t row0, int64_t real_rows) {
  using Word = typename PG::Word;
  constexpr int64_t kWide = kPanel<PG>;
  const int64_t depth = words<PG>(real_rows), left = th.tile.ld / PG::kPair;
  if constexpr (kPreferBlas) {
    if (uses_blas(p)) {
      return blas(p, false, false, p.d, tile.count, real_rows, plan.x(p) + row0 * p.d, p.d,
                  th.by_row, th.tile.ld, T(row0 ? 1 : 0), th.dw, plan.wide);
    }
  }
  T* dw = static_cast<T*>(out.dw);
  const bool aligned = (reinterpret_cast<uintptr_t>(dw) | p.d * sizeof(T)) % FL_VECTOR_BYTES == 0;
  const auto waits = [&](int64_t c, int64_t e, Vector<T> sum, bool first) {
    T* at = th.dw + c * plan.wide + e;
    store(at, row0 == 0 && first ? sum : load(at) + sum);
  };
  const auto leaves = [&](int64_t c, int64_t e, Vector<T> sum) {
    if (e >= p.d) return;
    const T* w = tile.row(c) + e;
    T* at = dw + gradient_row(out, tile, c) * p.d + e;
    if (e + kLanes<T> <= p.d) {
      const Vector<T> value = sum - load(w) * th.along[c];
      aligned ? stream(at, value) : store(at, value);
    } else {
      for (int64_t i = 0; i < p.d - e; ++i) at[i] = sum[i] - w[i] * th.along[c];
    }
  };
  const auto panel_of = [&](int64_t q) {
    return plan.rows + q * words<PG>(plan.padded) + row0 / PG::kPair * kWide;
  };
  const auto of_class = [&](int64_t c, int64_t k) { return th.by_row + c * left + k; };
  const auto of_panel = [&](int64_t panel, int64_t k) {
    return panel_of(panel * kWide) + k * kWide;
  };
  const auto finish = [&](int64_t c, int64_t panel, int v, Vector<T> sum, bool first) {
    const int64_t e = panel * kWide + v * kLanes<T>;
    plan.direct ? leaves(c, e, sum) : waits(c, e, sum, first);
  };
  static_assert(kSplitDepth >= kBlockRows + 64);  // what leaves is a whole sum
  if (multiply_split<PG>(th.tile.split, of_class, tile.count, depth, of_panel, plan.wide / kWide,
                         finish)) {
    return;
  }
  for (int64_t q = 0; q < plan.wide; q += kWide) {
    const Word* panel = panel_of(q);
    for (int64_t c = 0; c < tile.count; c += PG::kAtOnce) {
      const Word* a[PG::kAtOnce];
      for (int r = 0; r < PG::kAtOnce; ++r) {
        a[r] = th.by_row + std::min(c + r, tile.count - 1) * left;
      }
      const int64_t last = tile.count - c;
      if (plan.direct) {
        multiply<PG, true>(a, 1, panel, depth, [&](int r, int v, Vector<T> sum) {
          if (r < last) leaves(c + r, q + v * kLanes<T>, sum);
        });
      } else {
        multiply<PG, true>(a, 1, panel, depth, [&](int r, int v, Vector<T> sum) {
          if (r < last) waits(c + r, q + v * kLanes<T>, sum, true);
        });
      }
    }
  }
}

// Whether a centre is nothing: its gradient is zero, whatever NaN the rows bring.
template <class PS, class T>
inline bool is_zero(const Problem& p, const TileScratch<PS, T>& s, const Tile<PS, T>& tile,
                    int64_t c) {
  const T* w = tile.row(c);
  return p.normalize && s.inverse[c] == 0 && std::all_of(w, w + p.d, [](T v) { return v == 0; });
}

// The weights of a tile as right operand, and nothing summed yet.
template <class PS, class PG, class T, class Own>
inline void open_tile(const Problem& p, const GradientPlan<PS, PG, T, Own>& plan,
                      typename GradientPlan<PS, PG, T, Own>::Thread& th, const Tile<PS, T>& tile) {
  const TileScratch<PS, T>& s = th.tile;
  if (plan.dx && !uses_blas(p)) {
    pack_rows<PG, T>([&](int64_t c) { return tile.row(c); }, tile.count, p.d,
                     words<PG>(s.tile) * kPanel<PG>, th.weights);
  }
  std::fill_n(th.along, s.tile, T(0));
  std::fill_n(th.bias, s.tile, T(0));
}

// Both products of a block whose G stands in the words; blocks come in order.
template <class PS, class PG, class T, class Own>
inline void multiply_block(const Problem& p, const BackwardOut& out,
                           const GradientPlan<PS, PG, T, Own>& plan,
                           typename GradientPlan<PS, PG, T, Own>::Thread& th,
                           const Tile<PS, T>& tile, int64_t row0, int64_t rows) {
  const TileScratch<PS, T>& s = th.tile;
  const int64_t real_rows = std::min(rows, p.n - row0);
  if (plan.dx) add_dx(p, plan, th, tile, row0, real_rows);
  if (row0 + rows >= plan.padded) {
    // <w_hat, dw_hat> w_hat / |w|, as a factor of w
    for (int64_t c = 0; c < tile.count; ++c) {
      th.along[c] *= p.normalize ? s.inverse[c] * s.inverse[c] : T(0);
    }
  }
  if (plan.dw) add_dw(p, out, plan, th, tile, row0, real_rows);
}

// What is left to write of a tile once its blocks are done.
template <class PS, class PG, class T, class Own>
inline void close_tile(const Problem& p, const BackwardOut& out,
                       const GradientPlan<PS, PG, T, Own>& plan,
                       typename GradientPlan<PS, PG, T, Own>::Thread& th, const Tile<PS, T>& tile) {
  const TileScratch<PS, T>& s = th.tile;
  // 1/|w| is the shift times what stands in G
  for (int64_t c = 0; plan.dw && plan.direct && tile.shifted && c < tile.count; ++c) {
    T* dw = static_cast<T*>(out.dw) + gradient_row(out, tile, c) * p.d;
    for (int64_t e = 0; e < p.d; ++e) dw[e] *= s.shift[c];
  }
  for (int64_t c = 0; plan.dw && plan.direct && c < tile.count; ++c) {
    if (!is_zero(p, s, tile, c)) continue;
    std::fill_n(static_cast<T*>(out.dw) + gradient_row(out, tile, c) * p.d, p.d, T(0));
  }
  for (int64_t c = 0; plan.dw && !plan.direct && c < tile.count; ++c) {
    T* dw = th.dw + c * plan.wide;
    const T* w = tile.row(c);
    for (int64_t e = 0; e < p.d; ++e) dw[e] = (dw[e] - w[e] * th.along[c]) * s.shift[c];
    if (is_zero(p, s, tile, c)) std::fill_n(dw, p.d, T(0));
    write_row(out.dw, p.w.type, gradient_row(out, tile, c) * p.d, p.d, dw);
  }
  for (int64_t c = 0; out.db && c < tile.count; ++c) {
    static_cast<T*>(out.db)[tile.id(c)] = th.bias[c];
  }
}

// fill(th, tile, scores, ld, row0, rows) leaves the tile's G of these rows in the words of both
// products, and in th.along what its weights' norms take.
template <class PS, class PG, class T, class Own, class Fill>
inline void gradient_tile(const Problem& p, const BackwardOut& out,
                          const GradientPlan<PS, PG, T, Own>& plan,
                          typename GradientPlan<PS, PG, T, Own>::Thread& th, int64_t index,
                          Fill&& fill) {
  const TileScratch<PS, T>& s = th.tile;
  const Tile<PS, T> tile(p, s, index);
  open_tile(p, plan, th, tile);
  const int64_t block = round_up(kBlockRows, kPanel<PS>);
  for (int64_t row0 = 0; row0 < plan.padded; row0 += block) {
    const int64_t rows = std::min(block, plan.padded - row0);
    const T* kept = kept_scores<T>(p, tile.first, tile.count);
    const T* scores = kept ? kept + row0 : s.scores;
    const int64_t ld = kept ? round_up(p.n, kKeptPadding) : s.ld;
    if (!kept) tile.multiply_rows(plan.columns, plan.x(p), row0, rows, s.scores, s.ld);
    fill(th, tile, scores, ld, row0, rows);
    multiply_block(p, out, plan, th, tile, row0, rows);
  }
  close_tile(p, out, plan, th, tile);
}

// x as the operands of its products.
template <class PS, class PG, class T, class Own>
inline void pack_operands(const Problem& p, const GradientPlan<PS, PG, T, Own>& plan,
                          const Parallel& parallel) {
  pack_rows_of_x<PS>(p, plan.dense, plan.padded, plan.columns, parallel);
  if (!plan.dw) return;
  on_tasks(parallel, (p.n + kRowsAtOnce - 1) / kRowsAtOnce, [&](int, int64_t task) {
    const int64_t first = task * kRowsAtOnce;
    const T* x = plan.x(p) + first * p.d;
    pack_rows<PG, T>([&](int64_t i) { return x + i * p.d; }, std::min(kRowsAtOnce, p.n - first),
                     p.d, words<PG>(plan.padded) * kPanel<PG>,
                     plan.rows + first / PG::kPair * kPanel<PG>);
  });
}

// A thread's memory, with all that is summed at zero.
template <class PS, class PG, class T, class Own>
inline typename GradientPlan<PS, PG, T, Own>::Thread cleared_thread(
    const Problem& p, const GradientPlan<PS, PG, T, Own>& plan, int index) {
  auto th = plan.thread(p, index).first;
  // but for the tile's rows, which come first and are written before they are read
  char* const zeros = reinterpret_cast<char*>(th.tile.narrow);
  char* const after =
      static_cast<char*>(plan.buffer) + plan.shared_bytes + (index + 1) * plan.thread_bytes;
  clear(zeros, after);
  std::fill_n(th.tile.keep, th.tile.ld, T(1));
  return th;
}

// dx of all threads, in their order.
template <class PS, class PG, class T, class Own>
inline void write_dx(const Problem& p, const BackwardOut& out,
                     const GradientPlan<PS, PG, T, Own>& plan, const Parallel& parallel) {
  if (!plan.dx) return;
  on_tasks(parallel, (p.n + kRowsAtOnce - 1) / kRowsAtOnce, [&](int, int64_t task) {
    const int64_t end = std::min((task + 1) * kRowsAtOnce, p.n);
    for (int64_t i = task * kRowsAtOnce; i < end; ++i) {
      T* first = plan.thread(p, 0).first.dx + i * plan.wide;
      for (int index = 1; index < parallel.threads; ++index) {
        const T* other = plan.thread(p, index).first.dx + i * plan.wide;
        for (int64_t e = 0; e < p.d; ++e) first[e] += other[e];
      }
      write_row(out.dx, p.x.type, i * p.d, p.d, first);
    }
  });
}

// All tiles on all threads; `fill` as of gradient_tile.
template <class PS, class PG, class T, class Own, class Fill>
void sweep_gradient(const Problem& p, const BackwardOut& out,
                    const GradientPlan<PS, PG, T, Own>& plan, const Parallel& parallel,
                    Fill&& fill) {
  pack_operands(p, plan, parallel);
  on_tasks(parallel, parallel.threads, [&](int, int64_t run) {
    auto th = cleared_thread(p, plan, run);
    int64_t begin, end;
    tiles_of(run, parallel.threads, plan.tiles, &begin, &end);
    for (int64_t t = begin; t < end; ++t) gradient_tile(p, out, plan, th, t, fill);
  });
  write_dx(p, out, plan, parallel);
}

}  // namespace fused_losses::FL_ISA
