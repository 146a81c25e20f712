// The matrix of distances: panels of y in the lanes, rows of x go by, sums in registers.
//
// A task is a panel and a block of rows; it packs its panel itself, so tasks share nothing. Long
// rows go by in chunks whose sums are added up outside, which is also what keeps float sums exact.
#pragma once

#include "../../distances.h"
#include "metrics.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kDistanceChunk = 512;    // coordinates a sum runs over before it is put aside
constexpr int64_t kChunkRows = 96;         // whose sums wait when there are several chunks
constexpr int64_t kStreamBytes = 8 << 20;  // of an output that goes past the caches

// row[j ...] = the distances of a panel's columns, those that exist.
template <class T>
[[gnu::always_inline]] inline void put_distances(T* row, int64_t j, int64_t m, const Vector<T>* v,
                                                 bool past_caches) {
  constexpr int64_t kStep = kLanes<T>;
  T* to = row + j;
  if (j + kVectors * kStep > m) {
    for (int64_t e = 0; e < kVectors && j + e * kStep < m; ++e) {
      store_part(to + e * kStep, v[e], m - j - e * kStep);
    }
  } else if (past_caches && reinterpret_cast<uintptr_t>(to) % FL_VECTOR_BYTES == 0) {
#pragma GCC unroll 4
    for (int e = 0; e < kVectors; ++e) stream(to + e * kStep, v[e]);
  } else {
#pragma GCC unroll 4
    for (int e = 0; e < kVectors; ++e) store(to + e * kStep, v[e]);
  }
}

template <class T>
inline bool past_caches(const DistanceProblem& p) {
  return p.n * p.m * static_cast<int64_t>(sizeof(T)) >= kStreamBytes;
}

// Panels of kWide columns by blocks of rows: pack(thread, j), then for each group of kAtOnce rows
// add(thread, i, k, run, carry, fresh) a chunk of `depth` at a time, and finish(thread, i, carry).
template <class T, int64_t kWide, int kAtOnce, int kSums, class Pack, class Add, class Finish>
void sweep_distances(int64_t n, int64_t m, int64_t depth, int64_t chunk, const Parallel& parallel,
                     Pack&& pack, Add&& add, Finish&& finish) {
  const int64_t panels = ceil_div(m, kWide);
  // enough tasks for the threads; a distance does not depend on the task it is in
  const int64_t wanted = std::clamp<int64_t>(ceil_div(8 * parallel.threads, panels), 1,
                                             std::max<int64_t>(1, n / kChunkRows));
  const int64_t rows = even_blocks(n, ceil_div(n, wanted), kAtOnce), blocks = ceil_div(n, rows);
  const int64_t step = depth <= chunk ? kAtOnce : kChunkRows;
  static_assert(kChunkRows % kAtOnce == 0);
  on_tasks(parallel, panels * blocks, [&](int thread, int64_t task) {
    alignas(64) T carry[kChunkRows * kSums * kWide];
    constexpr int64_t kGroup = kAtOnce * kSums * kWide;
    const int64_t j = task / blocks * kWide, first = task % blocks * rows;
    const int64_t last = std::min(first + rows, n);
    pack(thread, j);
    for (int64_t i = first; i < last; i += step) {
      const int64_t end = std::min(i + step, last);
      for (int64_t k = 0; k == 0 || k < depth; k += chunk) {
        for (int64_t r = i; r < end; r += kAtOnce) {
          add(thread, r, k, std::min(chunk, depth - k), carry + (r - i) / kAtOnce * kGroup, k == 0);
        }
      }
      for (int64_t r = i; r < end; r += kAtOnce) {
        finish(thread, r, std::min<int64_t>(kAtOnce, last - r), j,
               carry + (r - i) / kAtOnce * kGroup);
      }
    }
  });
}

// carry (+)= the sums of kAtOnce rows with a panel over coordinates [k, k + run).
template <class M, class T>
[[gnu::always_inline]] inline void add_coordinates(const M& metric, const T* const* rows,
                                                   const T* panel, const T* second,
                                                   const T* weights, int64_t k, int64_t run,
                                                   T* carry, bool fresh) {
  constexpr int kAtOnce = M::kAtOnce, kSums = M::kSums;
  constexpr int64_t kStep = kLanes<T>, kWide = kVectors * kStep;
  Vector<T> sums[kAtOnce][kVectors][kSums] = {};
  const T* x[kAtOnce];
#pragma GCC unroll 6
  for (int r = 0; r < kAtOnce; ++r) x[r] = rows[r] + k;
  const T* y = panel + k * kWide;
  const T* w = second + k * kWide;
  for (int64_t e = 0; e < run; ++e, y += kWide, w += kWide) {
    Vector<T> columns[kVectors], scales[kVectors] = {};
    const T weight = M::kWeights ? weights[k + e] : T(1);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      columns[v] = load(y + v * kStep);
      if constexpr (M::kPanels == 2) scales[v] = load(w + v * kStep);
    }
#pragma GCC unroll 6
    for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        metric.add(sums[r][v], x[r][e], columns[v], scales[v], weight);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kAtOnce; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 2
      for (int s = 0; s < kSums; ++s) {
        T* to = carry + ((r * kVectors + v) * kSums + s) * kStep;
        store(to, fresh ? sums[r][v][s] : load(to) + sums[r][v][s]);
      }
    }
  }
}

// As above for chebyshev, whose chunks are joined by their larger.
template <class T>
[[gnu::always_inline]] inline void add_coordinates(const Chebyshev<T>& metric, const T* const* rows,
                                                   const T* panel, int64_t k, int64_t run, T* carry,
                                                   bool fresh) {
  using Bits = Vector<Code<T>>;
  constexpr int64_t kStep = kLanes<T>;
  alignas(64) T part[kRows * kVectors * kStep];
  add_coordinates(metric, rows, panel, panel, panel, k, run, part, true);
  for (int64_t e = 0; e < kRows * kVectors * kStep; e += kStep) {
    const Bits a = (Bits)load(part + e), b = (Bits)load(carry + e);
    store(carry + e, (Vector<T>)(fresh || a > b ? a : b));
  }
}

// ---- sums over coordinates ----------------------------------------------------------------------

template <class M, class T>
struct SumsPlan {
  int64_t panel_size;  // elements of a thread's panels
  T *row_flags, *column_flags;
  size_t shared_bytes, thread_bytes;
  char* buffer;

  SumsPlan(const DistanceProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    constexpr int64_t kWide = kPanel<Plain<T>>;
    panel_size = std::max<int64_t>(p.d, 1) * kWide;
    Arena arena(base);
    row_flags = arena.take<T>(M::kFlags ? p.n : 0);
    column_flags = arena.take<T>(M::kFlags ? round_up(p.m, kWide) : 0);
    shared_bytes = arena.used();
    Arena one(nullptr);
    one.take<T>(M::kPanels * panel_size);
    thread_bytes = one.used();
  }

  T* panel(int thread) const {
    return reinterpret_cast<T*>(buffer + shared_bytes + thread * thread_bytes);
  }
};

// flags[i] = NaN where a row has one (or with `non_negative` an entry below 0), else 0.
template <class T>
inline void flag_rows(const T* x, int64_t n, int64_t d, bool non_negative, T* flags,
                      const Parallel& parallel) {
  on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
    for (int64_t i = task * 64; i < std::min(n, task * 64 + 64); ++i) {
      const T lowest = non_negative ? T(0) : -std::numeric_limits<T>::infinity();
      int bad = 0;
      for (int64_t k = 0; k < d; ++k) bad |= !(x[i * d + k] >= lowest);
      flags[i] = bad ? std::numeric_limits<T>::quiet_NaN() : T(0);
    }
  });
}

template <class M, class T>
void sums_forward(M metric, const DistanceProblem& p, T* out, void* buffer,
                  const Parallel& parallel) {
  using P = Plain<T>;
  constexpr int64_t kWide = kPanel<P>, kStep = kLanes<T>;
  constexpr int kAtOnce = M::kAtOnce, kSums = M::kSums;
  const SumsPlan<M, T> plan(p, buffer);
  const int64_t d = p.d;
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  const T* w = static_cast<const T*>(p.w);
  const bool streamed = past_caches<T>(p);
  metric.problem = &p;
  metric.row_flags = plan.row_flags;
  metric.column_flags = plan.column_flags;
  if (M::kFlags) {
    std::fill(plan.column_flags, plan.column_flags + round_up(p.m, kWide), T(0));
    flag_rows(x, p.n, d, M::kNonNegative, plan.row_flags, parallel);
    flag_rows(y, p.m, d, M::kNonNegative, plan.column_flags, parallel);
  }
  const auto pack = [&](int thread, int64_t j) {
    pack_panel<P>(y + j * d, p.m - j, d, plan.panel(thread));
    if constexpr (M::kPanels == 2) {
      pack_panel<P>(w + j * d, p.m - j, d, plan.panel(thread) + plan.panel_size);
    }
  };
  const auto add = [&](int thread, int64_t i, int64_t k, int64_t run, T* carry, bool fresh) {
    const T* rows[kAtOnce];
    for (int r = 0; r < kAtOnce; ++r) rows[r] = x + std::min(i + r, p.n - 1) * d;
    const T* panel = plan.panel(thread);
    if constexpr (std::is_same_v<M, Chebyshev<T>>) {
      add_coordinates(metric, rows, panel, k, run, carry, fresh);
    } else {
      const T* second = M::kPanels == 2 ? panel + plan.panel_size : panel;
      add_coordinates(metric, rows, panel, second, w, k, run, carry, fresh);
    }
  };
  const auto finish = [&](int, int64_t i, int64_t count, int64_t j, const T* carry) {
    for (int64_t r = 0; r < count; ++r) {
      Vector<T> values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> sums[kSums];
        for (int s = 0; s < kSums; ++s) {
          sums[s] = load(carry + ((r * kVectors + v) * kSums + s) * kStep);
        }
        values[v] = metric.finish(sums, i + r, j + v * kStep);
      }
      put_distances(out + (i + r) * p.m, j, p.m, values, streamed);
    }
  };
  sweep_distances<T, kWide, kAtOnce, kSums>(p.n, p.m, d, kDistanceChunk, parallel, pack, add,
                                            finish);
}

// ---- products -----------------------------------------------------------------------------------

using distance_rules::kNear;

// <x, x> of each row, summed by chunks; of the words that products see.
template <class P, class T>
inline T squared_norm(const typename P::Word* row, int64_t depth) {
  T total = 0;
  for (int64_t k0 = 0; k0 < depth; k0 += kDistanceChunk) {
    const int64_t end = std::min(depth, k0 + kDistanceChunk);
    Vector<T> sums[2] = {};
    int64_t k = k0;
    T rest = 0;
    if constexpr (P::kPair == 1) {
      for (; k + 2 * kLanes<T> <= end; k += 2 * kLanes<T>) {
        const Vector<T> a = load(row + k), b = load(row + k + kLanes<T>);
        sums[0] += a * a;
        sums[1] += b * b;
      }
      for (; k < end; ++k) rest += row[k] * row[k];
    } else {
      for (; k < end; ++k) {
        const T a = from_bf16(static_cast<uint16_t>(row[k])), b = from_bf16(row[k] >> 16);
        rest += a * a + b * b;
      }
    }
    total += sum<T>(sums[0] + sums[1]) + rest;
  }
  return total;
}

template <class P, class T>
struct ProductsPlan {
  using Word = typename P::Word;
  int64_t depth, panel_size;
  Word* left;                   // x in words, unless words are elements
  T *row_norms, *column_norms;  // squared
  size_t shared_bytes, thread_bytes;
  char* buffer;

  struct Thread {
    Word* panel;
    T* plain;  // the panel in elements, unless words are elements: for near pairs
  };

  ProductsPlan(const DistanceProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    constexpr int64_t kWide = kPanel<P>;
    depth = words<P>(p.d);
    panel_size = std::max<int64_t>(p.d, 1) * kWide;
    const bool norms = p.kind != Distance::kDot;
    Arena arena(base);
    left = arena.take<Word>(P::kPair == 2 ? p.n * depth : 0);
    row_norms = arena.take<T>(norms ? p.n : 0);
    column_norms = arena.take<T>(norms ? round_up(p.m, kWide) : 0);
    shared_bytes = arena.used();
    Arena one(nullptr);
    take(one);
    thread_bytes = one.used();
  }

  Thread thread(int index) const {
    Arena arena(buffer + shared_bytes + index * thread_bytes);
    return take(arena);
  }

 private:
  Thread take(Arena& arena) const {
    Word* panel = arena.take<Word>(std::max<int64_t>(depth, 1) * kPanel<P>);
    return {panel, arena.take<T>(P::kPair == 2 ? panel_size : 0)};
  }
};

// |x|^2 + |y|^2 - 2 <x, y> of a vector of columns; adds up which are too near for it.
template <class T>
[[gnu::always_inline]] inline Vector<T> from_product(Vector<T> size, Vector<T> product,
                                                     Lanes* near) {
  const Vector<T> apart = distance_rules::from_product<DistanceMath<T>>(size, product);
  *near |= below(apart, size * kNear<T>);
  return apart;
}

// carry [kRows][kPanel] from products to squared distances, of near pairs as sum (x - y)^2.
template <class T>
[[gnu::noinline]] void mend_near(const T* const* rows, const T* row_norms, const T* panel,
                                 const T* column_norms, int64_t d, int64_t count, T* carry) {
  constexpr int64_t kStep = kLanes<T>;
  alignas(64) T exact[kRows * kVectors * kStep];
  for (int64_t k = 0; k == 0 || k < d; k += kDistanceChunk) {
    add_coordinates(Squares<T>{}, rows, panel, panel, panel, k, std::min(kDistanceChunk, d - k),
                    exact, k == 0);
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = (r * kVectors + v) * kStep;
      Lanes near = 0;
      const Vector<T> size = load(column_norms + v * kStep) + row_norms[r];
      store(carry + at, from_product<T>(size, load(carry + at), &near));
      for (; near; near &= near - 1) {
        const int lane = __builtin_ctz(near);
        carry[at + lane] = exact[at + lane];
      }
    }
  }
}

template <class P, class T>
void products_forward(const DistanceProblem& p, T* out, void* buffer, const Parallel& parallel) {
  using Word = typename P::Word;
  constexpr int64_t kWide = kPanel<P>, kStep = kLanes<T>;
  const ProductsPlan<P, T> plan(p, buffer);
  const int64_t d = p.d, depth = plan.depth;
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  const bool streamed = past_caches<T>(p), dot = p.kind == Distance::kDot;
  const bool rooted = p.kind == Distance::kEuclidean;
  const Word* left = plan.left;
  if constexpr (P::kPair == 1) left = x;
  on_tasks(parallel, ceil_div(p.n, 64), [&](int, int64_t task) {
    const int64_t first = task * 64, last = std::min(first + 64, p.n);
    if constexpr (P::kPair == 2) {
      narrow_rows<P>(x + first * d, last - first, d, plan.left + first * depth);
    }
    for (int64_t i = first; i < last && !dot; ++i) {
      plan.row_norms[i] = squared_norm<P, T>(left + i * depth, depth);
    }
  });
  if (!dot) std::fill(plan.column_norms, plan.column_norms + round_up(p.m, kWide), T(0));
  on_tasks(parallel, dot ? 0 : ceil_div(p.m, 64), [&](int thread, int64_t task) {
    for (int64_t j = task * 64; j < std::min(task * 64 + 64, p.m); ++j) {
      if constexpr (P::kPair == 2) {
        Word* row = plan.thread(thread).panel;
        narrow_row<P>(y + j * d, d, row);
        plan.column_norms[j] = squared_norm<P, T>(row, depth);
      } else {
        plan.column_norms[j] = squared_norm<P, T>(y + j * d, d);
      }
    }
  });
  const auto pack = [&](int thread, int64_t j) {
    const auto own = plan.thread(thread);
    pack_panel<P>(y + j * d, p.m - j, d, own.panel);
    if constexpr (P::kPair == 2) own.plain[0] = std::numeric_limits<T>::quiet_NaN();
  };
  const auto add = [&](int thread, int64_t i, int64_t k, int64_t run, T* carry, bool fresh) {
    const Word* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = left + std::min(i + r, p.n - 1) * depth + k;
    const Word* panel = plan.thread(thread).panel + k * kWide;
    multiply<P, true>(rows, 1, panel, run, [&](int r, int v, Vector<T> sum) {
      T* to = carry + (r * kVectors + v) * kStep;
      store(to, fresh ? sum : load(to) + sum);
    });
  };
  const auto finish = [&](int thread, int64_t i, int64_t count, int64_t j, T* carry) {
    Lanes near = 0;
    const auto put = [&](int64_t r, auto&& distance) {
      Vector<T> values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        values[v] = distance(v, load(carry + (r * kVectors + v) * kStep));
      }
      put_distances(out + (i + r) * p.m, j, p.m, values, streamed);
    };
    if (dot) {
      for (int64_t r = 0; r < count; ++r) put(r, [](int, Vector<T> product) { return product; });
      return;
    }
    for (int64_t r = 0; r < count; ++r) {
      const T a = plan.row_norms[i + r];
      put(r, [&](int v, Vector<T> product) {
        const Vector<T> size = load(plan.column_norms + j + v * kStep) + a;
        const Vector<T> apart = from_product<T>(size, product, &near);
        return rooted ? root(apart) : apart;
      });
    }
    if (!near) [[likely]]
      return;
    const T* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = x + std::min(i + r, p.n - 1) * d;
    const T* panel;
    if constexpr (P::kPair == 2) {
      // packed when the panel first has a near pair
      panel = plan.thread(thread).plain;
      if (*panel != *panel) {
        pack_panel<Plain<T>>(y + j * d, p.m - j, d, plan.thread(thread).plain);
      }
    } else {
      panel = plan.thread(thread).panel;
    }
    mend_near(rows, plan.row_norms + i, panel, plan.column_norms + j, d, count, carry);
    for (int64_t r = 0; r < count; ++r) {
      put(r, [&](int, Vector<T> apart) { return rooted ? root(apart) : apart; });
    }
  };
  sweep_distances<T, kWide, kRows, 1>(p.n, p.m, depth, kDistanceChunk / P::kPair, parallel, pack,
                                      add, finish);
}

// ---- bits ---------------------------------------------------------------------------------------

inline int64_t bit_words(int64_t d) { return ceil_div(d, 64); }

inline size_t bits_bytes(const DistanceProblem& p) {
  Arena arena(nullptr);
  arena.take<uint64_t>((p.n + p.m) * bit_words(p.d));
  return arena.used();
}

// hamming and jaccard of booleans: 64 coordinates a step.
inline void bits_forward(const DistanceProblem& p, float* out, void* buffer,
                         const Parallel& parallel) {
  const int64_t wide = bit_words(p.d);
  uint64_t* packed = static_cast<uint64_t*>(buffer);
  const bool jaccard = p.kind == Distance::kJaccard;
  on_tasks(parallel, ceil_div(p.n + p.m, 64), [&](int, int64_t task) {
    for (int64_t i = task * 64; i < std::min(task * 64 + 64, p.n + p.m); ++i) {
      const uint8_t* row = i < p.n ? static_cast<const uint8_t*>(p.x) + i * p.d
                                   : static_cast<const uint8_t*>(p.y) + (i - p.n) * p.d;
      for (int64_t k = 0; k < wide; ++k) {
        uint64_t word = 0;
        for (int64_t e = k * 64; e < std::min(k * 64 + 64, p.d); ++e) {
          word |= static_cast<uint64_t>(row[e] != 0) << (e - k * 64);
        }
        packed[i * wide + k] = word;
      }
    }
  });
  constexpr int64_t kTall = 16, kColumns = 512;
  const int64_t blocks = ceil_div(p.m, kColumns);
  on_tasks(parallel, ceil_div(p.n, kTall) * blocks, [&](int, int64_t task) {
    const int64_t j0 = task % blocks * kColumns, count = std::min(kColumns, p.m - j0);
    const uint64_t* y = packed + (p.n + j0) * wide;
    int32_t differ[kColumns], either[kColumns];
    for (int64_t i = task / blocks * kTall; i < std::min((task / blocks + 1) * kTall, p.n); ++i) {
      const uint64_t* x = packed + i * wide;
      for (int64_t j = 0; j < count; ++j) {
        int64_t apart = 0, set = 0;
        for (int64_t k = 0; k < wide; ++k) {
          apart += __builtin_popcountll(x[k] ^ y[j * wide + k]);
          if (jaccard) set += __builtin_popcountll(x[k] | y[j * wide + k]);
        }
        differ[j] = static_cast<int32_t>(apart);
        either[j] = static_cast<int32_t>(set);
      }
      float* row = out + i * p.m + j0;
      const float total = static_cast<float>(p.d);
      for (int64_t j = 0; j < count; ++j) {
        const float of = jaccard ? static_cast<float>(std::max(either[j], 1)) : total;
        row[j] = static_cast<float>(differ[j]) / of;
      }
    }
  });
}

}  // namespace fused_losses::FL_ISA
