// The k best columns of each row: products screen, candidates are scored again in double.
//
// Queries lie in the lanes, packed once a block; the bank's rows go by, as they lie where that is
// possible. A score that cannot reach the k-th best so far costs a comparison and nothing else.
// The threads share the candidates of a query, behind a lock that is seldom taken. The result does
// not depend on who saw what first: it is the exact one.
#pragma once

#include <thread>
#include <vector>

#include "../../topk.h"
#include "../pairs/tile.h"

namespace fused_losses::FL_ISA {

// key: larger is better, within error of the pair's exact one.
struct Candidate {
  double key;
  float error;
  int32_t index;
};

constexpr int64_t kTopkTileBytes = 256 << 10;  // of the bank in a tile
constexpr int64_t kTopkQueries = 8192;         // of a block at most
constexpr int64_t kTopkColumns = 1024;         // of a task of the triangle
constexpr int64_t kAhead = 4;                  // candidates that are on their way into the caches
constexpr double kNarrowNorm = 1e-11;          // norms below: float may not tell whether they are 0

// Rows that the screen reads are at hand when a candidate turns up: it is scored at once, and a
// heap holds the k best. What only codes were read of is scored late, for few: its row may be far
// away.
inline bool scores_late(const TopkProblem& p) { return p.codes.rows.data != nullptr; }
inline int64_t candidates_kept(const TopkProblem& p) {
  return scores_late(p) ? std::max(2 * p.k, p.k + 64) : p.k;
}

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

typedef float HalfFloats __attribute__((vector_size(FL_VECTOR_BYTES / 2)));

inline Vector<double> wide(const double* p) { return load(p); }
inline Vector<double> wide(const float* p) {
  HalfFloats v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vector<double>);
}

// sum f(a_e, b_e) in double, in an order that the operands do not change.
template <class A, class B, class F>
inline double sum_of(const A* a, const B* b, int64_t d, F&& f) {
  constexpr int64_t kStep = kLanes<double>;
  Vector<double> sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * kStep <= d; e += 4 * kStep) {
    for (int u = 0; u < 4; ++u) sums[u] += f(wide(a + e + u * kStep), wide(b + e + u * kStep));
  }
  double rest = 0;
  for (; e < d; ++e) rest += f(double(a[e]), double(b[e]));
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

inline float sum_of_squares(const float* x, int64_t d) {
  constexpr int64_t kStep = kLanes<float>;
  Floats sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * kStep <= d; e += 4 * kStep) {
    for (int u = 0; u < 4; ++u) {
      const Floats v = load(x + e + u * kStep);
      sums[u] += v * v;
    }
  }
  float rest = 0;
  for (; e < d; ++e) rest += x[e] * x[e];
  return sum<float>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// What a bank's row adds to a product to make it a score, s = m <x, row> + a, and by how much s may
// be wrong: |x| slope + extra.
struct RowTerms {
  float m, a, slope, extra;
};

// The screen's rows: which matrix, moved by what, and their terms.
class Screened {
 public:
  Screened(const TopkProblem& p, const float* center, bool bf16)
      : p_(p), center_(center), rows_(p.codes.rows.data ? p.codes.rows : p.y) {
    scale_ = p.codes.rows.data ? p.codes.scale : p.y_scale;
    const double unit = 0x1p-24;
    // both factors are rounded to 8 bits: (1 + 2^-8)^2 - 1
    each_ = float((2 * p.d + 16) * unit + (bf16 ? 2.01 * 0x1p-8 : 0));
  }

  bool in_place() const { return rows_.type == Type::kFloat32 && !center_; }
  const float* place(int64_t j) const {
    return static_cast<const float*>(rows_.data) + j * rows_.stride;
  }
  void read(int64_t j, float* out) const {
    read_row(rows_, j, p_.d, out);
    move(out);
  }
  void move(float* row) const {
    for (int64_t e = 0; center_ && e < p_.d; ++e) row[e] -= center_[e];
  }

  RowTerms terms(int64_t j, const float* row) const {
    const float scale = scale_ ? scale_[j] : 1.0f;
    const float error = p_.codes.rows.data ? p_.codes.error[j] : 0.0f;
    const float squared = sum_of_squares(row, p_.d) * scale * scale;
    const float norm = std::sqrt(squared);
    RowTerms t = {scale, 0, each_ * norm + error, 0};
    if (p_.affinity == Affinity::kSquaredDistance) {
      t.a = p_.largest ? 0.5f * squared : -0.5f * squared;
      t.extra = each_ * squared + error * (norm + error);
    } else if (p_.affinity == Affinity::kCosine) {
      const bool alive = !(norm <= float(kZeroNorm));
      t.m = alive ? scale / norm : 0.0f;
      t.slope = each_ + 2 * error * t.m / (scale != 0 ? scale : 1.0f);
      // squares below the normal numbers vanish: is it a row of zeros?
      bool zero = error == 0;
      for (int64_t e = 0; zero && e < p_.d; ++e) zero = row[e] == 0;
      if (!zero && norm < kNarrowNorm) t.slope = std::numeric_limits<float>::infinity();
    }
    return t;
  }

 private:
  const TopkProblem& p_;
  const float* center_;
  Matrix rows_;
  const float* scale_;
  float each_;
};

// Exact scores, larger is better.
class Scorer {
 public:
  Scorer(const TopkProblem& p, double* buffer) : p_(p), buffer_(buffer) {}

  double operator()(int64_t i, int64_t j) const {
    if (p_.x.type == Type::kFloat64) return against(row<double>(p_.x, i), j);
    return against(row<float>(p_.x, i), j);
  }

  void prefetch(int64_t j) const {
    constexpr int64_t kLines = 32;  // hardware goes on by itself
    const int64_t size = p_.y.type == Type::kFloat64 ? 8 : p_.y.type == Type::kFloat32 ? 4 : 2;
    const char* at = static_cast<const char*>(p_.y.data) + j * p_.y.stride * size;
    for (int64_t l = 0; l < std::min(kLines, ceil_div(p_.d * size, 64)); ++l) {
      __builtin_prefetch(at + l * 64);
    }
  }

 private:
  template <class T>
  static const T* row(const Matrix& m, int64_t i) {
    return static_cast<const T*>(m.data) + i * m.stride;
  }

  template <class X>
  double against(const X* x, int64_t j) const {
    if (p_.y.type == Type::kFloat32) return score(x, row<float>(p_.y, j));
    if (p_.y.type == Type::kFloat64) return score(x, row<double>(p_.y, j));
    read_row(p_.y, j, p_.d, buffer_);
    for (int64_t e = 0; p_.y_scale && e < p_.d; ++e) buffer_[e] *= p_.y_scale[j];
    return score(x, static_cast<const double*>(buffer_));
  }

  template <class X, class Y>
  double score(const X* x, const Y* y) const {
    const auto product = [](auto a, auto b) { return a * b; };
    const auto difference = [](auto a, auto b) { return (a - b) * (a - b); };
    double s;
    if (p_.affinity == Affinity::kSquaredDistance) {
      s = -sum_of(x, y, p_.d, difference);
    } else {
      s = sum_of(x, y, p_.d, product);
      if (p_.affinity == Affinity::kCosine) {
        const double norm = std::sqrt(sum_of(y, y, p_.d, product));
        s = norm <= kZeroNorm ? 0.0 : s / norm;
      }
    }
    return p_.largest == (p_.affinity == Affinity::kSquaredDistance) ? -s : s;
  }

  const TopkProblem& p_;
  double* buffer_;
};

template <class P>
struct TopkPlan {
  using Word = typename P::Word;
  int64_t depth, tile, queries, kept;
  bool triangle;
  float* center;  // what rows are moved by, zeros where they are not
  // shared, of a block of queries
  Word* panels;
  double *beta, *floor;   // a key is alpha s + beta; the least that the k-th best can be
  float* size;            // |x|
  Candidate* candidates;  // [queries, kept]
  int32_t* count;
  char* lock;
  // shared, of the triangle: rows in the order of their labels, and whom of the later ones row c
  // meets: [from[c], to[c]), which grow with c
  int32_t *order, *from, *to;
  Word* left;  // null: rows are read in place
  float *multiplier, *offset;
  size_t shared_bytes, thread_bytes;
  char* buffer;

  struct Thread {
    float *limit, *row, *gathered, *multiplier, *offset, *sums;
    double *lower, *scratch;
    Word* rows;

    Thread(Arena& arena, const TopkPlan& plan, const TopkProblem& p) {
      limit = arena.take<float>(plan.queries);
      row = arena.take<float>(p.d);
      gathered = arena.take<float>(kPanel<P> * p.d);
      multiplier = arena.take<float>(plan.tile + kRows);
      offset = arena.take<float>(plan.tile + kRows);
      sums = arena.take<float>(kRows * kPanel<P>);
      lower = arena.take<double>(plan.kept);
      scratch = arena.take<double>(p.d);
      rows = arena.take<Word>(plan.triangle ? 0 : plan.tile * plan.depth);
    }
  };

  TopkPlan(const TopkProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    depth = words<P>(p.d);
    kept = candidates_kept(p);
    const int64_t fit = kTopkTileBytes / (std::max<int64_t>(p.d, 1) * 4) / kRows * kRows;
    tile = std::clamp<int64_t>(fit, 24, 384);
    const int64_t padded = round_up(std::max<int64_t>(p.n, 1), kPanel<P>);
    const int64_t a_query = kept * int64_t(sizeof(Candidate));
    const int64_t affordable = int64_t(p.most_bytes) / a_query / kPanel<P> * kPanel<P>;
    triangle = p.symmetric && p.skip_self && !p.codes.rows.data && !p.y_scale &&
               p.x.type == p.y.type && padded <= affordable;
    queries = triangle ? padded : std::clamp(affordable, kPanel<P>, std::min(padded, kTopkQueries));
    Arena arena(base);
    center = arena.take<float>(p.d);
    panels = arena.take<Word>(queries * depth);
    beta = arena.take<double>(queries);
    floor = arena.take<double>(queries);
    size = arena.take<float>(queries);
    candidates = arena.take<Candidate>(queries * kept);
    count = arena.take<int32_t>(queries);
    lock = arena.take<char>(queries);
    order = arena.take<int32_t>(triangle ? queries : 0);
    from = arena.take<int32_t>(triangle ? queries : 0);
    to = arena.take<int32_t>(triangle ? queries : 0);
    left = arena.take<Word>(triangle ? p.n * depth : 0);
    multiplier = arena.take<float>(triangle ? queries : 0);
    offset = arena.take<float>(triangle ? queries : 0);
    shared_bytes = arena.used();
    Arena one(nullptr);
    Thread(one, *this, p);
    thread_bytes = one.used();
  }

  Thread thread(const TopkProblem& p, int index) const {
    Arena arena(buffer + shared_bytes + index * thread_bytes);
    return Thread(arena, *this, p);
  }
};

template <class P>
size_t topk_bytes(const TopkProblem& p, int threads) {
  const TopkPlan<P> plan(p, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

// The bank's mean, by a sample, where moving by it makes rows much shorter; else null.
inline const float* choose_center(const TopkProblem& p, float* out, float* row) {
  if (p.affinity != Affinity::kSquaredDistance || p.y_scale || p.codes.rows.data || p.m == 0) {
    return nullptr;
  }
  constexpr int64_t kSample = 256;
  const int64_t step = std::max<int64_t>(1, p.m / kSample);
  std::vector<double> mean(p.d);
  double squares = 0;
  int64_t count = 0;
  for (int64_t j = 0; j < p.m; j += step, ++count) {
    read_row(p.y, j, p.d, row);
    for (int64_t e = 0; e < p.d; ++e) {
      mean[e] += row[e];
      squares += double(row[e]) * row[e];
    }
  }
  double moved = 0;
  for (int64_t e = 0; e < p.d; ++e) {
    mean[e] /= count;
    moved += mean[e] * mean[e];
    out[e] = static_cast<float>(mean[e]);
  }
  return moved > 0.25 * squares / count ? out : nullptr;
}

// One thread's view of the candidates: what a score must reach to be one.
template <class P>
class Selector {
 public:
  Selector(const TopkProblem& p, const TopkPlan<P>& plan, int thread)
      : t(plan.thread(p, thread)), p_(p), plan_(plan), score_(p, t.scratch) {
    late_ = scores_late(p);
    alpha_ = p.affinity == Affinity::kSquaredDistance ? 2 : 1;
    inverse_ = 1 / alpha_;
  }

  void grow(float slope, float extra, float m) {
    // a NaN stays: nothing is then ruled out
    slope_ = slope_ >= slope ? slope_ : slope;
    extra_ = extra_ >= extra ? extra_ : extra;
    longest_ = longest_ >= std::abs(m) ? longest_ : std::abs(m);
  }

  float error(int64_t q) const {
    // the last term: products below the normal numbers
    return plan_.size[q] * slope_ + extra_ + 3e-38f * (p_.d + 1) * (plan_.size[q] + longest_ + 1);
  }

  // What a score must not be less than.
  void limit(int64_t q) const {
    const double floor = known(q);
    const double at = (floor - plan_.beta[q]) * inverse_ - error(q) * 1.000001;
    const float f = static_cast<float>(at);
    // rounded down, whichever way the conversion went
    t.limit[q] = f - std::abs(f) * 2e-7f;
  }

  bool allowed(int64_t i, int64_t j) const {
    if (p_.match != Match::kAny && (p_.x_labels[i] == p_.y_labels[j]) != (p_.match == Match::kSame))
      return false;
    if (p_.x_ids && p_.x_ids[i] == p_.y_ids[j]) return false;
    if (p_.skip_self && i == j) return false;
    for (int64_t e = 0; e < p_.excluded; ++e) {
      if (p_.exclude[i * p_.excluded + e] == j) return false;
    }
    return true;
  }

  // Query q of the block (row i of x) is offered row j of y, whose score is about s.
  void offer(int64_t q, int64_t i, int64_t j, float s) {
    if (s < t.limit[q] || !allowed(i, j)) return;
    Candidate c = {0, 0, static_cast<int32_t>(j)};
    if (late_) {
      const float e = error(q);
      c.key = alpha_ * s + plan_.beta[q];
      c.error = static_cast<float>(alpha_ * e * 1.00001);
    }
    if (!late_ || !(std::abs(c.key) < 3e38) || !(c.error < 3e38f)) {
      c.key = score_(i, j);
      c.error = 0;
      if (c.key != c.key) return;
    }
    if (c.key + c.error < known(q)) return limit(q);
    const Lock lock(plan_.lock + q);
    Candidate* held = plan_.candidates + q * plan_.kept;
    int32_t& count = plan_.count[q];
    if (late_) {
      held[count++] = c;
      if (count == plan_.kept) compact(q, i);
    } else if (count < plan_.kept) {
      held[count++] = c;
      std::push_heap(held, held + count, better);
      if (count == plan_.kept) raise(q, held[0].key);
    } else if (better(c, held[0])) {
      replace_worst(held, count, c);
      raise(q, held[0].key);
    }
    limit(q);
  }

  void compact(int64_t q, int64_t i) {
    Candidate* c = plan_.candidates + q * plan_.kept;
    int64_t n = plan_.count[q];
    if (n >= p_.k) {
      for (int64_t a = 0; a < n; ++a) t.lower[a] = c[a].key - c[a].error;
      std::nth_element(t.lower, t.lower + p_.k - 1, t.lower + n, std::greater<double>());
      raise(q, t.lower[p_.k - 1]);
      const double floor = known(q);
      n = std::remove_if(c, c + n, [&](const Candidate& a) { return a.key + a.error < floor; }) - c;
    }
    if (n > plan_.kept - plan_.kept / 4) {
      n = exact(c, n, i);
      if (n == p_.k) raise(q, c[n - 1].key);
    }
    plan_.count[q] = static_cast<int32_t>(n);
  }

  // Scores candidates exactly and keeps the k best, in their order.
  int64_t exact(Candidate* c, int64_t n, int64_t i) const {
    for (int64_t a = 0; a < n; ++a) {
      if (a + kAhead < n) score_.prefetch(c[a + kAhead].index);
      if (c[a].error != 0) c[a].key = score_(i, c[a].index), c[a].error = 0;
    }
    n = std::remove_if(c, c + n, [](const Candidate& a) { return a.key != a.key; }) - c;
    const int64_t most = std::min(n, p_.k);
    std::partial_sort(c, c + most, c + n, better);
    return most;
  }

  typename TopkPlan<P>::Thread t;

 private:
  static bool better(const Candidate& a, const Candidate& b) {
    return a.key > b.key || (a.key == b.key && a.index < b.index);
  }

  // The heap's first is the worst of it; c takes its place.
  static void replace_worst(Candidate* heap, int64_t n, const Candidate& c) {
    int64_t at = 0;
    for (int64_t child = 1; child < n; child = 2 * at + 1) {
      if (child + 1 < n && better(heap[child], heap[child + 1])) ++child;
      if (!better(c, heap[child])) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = c;
  }

  double known(int64_t q) const {
    double floor;
    __atomic_load(&plan_.floor[q], &floor, __ATOMIC_RELAXED);
    return floor;
  }

  // Under the lock.
  void raise(int64_t q, double lower) const {
    if (lower > known(q)) __atomic_store(&plan_.floor[q], &lower, __ATOMIC_RELAXED);
  }

  struct Lock {
    explicit Lock(char* at) : held(at) {
      for (int turn = 0; __atomic_test_and_set(held, __ATOMIC_ACQUIRE); ++turn) {
        if (turn > 100) std::this_thread::yield();
      }
    }
    ~Lock() { __atomic_clear(held, __ATOMIC_RELEASE); }
    Lock(const Lock&) = delete;
    char* held;
  };

  const TopkProblem& p_;
  const TopkPlan<P>& plan_;
  Scorer score_;
  bool late_;
  double alpha_, inverse_;
  float slope_ = 0, extra_ = 0, longest_ = 0;
};

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
      plan.beta[q] = plan.size[q] = 0;
      if (l >= real) continue;
      const int64_t i = first + (plan.triangle ? plan.order[q] : q);
      float* out = t.gathered + l * p.d;
      read_row(p.x, i, p.d, out);
      const auto square = [](auto a, auto b) { return (a - b) * (a - b); };
      double squared;
      if (p.x.type == Type::kFloat32) {
        squared = sum_of(out, plan.center, p.d, square);
      } else {
        read_row(p.x, i, p.d, t.scratch);
        squared = sum_of(t.scratch, plan.center, p.d, square);
      }
      plan.size[q] = static_cast<float>(std::sqrt(squared) * (1 + 1e-6));
      const bool distance = p.affinity == Affinity::kSquaredDistance;
      if (distance) plan.beta[q] = p.largest ? squared : -squared;
      screen.move(out);
      if (p.largest == distance) {
        for (int64_t e = 0; e < p.d; ++e) out[e] = -out[e];
      }
    }
    pack_panel<P>(t.gathered, real, p.d, plan.panels + task * kWide * plan.depth);
  });
}

// Six rows of the bank against a panel of queries.
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

  // Rows bank, bank + 1, ... by their pointers a, terms m and o; `real` of the six exist.
  [[gnu::always_inline]] void run(const Word* const* a, int64_t bank, int64_t real, const float* m,
                                  const float* o, int64_t lane) {
    const float* limit = s.t.limit + lane;
    float row_limit[kRows];
    for (int r = 0; kTriangle && r < kRows; ++r) {
      row_limit[r] = r < real ? s.t.limit[bank + r] : std::numeric_limits<float>::infinity();
    }
    MaskWord words[kSides * kRows] = {}, any = 0;
    multiply<P, true>(
        a, 1, plan.panels + lane * plan.depth, plan.depth, [&](int r, int v, Floats sum) {
          const int64_t at = v * kLanes<float>;
          store(s.t.sums + r * kWide + at, sum);
          words[r] |= MaskWord(not_less(sum * m[r] + o[r], load(limit + at))) << (16 * v);
          if constexpr (kTriangle) {
            const Floats other =
                sum * load(plan.multiplier + lane + at) + load(plan.offset + lane + at);
            words[kRows + r] |= MaskWord(not_less(other, Floats{} + row_limit[r])) << (16 * v);
          }
        });
    for (MaskWord w : words) any |= w;
    if (any) scan(words, bank, real, m, o, lane);
  }

  [[gnu::noinline]] void scan(const MaskWord* words, int64_t bank, int64_t real, const float* m,
                              const float* o, int64_t lane) {
    for (int r = 0; r < real; ++r) {
      const float* sums = s.t.sums + r * kWide;
      const int64_t c = bank + r, j = kTriangle ? plan.order[c] : c;
      const int64_t from = kTriangle ? plan.from[c] : 0, to = kTriangle ? plan.to[c] : count;
      for_each(words[r], [&](int64_t at) {
        const int64_t q = lane + at;
        if (q < from || q >= to) return;
        s.offer(q, first + (kTriangle ? plan.order[q] : q), j, sums[at] * m[r] + o[r]);
      });
      if constexpr (kTriangle) {
        for_each(words[kRows + r], [&](int64_t at) {
          const int64_t q = lane + at;
          if (q < from || q >= to) return;
          s.offer(c, j, plan.order[q], sums[at] * plan.multiplier[q] + plan.offset[q]);
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
  const bool in_place = screen.in_place();
  on_tasks(parallel, ceil_div(p.m, plan.tile), [&](int thread, int64_t task) {
    Selector<P>& s = selectors[thread];
    const int64_t j0 = task * plan.tile, rows = std::min(plan.tile, p.m - j0);
    const Word* at[384 + kRows];
    for (int64_t r = 0; r < rows; ++r) {
      Word* to = s.t.rows + r * plan.depth;
      const float* row = s.t.row;
      if (in_place) {
        row = screen.place(j0 + r);
      } else {
        screen.read(j0 + r, s.t.row);
      }
      at[r] = to;
      if constexpr (P::kPair == 2) {
        narrow_row<P>(row, p.d, to);
      } else if (in_place) {
        at[r] = row;
      } else {
        std::copy(row, row + p.d, to);
      }
      const RowTerms terms = screen.terms(j0 + r, row);
      s.t.multiplier[r] = terms.m;
      s.t.offset[r] = terms.a;
      s.grow(terms.slope, terms.extra, terms.m);
    }
    for (int64_t r = rows; r < rows + kRows; ++r) {
      at[r] = at[rows - 1];
      s.t.multiplier[r] = 0;
      s.t.offset[r] = kNone<float>;
    }
    for (int64_t q = 0; q < count; ++q) s.limit(q);
    Strip<P, false> strip = {p, plan, s, first, count};
    for (int64_t lane = 0; lane < count; lane += kWide) {
      for (int64_t r = 0; r < rows; r += kRows) {
        strip.run(at + r, j0 + r, std::min<int64_t>(kRows, rows - r), s.t.multiplier + r,
                  s.t.offset + r, lane);
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
      const float* row = t.row;
      if (in_place) {
        row = screen.place(plan.order[c]);
      } else {
        screen.read(plan.order[c], t.row);
        if constexpr (P::kPair == 2) {
          narrow_row<P>(t.row, p.d, plan.left + c * plan.depth);
        } else {
          std::copy(t.row, t.row + p.d, plan.left + c * plan.depth);
        }
      }
      const RowTerms terms = screen.terms(plan.order[c], row);
      plan.multiplier[c] = terms.m;
      plan.offset[c] = terms.a;
      RowTerms& m = most[task];
      m.slope = m.slope >= terms.slope ? m.slope : terms.slope;
      m.extra = m.extra >= terms.extra ? m.extra : terms.extra;
      m.m = m.m >= std::abs(terms.m) ? m.m : std::abs(terms.m);
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
      for (const RowTerms& m : most) s.grow(m.slope, m.extra, m.m);
      for (int64_t q = 0; q < plan.queries; ++q) {
        s.t.limit[q] = q < p.n ? kNone<float> : std::numeric_limits<float>::infinity();
      }
      ready[thread] = 1;
    }
    for (int64_t q = c0; q < c1; ++q) s.limit(q);
    for (int64_t q = q0; q < q1; ++q) s.limit(q);
    const Word* a[192 + kRows];
    float m[192 + kRows], o[192 + kRows];
    for (int64_t r = 0; r < c1 - c0 + kRows; ++r) {
      const bool real = c0 + r < c1;
      const int64_t c = real ? c0 + r : c1 - 1;
      a[r] = in_place ? in_order(c) : plan.left + c * plan.depth;
      m[r] = real ? plan.multiplier[c] : 0;
      o[r] = real ? plan.offset[c] : kNone<float>;
    }
    Strip<P, true> strip = {p, plan, s, 0, p.n};
    for (int64_t lane = q0; lane < q1; lane += kWide) {
      const int64_t end = std::min(lane + kWide, q1);
      for (int64_t c = c0; c < c1; c += kRows) {
        const int64_t real = std::min<int64_t>(kRows, c1 - c), r = c - c0;
        if (plan.from[c] >= end || plan.to[c + real - 1] <= lane) continue;
        strip.run(a + r, c, real, m + r, o + r, lane);
      }
    }
  });
}

// The triangle's rows by their labels, and where each one's partners stand.
template <class P>
void order_rows(const TopkProblem& p, const TopkPlan<P>& plan) {
  const int32_t n = static_cast<int32_t>(p.n);
  for (int32_t q = 0; q < n; ++q) {
    plan.order[q] = q;
    plan.from[q] = q + 1;
    plan.to[q] = n;
  }
  if (p.match == Match::kAny) return;
  std::sort(plan.order, plan.order + n, [&](int32_t a, int32_t b) {
    return p.x_labels[a] < p.x_labels[b] || (p.x_labels[a] == p.x_labels[b] && a < b);
  });
  for (int32_t q = n - 1, end = n; q >= 0; --q) {
    if (q + 1 < n && p.x_labels[plan.order[q]] != p.x_labels[plan.order[q + 1]]) end = q + 1;
    (p.match == Match::kSame ? plan.to : plan.from)[q] = end;
  }
}

template <class P>
void topk(const TopkProblem& p, const TopkOut& out, void* buffer, const Parallel& parallel) {
  const TopkPlan<P> plan(p, buffer);
  std::vector<float> row(p.d);
  const float* center = choose_center(p, plan.center, row.data());
  if (!center) std::fill(plan.center, plan.center + p.d, 0.0f);
  const Screened screen(p, center, P::kPair == 2);
  if (plan.triangle) {
    order_rows(p, plan);
  }
  for (int64_t first = 0; first < p.n; first += plan.queries) {
    const int64_t count = std::min(plan.queries, p.n - first);
    pack_queries<P>(p, plan, screen, first, count, parallel);
    std::vector<Selector<P>> selectors;
    selectors.reserve(parallel.threads);
    for (int i = 0; i < parallel.threads; ++i) {
      selectors.emplace_back(p, plan, i);
    }
    if (plan.triangle) {
      topk_triangle<P>(p, plan, screen, selectors, parallel);
    } else {
      for (Selector<P>& s : selectors) {
        std::fill(s.t.limit + count, s.t.limit + plan.queries,
                  std::numeric_limits<float>::infinity());
      }
      topk_rectangle<P>(p, plan, screen, first, count, selectors, parallel);
    }
    constexpr int64_t kQueriesAtOnce = 64;
    on_tasks(parallel, ceil_div(count, kQueriesAtOnce), [&](int thread, int64_t task) {
      const int64_t end = std::min((task + 1) * kQueriesAtOnce, count);
      for (int64_t q = task * kQueriesAtOnce; q < end; ++q) {
        const int64_t i = first + (plan.triangle ? plan.order[q] : q);
        Candidate* held = plan.candidates + q * plan.kept;
        const auto beaten = [&](const Candidate& c) { return c.key + c.error < plan.floor[q]; };
        const int64_t kept = std::remove_if(held, held + plan.count[q], beaten) - held;
        const int64_t found = selectors[thread].exact(held, kept, i);
        double by = p.largest ? 1 : -1;
        if (p.affinity == Affinity::kCosine) {
          read_row(p.x, i, p.d, selectors[thread].t.scratch);
          const double* x = selectors[thread].t.scratch;
          const double norm = std::sqrt(sum_of(x, x, p.d, [](auto a, auto b) { return a * b; }));
          by *= norm <= kZeroNorm ? 0 : 1 / norm;
        }
        for (int64_t a = 0; a < p.k; ++a) {
          const bool real = a < found;
          const double key = real ? by * held[a].key : NAN;
          out.keys[i * p.k + a] = key == 0 ? 0 : key;  // no -0
          out.index[i * p.k + a] = real ? held[a].index : -1;
        }
      }
    });
  }
}

}  // namespace fused_losses::FL_ISA
