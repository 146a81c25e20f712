// The products that screen: strips of the bank against panels of queries, all pairs or a triangle.
#pragma once

#include "rotation.h"
#include "selector.h"

namespace fused_losses::FL_ISA {

#if defined(__AVX512F__)
inline uint32_t not_less(Floats a, Floats b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_NLT_UQ);
}
#elif defined(__AVX2__)
inline uint32_t not_less(Floats a, Floats b) {
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_NLT_UQ)));
}
#else
inline uint32_t not_less(Floats a, Floats b) {
  uint32_t mask = 0;
  for (int l = 0; l < kLanes<float>; ++l) mask |= uint32_t(!(a[l] < b[l])) << l;
  return mask;
}
#endif

// Row j of the bank as it is multiplied: in place, or in `to`, and in floats.
template <class P>
const typename P::Word* screen_row(const TopkProblem& p, const Screened& screen, int64_t j,
                                   float* buffer, typename P::Word* to, const float*& row) {
  row = screen.in_place() ? screen.place(j) : buffer;
  if (!screen.in_place()) screen.read(j, buffer);
  if constexpr (P::kPair == 2) {
    narrow_row<P>(row, p.d, to);
  } else {
    if (screen.in_place()) return row;
    std::copy(row, row + p.d, to);
  }
  return to;
}

// Queries [first, first + count) into panels, with what their keys need.
template <class P>
void pack_queries(const TopkProblem& p, const TopkPlan<P>& plan, const Screened& screen,
                  int64_t first, int64_t count, const Parallel& parallel) {
  constexpr int64_t kWide = kPanel<P>;
  on_tasks(parallel, ceil_div(plan.queries, kWide), [&](int thread, int64_t task) {
    auto t = plan.thread(p, thread);
    const int64_t real = std::clamp<int64_t>(count - task * kWide, 0, kWide);
    for (int64_t l = 0; l < kWide; ++l) {
      const int64_t q = task * kWide + l;
      plan.floor[q] = kNone<double>;
      plan.count[q] = plan.lock[q] = 0;
      plan.beta[q] = plan.square[q] = plan.size[q] = 0;
      if (l >= real) continue;
      const int64_t i = first + (plan.triangle ? plan.order[q] : q);
      float* out = t.gathered + l * p.d;
      const bool distance = p.affinity == Affinity::kSquaredDistance;
      read_row(p.x, i, p.d, t.scratch);
      const double squared = sum_of<SquaredDifference>(t.scratch, plan.center, p.d);
      double size = std::sqrt(squared);
      if (p.codes.signs) rotate(p.codes.signs, p.codes.rounds, p.d, t.scratch);
      if (p.affinity == Affinity::kCosine) {
        // a direction: no length of a query is beyond float
        const double inverse = size <= kZeroNorm ? 0 : 1 / size;
        for (int64_t e = 0; e < p.d; ++e) out[e] = static_cast<float>(t.scratch[e] * inverse);
        size *= inverse;
      } else if (p.codes.signs) {
        for (int64_t e = 0; e < p.d; ++e) out[e] = static_cast<float>(t.scratch[e]);
      } else {
        screen.read(p.x, i, out);
      }
      // beyond it a bound of inf: every column is scored
      const float most = static_cast<float>(size * (1 + 1e-6));
      plan.size[q] = size < ScreenBound::kLimit ? most : std::numeric_limits<float>::infinity();
      plan.square[q] = squared;
      if (distance) plan.beta[q] = p.largest ? squared : -squared;
      if (p.largest == distance) {
        for (int64_t e = 0; e < p.d; ++e) out[e] = -out[e];
      }
    }
    pack_panel<P>(t.gathered, real, p.d, plan.panels + task * kWide * plan.depth);
  });
}

// What rows of the bank add to their products, m and a of their terms, and how much they may err.
struct StripTerms {
  const float *multiplier, *offset;
  const float *slope, *extra;  // null in the triangle: the limits are of the largest

  StripTerms operator+(int64_t r) const {
    return {multiplier + r, offset + r, slope ? slope + r : nullptr, extra ? extra + r : nullptr};
  }
};

// Some rows of the bank against a panel of queries.
template <class P, bool kTriangle>
struct Strip {
  using Word = typename P::Word;
  static constexpr int64_t kWide = kPanel<P>;
  static constexpr int kSides = kTriangle ? 2 : 1;
  using MaskWord = uint64_t;  // lanes that may be candidates, 16 bits a vector
  static_assert(kVectors <= 4 && kLanes<float> <= 16);
  const TopkProblem& p;
  const TopkPlan<P>& plan;
  Selector<P>& s;
  int64_t first, count;  // the block of queries
  const bool directions = p.affinity == Affinity::kCosine;

  // Rows bank, bank + 1, ... by their pointers a and their terms; `real` of them exist.
  [[gnu::always_inline]] void run(const Word* const* a, int64_t bank, int64_t real,
                                  const StripTerms& terms, int64_t lane) {
    const float* limit = s.t.limit + lane;
    [[maybe_unused]] const float* size = plan.size + lane;
    const float *m = terms.multiplier, *o = terms.offset;
    float row_limit[P::kAtOnce];
    for (int r = 0; kTriangle && r < P::kAtOnce; ++r) {
      row_limit[r] = r < real ? s.t.limit[bank + r] : std::numeric_limits<float>::infinity();
    }
    MaskWord words[kSides * P::kAtOnce] = {}, any = 0;
    multiply<P, true>(
        a, 1, plan.panels + lane * plan.depth, plan.depth, [&](int r, int v, Floats sum) {
          const int64_t at = v * kLanes<float>;
          store(s.t.sums + r * kWide + at, sum);
          const Floats score = sum * m[r] + o[r];
          // what a pair may err by is its own row's: the largest of a bank may be far more
          Floats most = score;
          if constexpr (!kTriangle) {
            most = score + (load(size + at) * terms.slope[r] + terms.extra[r]);
          }
          words[r] |= MaskWord(not_less(most, load(limit + at))) << (16 * v);
          if constexpr (kTriangle) {
            // the cosine is the same from either side: a query is a direction already
            const Floats other = directions ? score
                                            : sum * load(plan.multiplier + lane + at) +
                                                  load(plan.offset + lane + at);
            words[P::kAtOnce + r] |= MaskWord(not_less(other, Floats{} + row_limit[r])) << (16 * v);
          }
        });
    for (MaskWord w : words) any |= w;
    if (any) scan(words, bank, real, terms, lane);
  }

  [[gnu::noinline]] void scan(const MaskWord* words, int64_t bank, int64_t real,
                              const StripTerms& terms, int64_t lane) {
    const float *m = terms.multiplier, *o = terms.offset;
    for (int r = 0; r < real; ++r) {
      const float* sums = s.t.sums + r * kWide;
      const int64_t c = bank + r, j = kTriangle ? plan.order[c] : c;
      const int64_t from = kTriangle ? plan.from[c] : 0, to = kTriangle ? plan.to[c] : count;
      for_each(words[r], [&](int64_t at) {
        const int64_t q = lane + at;
        if (q < from || q >= to) return;
        const float error = kTriangle ? 0 : plan.size[q] * terms.slope[r] + terms.extra[r];
        s.offer(q, first + (kTriangle ? plan.order[q] : q), j, sums[at] * m[r] + o[r], error);
      });
      if constexpr (kTriangle) {
        for_each(words[P::kAtOnce + r], [&](int64_t at) {
          const int64_t q = lane + at;
          if (q < from || q >= to) return;
          const float other =
              directions ? sums[at] * m[r] + o[r] : sums[at] * plan.multiplier[q] + plan.offset[q];
          s.offer(c, j, plan.order[q], other, 0);
        });
      }
    }
  }

  template <class F>
  static void for_each(MaskWord word, F&& body) {
    for (; word; word &= word - 1) {
      const int bit = __builtin_ctzll(word);
      body(bit / 16 * kLanes<float> + bit % 16);
    }
  }
};

template <class P>
void topk_rectangle(const TopkProblem& p, const TopkPlan<P>& plan, const Screened& screen,
                    int64_t first, int64_t count, std::vector<Selector<P>>& selectors,
                    const Parallel& parallel) {
  using Word = typename P::Word;
  constexpr int64_t kWide = kPanel<P>;
  on_tasks(parallel, ceil_div(p.m, plan.tile), [&](int thread, int64_t task) {
    Selector<P>& s = selectors[thread];
    const int64_t j0 = task * plan.tile, rows = std::min(plan.tile, p.m - j0);
    const Word* at[384 + P::kAtOnce];
    for (int64_t r = 0; r < rows; ++r) {
      const float* row;
      at[r] = screen_row<P>(p, screen, j0 + r, s.t.row, s.t.rows + r * plan.depth, row);
      const RowTerms terms = screen.terms(j0 + r, row);
      s.t.multiplier[r] = terms.m;
      s.t.offset[r] = terms.a;
      s.t.slope[r] = terms.slope;
      s.t.extra[r] = terms.extra;
    }
    for (int64_t r = rows; r < rows + P::kAtOnce; ++r) {
      at[r] = at[rows - 1];
      s.t.multiplier[r] = s.t.slope[r] = s.t.extra[r] = 0;
      s.t.offset[r] = kNone<float>;
    }
    for (int64_t q = 0; q < count; ++q) s.limit(q);
    Strip<P, false> strip = {p, plan, s, first, count};
    const StripTerms terms = {s.t.multiplier, s.t.offset, s.t.slope, s.t.extra};
    for (int64_t lane = 0; lane < count; lane += kWide) {
      for (int64_t r = 0; r < rows; r += P::kAtOnce) {
        strip.run(at + r, j0 + r, std::min<int64_t>(P::kAtOnce, rows - r), terms + r, lane);
      }
    }
  });
}

template <class P>
void topk_triangle(const TopkProblem& p, const TopkPlan<P>& plan, const Screened& screen,
                   std::vector<Selector<P>>& selectors, const Parallel& parallel) {
  using Word = typename P::Word;
  constexpr int64_t kWide = kPanel<P>;
  const bool in_place = P::kPair == 1 && screen.in_place();
  constexpr int64_t kRowsAtOnce = 256;
  std::vector<RowTerms> most(ceil_div(p.n, kRowsAtOnce), RowTerms{0, 0, 0, 0});
  on_tasks(parallel, ceil_div(p.n, kRowsAtOnce), [&](int thread, int64_t task) {
    auto t = plan.thread(p, thread);
    for (int64_t c = task * kRowsAtOnce; c < std::min((task + 1) * kRowsAtOnce, p.n); ++c) {
      const float* row;
      screen_row<P>(p, screen, plan.order[c], t.row, plan.left + c * plan.depth, row);
      const RowTerms terms = screen.terms(plan.order[c], row);
      plan.multiplier[c] = terms.m;
      plan.offset[c] = terms.a;
      RowTerms& m = most[task];
      m.slope = std::max(m.slope, terms.slope);
      m.extra = std::max(m.extra, terms.extra);
    }
  });
  std::fill(plan.multiplier + p.n, plan.multiplier + plan.queries, 0.0f);
  std::fill(plan.offset + p.n, plan.offset + plan.queries, 0.0f);
  const auto in_order = [&](int64_t c) -> const Word* {
    if constexpr (P::kPair == 1) return screen.place(plan.order[c]);
    return nullptr;
  };
  const int64_t tile = std::min<int64_t>(plan.tile, 192);
  const int64_t runs = ceil_div(p.n, kTopkColumns);
  std::vector<uint8_t> ready(selectors.size(), 0);
  on_tasks(parallel, ceil_div(p.n, tile) * runs, [&](int thread, int64_t task) {
    const int64_t c0 = task / runs * tile, c1 = std::min(c0 + tile, p.n);
    const int64_t q0 = task % runs * kTopkColumns, q1 = std::min(q0 + kTopkColumns, p.n);
    if (plan.from[c0] >= q1 || plan.to[c1 - 1] <= q0) return;
    Selector<P>& s = selectors[thread];
    if (!ready[thread]) {
      for (const RowTerms& m : most) s.grow(m);
      for (int64_t q = 0; q < plan.queries; ++q) {
        s.t.limit[q] = q < p.n ? kNone<float> : std::numeric_limits<float>::infinity();
      }
      ready[thread] = 1;
    }
    for (int64_t q = c0; q < c1; ++q) s.limit(q);
    for (int64_t q = q0; q < q1; ++q) s.limit(q);
    const Word* a[192 + P::kAtOnce];
    float m[192 + P::kAtOnce], o[192 + P::kAtOnce];
    for (int64_t r = 0; r < c1 - c0 + P::kAtOnce; ++r) {
      const bool real = c0 + r < c1;
      const int64_t c = real ? c0 + r : c1 - 1;
      a[r] = in_place ? in_order(c) : plan.left + c * plan.depth;
      m[r] = real ? plan.multiplier[c] : 0;
      o[r] = real ? plan.offset[c] : kNone<float>;
    }
    Strip<P, true> strip = {p, plan, s, 0, p.n};
    const StripTerms terms = {m, o, nullptr, nullptr};
    for (int64_t lane = q0; lane < q1; lane += kWide) {
      const int64_t end = std::min(lane + kWide, q1);
      for (int64_t c = c0; c < c1; c += P::kAtOnce) {
        const int64_t real = std::min<int64_t>(P::kAtOnce, c1 - c), r = c - c0;
        if (plan.from[c] >= end || plan.to[c + real - 1] <= lane) continue;
        strip.run(a + r, c, real, terms + r, lane);
      }
    }
  });
}

// For tests: every score of the screen, and its bound.
template <class P>
void topk_scores(const TopkProblem& p, float* scores, float* bounds, double* center, void* buffer,
                 const Parallel& parallel) {
  constexpr int64_t kWide = kPanel<P>;
  const TopkPlan<P> plan(p, buffer);
#if defined(__AMX_BF16__)
  const TileRegisters registers;
#endif
  std::vector<double> row(p.d);
  const Screened screen(p, choose_center(p, plan.center, row.data()), P::kPair == 2);
  std::copy(plan.center, plan.center + p.d, center);
  for (int64_t first = 0; first < p.n; first += plan.queries) {
    const int64_t count = std::min(plan.queries, p.n - first);
    pack_queries<P>(p, plan, screen, first, count, parallel);
    auto t = plan.thread(p, 0);
    for (int64_t j = 0; j < p.m; ++j) {
      const float* floats;
      const auto* words = screen_row<P>(p, screen, j, t.row, t.rows, floats);
      const typename P::Word* at[P::kAtOnce];
      std::fill_n(at, P::kAtOnce, words);
      const RowTerms terms = screen.terms(j, floats);
      for (int64_t lane = 0; lane < count; lane += kWide) {
        multiply<P, true>(at, 1, plan.panels + lane * plan.depth, plan.depth,
                          [&](int r, int v, Floats sum) {
                            if (r > 0) return;
                            store(t.sums + v * kLanes<float>, sum * terms.m + terms.a);
                          });
        for (int64_t q = lane; q < std::min(lane + kWide, count); ++q) {
          const int64_t pair = (first + q) * p.m + j;
          scores[pair] = t.sums[q - lane];
          bounds[pair] = plan.size[q] * terms.slope + terms.extra;
        }
      }
    }
  }
}

}  // namespace fused_losses::FL_ISA
