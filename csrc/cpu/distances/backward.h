// The gradient of distances that are sums over coordinates: lanes along the coordinates, the sums
// of a few rows in registers while the other side's rows go by.
//
// dx and dy are two passes of one loop with the roles swapped: each output element has one owner
// and one order of summation. The factors of a tile of pairs are computed from grad and out as it
// comes.
#pragma once

#include "sweep.h"

namespace fused_losses::FL_ISA {

constexpr int kOwnRows = 4;            // rows whose gradient is in registers at once
constexpr int64_t kOthers = 256;       // rows of the other side in a tile
constexpr int64_t kMostOwnRows = 64;   // in a tile
constexpr int64_t kSliceBytes = 8192;  // of a row's gradient in a task

// grad[i][j ... j + real), zeros after them.
template <class T>
inline Vector<T> grad_part(const DistanceBackwardIn& in, int64_t i, int64_t j, int64_t real) {
  const T* at = static_cast<const T*>(in.grad) + i * in.row_stride + j * in.column_stride;
  if (in.column_stride == 1) return load_part(at, real);
  Vector<T> v = {};
  for (int64_t l = 0; l < std::min(kLanes<T>, real); ++l) v[l] = at[l * in.column_stride];
  return v;
}

// One side of the pairs: `w` null or a row of weights a row.
template <class T>
struct Side {
  const T *rows, *w;
  int64_t count;
};

// ---- the loop -----------------------------------------------------------------------------------

// Factors of a tile of pairs: of own row r and other row s at first[r * own + s * other].
template <class T>
struct Factors {
  const T *first, *second;
  int64_t own, other;
};

// sums[kOwnRows][kCount vectors] += the terms of `count` other rows; kPart: only `real` lanes
// exist.
template <class Term, int kCount, bool kPart, class T>
[[gnu::always_inline]] inline void add_terms(const Term& term, const T* const* own, const T* other,
                                             const T* other_w, int64_t ld, int64_t count,
                                             const Factors<T>& f, T* const* sums, int64_t rows,
                                             int64_t real) {
  constexpr int64_t kStep = kLanes<T>;
  const auto read = [&](const T* at) { return kPart ? load_part(at, real) : load(at); };
  Vector<T> total[kOwnRows][kCount], mine[kOwnRows][kCount];
#pragma GCC unroll 4
  for (int r = 0; r < kOwnRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      total[r][v] = Vector<T>{};
      mine[r][v] = read(own[r] + v * kStep);
    }
  }
  const T *first = f.first, *second = f.second;
  for (int64_t s = 0; s < count; ++s) {
    Vector<T> theirs[kCount], scale[kCount] = {};
#pragma GCC unroll 4
    for (int v = 0; v < kCount; ++v) {
      theirs[v] = read(other + v * kStep);
      if constexpr (Term::kOtherWeights) scale[v] = read(other_w + v * kStep);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kOwnRows; ++r) {
      const T g = first[r * f.own], h = Term::kSecond ? second[r * f.own] : T(0);
#pragma GCC unroll 4
      for (int v = 0; v < kCount; ++v) term.add(total[r][v], mine[r][v], theirs[v], scale[v], g, h);
    }
    other += ld;
    if constexpr (Term::kOtherWeights) other_w += ld;
    first += f.other;
    if constexpr (Term::kSecond) second += f.other;
  }
  for (int r = 0; r < std::min<int64_t>(kOwnRows, rows); ++r) {
    for (int v = 0; v < kCount; ++v) {
      T* to = sums[r] + v * kStep;
      if constexpr (kPart) {
        store_part(to, read(to) + total[r][v], real);
      } else {
        store(to, load(to) + total[r][v]);
      }
    }
  }
}

// sums [rows, ld] += the terms of rows of `own` and of `other`, coordinates [0, d) of rows ld
// apart. The factors may be read up to the next multiple of kOwnRows.
template <class Term, class T>
void add_tile(const Term& term, const T* own, int64_t rows, const T* other, const T* other_w,
              int64_t count, int64_t d, int64_t ld, const Factors<T>& f, T* sums) {
  constexpr int64_t kStep = kLanes<T>, kWide = kVectors * kStep;
  for (int64_t k = 0; k < d;) {
    const int64_t left = d - k, wide = left >= kWide ? kWide : std::min(left, kStep);
    for (int64_t i = 0; i < rows; i += kOwnRows) {
      const T* mine[kOwnRows];
      T* to[kOwnRows];
      for (int r = 0; r < kOwnRows; ++r) {
        const int64_t at = std::min(i + r, rows - 1) * ld + k;
        mine[r] = own + at;
        to[r] = sums + at;
      }
      const Factors<T> here = {f.first + i * f.own, Term::kSecond ? f.second + i * f.own : nullptr,
                               f.own, f.other};
      const T* w = Term::kOtherWeights ? other_w + k : nullptr;
      if (wide == kWide) {
        add_terms<Term, kVectors, false>(term, mine, other + k, w, ld, count, here, to, rows - i,
                                         wide);
      } else if (wide == kStep) {
        add_terms<Term, 1, false>(term, mine, other + k, w, ld, count, here, to, rows - i, wide);
      } else {
        add_terms<Term, 1, true>(term, mine, other + k, w, ld, count, here, to, rows - i, wide);
      }
    }
    k += wide;
  }
}

// Tiles of factors: [kMostOwnRows + padding] x [kOthers] in either direction, twice.
constexpr int64_t kFactorRows = kMostOwnRows + kOwnRows, kFactors = kFactorRows * kOthers;

inline int64_t slice_of(int64_t d, int64_t element, bool whole_rows) {
  return whole_rows ? std::max<int64_t>(d, 1) : kSliceBytes / element;
}

// out[own] = sum over the other side of `term`. fill(thread, i, rows, j, columns, first, second,
// ld) computes the factors of rows of x by rows of y; own_is_x says which of the two own.
template <class Term, class T, class Fill>
void own_pass(const Term& term, const Side<T>& own, const Side<T>& other, int64_t d, bool own_is_x,
              bool whole_rows, T* scratch, int64_t thread_size, T* out, const Parallel& parallel,
              Fill&& fill) {
  const int64_t slice = slice_of(d, sizeof(T), whole_rows), slices = ceil_div(d, slice);
  // tasks enough for the threads; a sum does not depend on which rows go with it
  const int64_t most = round_up(ceil_div(own.count, 4 * parallel.threads), kOwnRows);
  const int64_t block = std::clamp<int64_t>(most, 4 * kOwnRows, kMostOwnRows);
  on_tasks(parallel, ceil_div(own.count, block) * slices, [&](int thread, int64_t task) {
    T* first = scratch + thread * thread_size;
    T* second = first + kFactors;
    const int64_t i = task / slices * block, rows = std::min(block, own.count - i);
    const int64_t k = task % slices * slice, wide = std::min(slice, d - k);
    T* sums = out + i * d + k;
    for (int64_t r = 0; r < rows; ++r) std::fill(sums + r * d, sums + r * d + wide, T(0));
    for (int64_t s = 0; s < other.count; s += kOthers) {
      const int64_t count = std::min(kOthers, other.count - s);
      const int64_t ld = own_is_x ? kOthers : kFactorRows;
      if (own_is_x) {
        fill(thread, i, rows, s, count, first, second, ld);
      } else {
        fill(thread, s, count, i, rows, first, second, ld);
      }
      const Factors<T> f = {first, second, own_is_x ? ld : 1, own_is_x ? 1 : ld};
      const T* other_w = Term::kOtherWeights ? other.w + s * d + k : nullptr;
      add_tile(term, own.rows + i * d + k, rows, other.rows + s * d + k, other_w, count, wide, d, f,
               sums);
    }
    if constexpr (Term::kFinish) {
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t e = 0; e < wide; ++e) {
          const int64_t at = (i + r) * d + k + e;
          out[at] = term.finish(out[at], own.rows[at], own.w ? own.w[at] : T(1));
        }
      }
    }
  });
}

// ---- factors ------------------------------------------------------------------------------------

// first (and second) [rows][ld] from grad and out: the term's factors, a vector at a time.
template <class Term, class T>
inline void map_factors(const DistanceProblem& p, const DistanceBackwardIn& in, int64_t i,
                        int64_t rows, int64_t j, int64_t columns, T* first, T* second, int64_t ld) {
  const T* out = static_cast<const T*>(in.out);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const int64_t real = columns - c;
      Vector<T> more = load_part(second + r * ld + c, std::min(real, kLanes<T>));
      const Vector<T> g = grad_part<T>(in, i + r, j + c, real);
      const Vector<T> value = load_part(out + (i + r) * p.between() + j + c, real);
      store_part(first + r * ld + c, Term::factor(g, value, more), real);
      store_part(second + r * ld + c, more, real);
    }
  }
}

// sizes[rows][ld] = sum |x + y|: what braycurtis was divided by.
template <class T>
inline void sums_of_sizes(const DistanceProblem& p, int64_t i, int64_t rows, int64_t j,
                          int64_t columns, T* panel, T* sizes, int64_t ld) {
  constexpr int64_t kWide = kPanel<Plain<T>>;
  const T* x = static_cast<const T*>(p.x);
  const T* y = static_cast<const T*>(p.y);
  for (int64_t c = 0; c < columns; c += kWide) {
    pack_panel<Plain<T>>(y + (j + c) * p.d, columns - c, p.d, panel);
    for (int64_t r = 0; r < rows; r += kRows) {
      const T* mine[kRows];
      for (int e = 0; e < kRows; ++e) mine[e] = x + (i + std::min(r + e, rows - 1)) * p.d;
      alignas(64) T carry[kRows * kWide];
      for (int64_t k = 0; k == 0 || k < p.d; k += kDistanceChunk) {
        add_coordinates(SumOfSizes<T>{}, mine, panel, panel, panel, k,
                        std::min(kDistanceChunk, p.d - k), carry, k == 0);
      }
      for (int64_t e = 0; e < std::min<int64_t>(kRows, rows - r); ++e) {
        std::copy(carry + e * kWide, carry + e * kWide + std::min(kWide, columns - c),
                  sizes + (r + e) * ld + c);
      }
    }
  }
}

// ---- chebyshev ----------------------------------------------------------------------------------

// at[kChebyshevRows][kPanel] = the first coordinate where |own - other| is largest.
constexpr int kChebyshevRows = 3;

template <class T>
[[gnu::noinline]] void largest_coordinates(const T* const* own, const T* panel, int64_t d,
                                           Code<T>* at_out) {
  constexpr int64_t kStep = kLanes<T>, kWide = kVectors * kStep;
  using Bits = Vector<Code<T>>;
  Bits best[kChebyshevRows][kVectors], at[kChebyshevRows][kVectors];
  for (int r = 0; r < kChebyshevRows; ++r) {
    for (int v = 0; v < kVectors; ++v) best[r][v] = Bits{} - 1, at[r][v] = Bits{};
  }
  Bits now = {};
  for (int64_t k = 0; k < d; ++k, panel += kWide, now += 1) {
#pragma GCC unroll 3
    for (int r = 0; r < kChebyshevRows; ++r) {
      const T x = own[r][k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Bits apart = (Bits)magnitude<T>(x - load(panel + v * kStep));
        at[r][v] = apart > best[r][v] ? now : at[r][v];
        best[r][v] = apart > best[r][v] ? apart : best[r][v];
      }
    }
  }
  for (int r = 0; r < kChebyshevRows; ++r) {
    for (int v = 0; v < kVectors; ++v) store(at_out + (r * kVectors + v) * kStep, at[r][v]);
  }
}

// out[own] = sum of grad sign(own - other) at the coordinate that attains the distance.
template <class T>
void chebyshev_pass(const DistanceProblem& p, const DistanceBackwardIn& in, bool own_is_x,
                    T* panels, int64_t thread_size, T* out, const Parallel& parallel) {
  constexpr int64_t kWide = kPanel<Plain<T>>, kTall = 66;
  static_assert(kTall % kChebyshevRows == 0);
  const int64_t d = p.d, own_count = own_is_x ? p.n : p.m, other_count = own_is_x ? p.m : p.n;
  const T* own = static_cast<const T*>(own_is_x ? p.x : p.y);
  const T* other = static_cast<const T*>(own_is_x ? p.y : p.x);
  const T* grad = static_cast<const T*>(in.grad);
  const int64_t own_stride = own_is_x ? in.row_stride : in.column_stride;
  const int64_t other_stride = own_is_x ? in.column_stride : in.row_stride;
  on_tasks(parallel, ceil_div(own_count, kTall), [&](int thread, int64_t task) {
    T* panel = panels + thread * thread_size;
    const int64_t first = task * kTall, last = std::min(first + kTall, own_count);
    std::fill(out + first * d, out + last * d, T(0));
    for (int64_t j = 0; j < other_count; j += kWide) {
      pack_panel<Plain<T>>(other + j * d, other_count - j, d, panel);
      for (int64_t i = first; i < last; i += kChebyshevRows) {
        const T* mine[kChebyshevRows];
        for (int r = 0; r < kChebyshevRows; ++r) mine[r] = own + std::min(i + r, last - 1) * d;
        alignas(64) Code<T> at[kChebyshevRows * kWide];
        largest_coordinates(mine, panel, d, at);
        for (int64_t r = 0; r < std::min<int64_t>(kChebyshevRows, last - i); ++r) {
          T* to = out + (i + r) * d;
          const T* g = grad + (i + r) * own_stride + j * other_stride;
          for (int64_t c = 0; c < std::min(kWide, other_count - j); ++c) {
            const int64_t k = at[r * kWide + c];
            const T apart = mine[r][k] - panel[k * kWide + c], by = g[c * other_stride];
            to[k] += apart > 0 ? by : apart < 0 ? -by : by * apart;
          }
        }
      }
    }
  });
}

// ---- all of it ----------------------------------------------------------------------------------

template <class T>
struct SumsBackwardPlan {
  int64_t thread_size;  // elements: two tiles of factors, and a panel where one is packed
  T* shares;            // [n, d] of canberra with weights, for dw
  T* threads;
  size_t shared_bytes;

  SumsBackwardPlan(const DistanceProblem& p, const DistanceBackwardOut& out, void* base) {
    const bool packs = p.kind == Distance::kBraycurtis || p.kind == Distance::kChebyshev;
    const int64_t panel = packs ? std::max<int64_t>(p.d, 1) * kPanel<Plain<T>> : 0;
    thread_size = round_up(2 * kFactors + panel, 64);
    Arena arena(base);
    shares = arena.take<T>(p.kind == Distance::kCanberra && out.dw ? p.n * p.d : 0);
    shared_bytes = arena.used();
    threads = arena.take<T>(0);
  }
};

template <class T>
size_t sums_backward_bytes(const DistanceProblem& p, const DistanceBackwardOut& out, int threads) {
  const SumsBackwardPlan<T> plan(p, out, nullptr);
  return plan.shared_bytes + threads * plan.thread_size * sizeof(T);
}

template <class T>
void sums_backward(const DistanceProblem& p, const DistanceBackwardIn& in,
                   const DistanceBackwardOut& out, void* buffer, const Parallel& parallel) {
  const SumsBackwardPlan<T> plan(p, out, buffer);
  const int64_t d = p.d;
  const T* w = static_cast<const T*>(p.w);
  const bool scaled = p.kind == Distance::kScaled;
  const Side<T> x = {static_cast<const T*>(p.x), nullptr, p.n};
  const Side<T> y = {static_cast<const T*>(p.y), scaled ? w : nullptr, p.m};
  T* dx = static_cast<T*>(out.dx);
  T* dy = static_cast<T*>(out.dy);
  T* dw = static_cast<T*>(out.dw);
  const bool whole = p.kind == Distance::kBraycurtis;
  // a pass for each side that wants its gradient
  const auto pass = [&]<class Rule>(const Rule& term, bool own_is_x, T* to, auto&& before) {
    if (!to) return;
    const auto fill = [&](int thread, int64_t i, int64_t rows, int64_t j, int64_t columns, T* first,
                          T* second, int64_t ld) {
      before(thread, i, rows, j, columns, second, ld);
      map_factors<Rule>(p, in, i, rows, j, columns, first, second, ld);
    };
    own_pass(term, own_is_x ? x : y, own_is_x ? y : x, d, own_is_x, whole, plan.threads,
             plan.thread_size, to, parallel, fill);
  };
  const auto nothing = [](auto...) {};
  const auto both = [&](const auto& term) {
    pass(term, true, dx, nothing);
    pass(term, false, dy, nothing);
  };
  using Math = DistanceMath<T>;
  switch (p.kind) {
    case Distance::kMinkowski:
      if (p.p == 3) return both(distance_rules::MinkowskiTerm<Math, 3>(3));
      if (p.p == 4) return both(distance_rules::MinkowskiTerm<Math, 4>(4));
      return both(distance_rules::MinkowskiTerm<Math, 0>(p.p));
    case Distance::kChebyshev:
      if (dx) chebyshev_pass(p, in, true, plan.threads, plan.thread_size, dx, parallel);
      if (dy) chebyshev_pass(p, in, false, plan.threads, plan.thread_size, dy, parallel);
      return;
    case Distance::kCanberra: {
      both(distance_rules::CanberraTerm<Math>{});
      const auto weigh = [&](T* rows, int64_t count) {
        on_tasks(parallel, rows ? count : 0, [&](int, int64_t i) {
          for (int64_t k = 0; k < d; ++k) rows[i * d + k] *= w[k];
        });
      };
      if (w) weigh(dx, p.n), weigh(dy, p.m);
      if (!w || !dw) return;
      pass(distance_rules::CanberraShare<Math>{}, true, plan.shares, nothing);
      on_tasks(parallel, ceil_div(d, 64), [&](int, int64_t task) {
        for (int64_t k = task * 64; k < std::min(task * 64 + 64, d); ++k) {
          T total = 0;
          for (int64_t i = 0; i < p.n; ++i) total += plan.shares[i * d + k];
          dw[k] = total;
        }
      });
      return;
    }
    case Distance::kBraycurtis: {
      const auto sizes = [&](int thread, int64_t i, int64_t rows, int64_t j, int64_t columns, T* to,
                             int64_t ld) {
        T* panel = plan.threads + thread * plan.thread_size + 2 * kFactors;
        sums_of_sizes(p, i, rows, j, columns, panel, to, ld);
      };
      pass(distance_rules::BraycurtisTerm<Math>{}, true, dx, sizes);
      pass(distance_rules::BraycurtisTerm<Math>{}, false, dy, sizes);
      return;
    }
    case Distance::kJensenShannon:
      return both(distance_rules::JensenShannonTerm<Math>{});
    case Distance::kKl:
      pass(distance_rules::KlOfX<Math>{}, true, dx, nothing);
      pass(distance_rules::KlOfY<Math>{}, false, dy, nothing);
      return;
    case Distance::kScaled:
      pass(distance_rules::ScaledOfX<Math>{}, true, dx, nothing);
      pass(distance_rules::ScaledOfY<Math>{}, false, dy, nothing);
      pass(distance_rules::ScaledOfW<Math>{}, false, dw, nothing);
      return;
    default:
      return both(distance_rules::SignTerm<Math>{});
  }
}

}  // namespace fused_losses::FL_ISA
