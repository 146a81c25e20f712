// The screen by coordinates: the first of all pairs, the next of those that a bound leaves open.
//
// With p the product of the coordinates up to a level, <x, y> is within |x's tail| |y's tail| of
// it.
#pragma once

#include "screen.h"

namespace fused_losses::FL_ISA {

// Rows of the bank in terms of coordinates: an upper bound of a pair's score is
// p m + above + |x| slope + (x's tail) (y's tail) m.
struct HeadTerms {
  float m, above, slope;
};

class HeadRows {
 public:
  explicit HeadRows(const TopkProblem& p) : p_(p), bound_(p.heads, p.d) {}

  HeadTerms terms(int64_t j) const {
    constexpr HeadTerms kOpenRow = {0, std::numeric_limits<float>::infinity(), 0};
    const double d = p_.d, length = p_.heads.tails[j];
    // rounded itself, or below the normal numbers
    const double most = length * (1 + 2 * ScreenBound::kUnit) + ScreenBound::kTiny;
    if (!(most < ScreenBound::kLimit)) return kOpenRow;
    double m = 1, a = 0, slope = bound_.product * most, extra = 0;
    if (p_.affinity == Affinity::kSquaredDistance) {
      a = (p_.largest ? 0.5 : -0.5) * length * length;
      extra = bound_.offset * 0.5 * most * most;
    } else if (p_.affinity == Affinity::kCosine) {
      if (length == 0) return {0, 0, 0};
      if (!(length >= kNarrowNorm)) return kOpenRow;
      m = 1 / length;
      slope = bound_.product * (1 + 4 * ScreenBound::kUnit);
    }
    // what underflows: factors, products, sums, a tail's product, the score
    const double wide = std::max(m, 1.0);
    slope += wide * std::sqrt(d) * ScreenBound::kTiny;
    extra += (wide * (2 * p_.heads.coordinates() + 2) + std::sqrt(d) * std::max(most, 1.0) + 8) *
             ScreenBound::kTiny;
    // two roundings of a and its sum with extra are the offset's
    return {static_cast<float>(m), static_cast<float>(a + extra * (1 + 1e-6)),
            static_cast<float>(slope * (1 + 1e-6))};
  }

  // What row j has beyond a level, as it enters its scores.
  float tail(int64_t level, int64_t j, float m) const {
    return p_.heads.tails[(level + 1) * p_.m + j] * m * (1 + 1e-6f);
  }

 private:
  const TopkProblem& p_;
  HeadBound bound_;
};

// Queries [first, first + count) in coordinates: the first in panels, the others a row at a time.
template <class P>
void pack_heads(const TopkProblem& p, const TopkPlan<P>& plan, int64_t first, int64_t count,
                const Parallel& parallel) {
  constexpr int64_t kWide = kPanel<P>;
  const Heads& h = p.heads;
  const double bound = HeadBound(h, p.d).tail;
  const int64_t behind = h.levels * Heads::kStep;
  on_tasks(parallel, ceil_div(plan.queries, kWide), [&](int thread, int64_t task) {
    auto t = plan.thread(p, thread);
    const int64_t real = std::clamp<int64_t>(count - task * kWide, 0, kWide);
    for (int64_t l = 0; l < kWide; ++l) {
      const int64_t q = task * kWide + l;
      plan.floor[q] = kNone<double>;
      plan.count[q] = plan.lock[q] = 0;
      plan.beta[q] = plan.square[q] = plan.size[q] = 0;
      float* rest = plan.rest + q * behind;
      if (l >= real) {
        std::fill(rest, rest + behind, 0.0f);
        for (int64_t level = 0; level <= h.levels; ++level)
          plan.tails[level * plan.queries + q] = 0;
        continue;
      }
      const int64_t i = first + q;
      const bool distance = p.affinity == Affinity::kSquaredDistance;
      read_row(p.x, i, p.d, t.scratch);
      const double squared = sum_of<Product>(t.scratch, t.scratch, p.d);
      double size = std::sqrt(squared), by = 1;
      if (p.affinity == Affinity::kCosine) {
        by = size <= kZeroNorm ? 0 : 1 / size;
        size *= by;
      }
      // beyond it a bound of inf: every column is scored
      const float most = static_cast<float>(size * (1 + 1e-6));
      plan.size[q] = size < ScreenBound::kLimit ? most : std::numeric_limits<float>::infinity();
      plan.square[q] = squared;
      if (distance) plan.beta[q] = p.largest ? squared : -squared;
      const double sign = p.largest == distance ? -by : by;
      const double* at = h.queries + i * h.kept;
      double left = size * size;
      const double room = left * bound;
      for (int64_t e = 0; e < h.coordinates(); ++e) {
        const double v = e < h.kept ? sign * at[e] : 0;
        (e < h.width ? t.gathered + l * h.width : rest - h.width)[e] = static_cast<float>(v);
        left -= v * v;
        if (e + 1 < h.width || (e + 1 - h.width) % Heads::kStep) continue;
        const int64_t level = (e + 1 - h.width) / Heads::kStep;
        // NaN stays: nothing is ruled out by it
        const double tail = std::sqrt(left < 0 ? room : left + room) * (1 + 1e-6);
        plan.tails[level * plan.queries + q] = static_cast<float>(tail + ScreenBound::kTiny);
      }
    }
    pack_panel<P>(t.gathered, real, h.width, plan.panels + task * kWide * plan.depth);
  });
}

// The sum of a vector by halves: few operations wait for one another.
template <int kBytes = FL_VECTOR_BYTES, class V>
inline float folded(V v) {
  if constexpr (kBytes == 2 * sizeof(float)) {
    return v[0] + v[1];
  } else {
    typedef float Half __attribute__((vector_size(kBytes / 2)));
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return folded<kBytes / 2>(low + high);
  }
}

// Of the coordinates of one level behind the first.
template <class P>
inline float level_product(const TopkProblem& p, const TopkPlan<P>& plan, int64_t level, int64_t q,
                           int64_t j) {
  const int64_t behind = (level - 1) * Heads::kStep, stride = p.heads.levels * Heads::kStep;
  const float *x = plan.rest + q * stride + behind, *y = p.heads.rest + j * stride + behind;
  Floats sums[2] = {};
  for (int64_t e = 0; e < Heads::kStep; e += 2 * kLanes<float>) {
    sums[0] += load(x + e) * load(y + e);
    sums[1] += load(x + e + kLanes<float>) * load(y + e + kLanes<float>);
  }
  return folded(sums[0] + sums[1]);
}

template <class P>
struct HeadStrip {
  static constexpr int64_t kWide = kPanel<P>;
  using MaskWord = uint64_t;
  const TopkProblem& p;
  const TopkPlan<P>& plan;
  const HeadRows& rows;
  Selector<P>& s;
  int64_t first, count;  // the block of queries
  int64_t j0;            // the tile's first row
  int64_t open = 0, ready = 0;
  static constexpr int64_t kReady = 8;
  struct Ready {
    int32_t query, row;
    float score, error;
  } readies[kReady];

  // Rows bank, bank + 1, ... by their pointers; `real` of the six exist.
  [[gnu::always_inline]] void run(const float* const* a, int64_t bank, int64_t real, const float* m,
                                  const float* above, const float* slope, const float* tail,
                                  int64_t lane) {
    const float *limit = s.t.limit + lane, *size = plan.size + lane, *beyond = plan.tails + lane;
    MaskWord words[kRows] = {}, any = 0;
    multiply<P, true>(
        a, 1, plan.panels + lane * plan.depth, plan.depth, [&](int r, int v, Floats sum) {
          const int64_t at = v * kLanes<float>;
          store(s.t.sums + r * kWide + at, sum);
          const Floats most =
              sum * m[r] + above[r] + load(size + at) * slope[r] + load(beyond + at) * tail[r];
          words[r] |= MaskWord(not_less(most, load(limit + at))) << (16 * v);
        });
    for (MaskWord w : words) any |= w;
    if (any) keep(words, bank, real, lane);
  }

  [[gnu::noinline]] void keep(const MaskWord* words, int64_t bank, int64_t real, int64_t lane) {
    OpenPair* to = s.t.open + open;
    for (int64_t r = 0; r < real; ++r) {
      const float* sums = s.t.sums + r * kWide;
      if (words[r]) prefetch(bank + r);
      for (MaskWord word = words[r]; word; word &= word - 1) {
        const int bit = __builtin_ctzll(word);
        const int64_t at = bit / 16 * kLanes<float> + bit % 16;
        *to++ = {static_cast<int32_t>(lane + at), static_cast<int32_t>(bank + r), sums[at]};
      }
    }
    open = to - s.t.open;
    if (open >= kOpen) close();
  }

  void prefetch(int64_t j) const {
    const float* at = p.heads.rest + j * p.heads.levels * Heads::kStep;
    __builtin_prefetch(at);
    __builtin_prefetch(at + Heads::kStep / 2);
  }

  // The pairs that wait: level after level, until a bound rules them out or none is left.
  void close() {
    for (int64_t o = 0; o < open; ++o) {
      const OpenPair pair = s.t.open[o];
      if (pair.query >= count) continue;
      refine(pair.query, pair.row, pair.product);
    }
    open = 0;
    for (int64_t a = 0; a < std::min(ready, kReady); ++a) offer(readies[a]);
    ready = 0;
  }

  // While the rows of y that it takes are on their way, the ones before are scored.
  void offer_later(const Ready& r) {
    s.prefetch(r.row);
    Ready& at = readies[ready % kReady];
    if (ready >= kReady) offer(at);
    at = r;
    ++ready;
  }

  void offer(const Ready& r) { s.offer(r.query, first + r.query, r.row, r.score, r.error); }

  [[gnu::always_inline]] void refine(int64_t q, int64_t j, float product) {
    const HeadTerms t = {s.t.multiplier[j - j0], s.t.offset[j - j0], s.t.slope[j - j0]};
    const float limit = s.t.limit[q];
    float score = product * t.m + t.above;
    float error = plan.size[q] * t.slope + plan.tails[q] * rows.tail(0, j, t.m);
    for (int64_t level = 1; level <= p.heads.levels; ++level) {
      product += level_product(p, plan, level, q, j);
      score = product * t.m + t.above;
      error =
          plan.size[q] * t.slope + plan.tails[level * plan.queries + q] * rows.tail(level, j, t.m);
      if (score + error < limit) return;
    }
    offer_later({static_cast<int32_t>(q), static_cast<int32_t>(j), score, error});
  }
};

template <class P>
void topk_heads(const TopkProblem& p, const TopkPlan<P>& plan, int64_t first, int64_t count,
                std::vector<Selector<P>>& selectors, const Parallel& parallel) {
  if constexpr (P::kPair == 1) {
    constexpr int64_t kWide = kPanel<P>;
    const HeadRows bank(p);
    on_tasks(parallel, ceil_div(p.m, plan.tile), [&](int thread, int64_t task) {
      Selector<P>& s = selectors[thread];
      const int64_t j0 = task * plan.tile, rows = std::min(plan.tile, p.m - j0);
      const float* at[384 + kRows];
      float *m = s.t.multiplier, *above = s.t.offset, *slope = s.t.slope, *tail = s.t.extra;
      for (int64_t r = 0; r < rows + kRows; ++r) {
        const int64_t j = j0 + std::min(r, rows - 1);
        const HeadTerms t = bank.terms(j);
        at[r] = p.heads.first + j * p.heads.width;
        m[r] = t.m;
        above[r] = t.above;
        slope[r] = t.slope;
        tail[r] = bank.tail(0, j, t.m);
      }
      for (int64_t q = 0; q < count; ++q) s.limit(q);
      HeadStrip<P> strip = {p, plan, bank, s, first, count, j0};
      for (int64_t lane = 0; lane < count; lane += kWide) {
        for (int64_t r = 0; r < rows; r += kRows) {
          strip.run(at + r, j0 + r, std::min<int64_t>(kRows, rows - r), m + r, above + r, slope + r,
                    tail + r, lane);
        }
      }
      strip.close();
    });
  }
}

// For tests: every score by the coordinates up to a level, and what may be added to it.
template <class P>
void head_scores(const TopkProblem& p, float* scores, float* bounds, void* buffer,
                 const Parallel& parallel) {
  constexpr int64_t kWide = kPanel<P>;
  const TopkPlan<P> plan(p, buffer);
  const HeadRows bank(p);
  const int64_t level = p.heads.shown;
  for (int64_t first = 0; first < p.n; first += plan.queries) {
    const int64_t count = std::min(plan.queries, p.n - first);
    pack_heads<P>(p, plan, first, count, parallel);
    auto t = plan.thread(p, 0);
    for (int64_t j = 0; j < p.m; ++j) {
      const float* row = p.heads.first + j * p.heads.width;
      const float* const at[kRows] = {row, row, row, row, row, row};
      const HeadTerms terms = bank.terms(j);
      const float tail = bank.tail(level, j, terms.m);
      for (int64_t q = 0; q < count; ++q) {
        if (q % kWide == 0) {
          multiply<P, true>(
              at, 1, plan.panels + q * plan.depth, plan.depth,
              [&](int, int v, Floats sum) { store(t.sums + v * kLanes<float>, sum); });
        }
        float product = t.sums[q % kWide];
        for (int64_t l = 1; l <= level; ++l) product += level_product(p, plan, l, q, j);
        const int64_t pair = (first + q) * p.m + j;
        scores[pair] = product * terms.m + terms.above;
        bounds[pair] = plan.size[q] * terms.slope + plan.tails[level * plan.queries + q] * tail;
      }
    }
  }
}

}  // namespace fused_losses::FL_ISA
