// The sweep over pairs on tiles of products (the maths: fused_losses/primitives/pairs/op.py,
// backends/cuda_pairs.py).
//
// A tile is a block of rows against a block of columns, [rows, stride] float, made by the library
// and still in L2. Work goes in two shapes: by rows, where a warp owns whole rows and their sums,
// and by columns, where a thread owns kWide columns of a segment of rows and keeps their vectors in
// registers. No atomics: every sum has one owner and a fixed order.
#include <cmath>
#include <limits>

#include "../rules/pairs.h"
#include "warp.h"

namespace fused_losses::cuda::pairs {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kWide = 4;                // columns of a thread: 16 bytes of the tile
constexpr int kAcross = kWarp * kWide;  // columns of a warp
constexpr int kRowsAtOnce = 2;          // of a warp that goes along rows
constexpr int64_t kSegment = 128;       // rows of a block that goes down columns
constexpr int32_t kExcluded =
    0x7fe51ded;              // the bits of a product that is listed in `exclude`: a NaN
constexpr int kVectors = 4;  // of a class in the backward: base, mean, rest, share

// clang-format off
#define PAIR_FIELDS(F)                                                                            \
  F(float*, tile)            /* products, [rows, stride], 16-byte aligned */                      \
  F(int64_t, stride)         /* a multiple of kWide */                                            \
  F(const float*, scale)     /* [1] */                                                            \
  F(const float*, x_bias)    /* [n] or null; so are all vectors */                                \
  F(const float*, y_bias)    /* [m] */                                                            \
  F(const int32_t*, x_labels) F(const int32_t*, y_labels)                                         \
  F(const int32_t*, x_ids) F(const int32_t*, y_ids)                                               \
  F(const int32_t*, x_groups) F(const int32_t*, y_groups)                                         \
  F(const float*, x_window)  /* [4, n] */                                                         \
  F(const float*, y_window)  /* [4, m] */                                                         \
  F(double, positive_factor) F(double, positive_center) F(double, positive_reach)                 \
  F(double, negative_factor) F(double, negative_center) F(double, negative_reach)                 \
  F(bool, root) F(bool, skip_self) F(bool, triangle) F(int32_t, reduction)                        \
  F(int64_t, n) F(int64_t, m)                                                                     \
  F(int64_t, first_row) F(int64_t, row_end) F(int64_t, first_column) F(int64_t, column_end)
// clang-format on

// ---- scores, classes and terms -----------------------------------------------------------------

struct FloatMath {
  using Scalar = float;
  using Value = float;
  FL_FUNCTION static float exp(float v) { return expf(v); }
  FL_FUNCTION static float sqrt(float v) { return sqrtf(v); }
  FL_FUNCTION static float log1p_unit(float t) { return pair_rules::log1p_series(t); }
};

constexpr int kLeftOut = kClasses;  // besides PairClass
constexpr float kNone = -std::numeric_limits<float>::infinity();

// kWide neighbours of a vector; past its end the last one again.
template <class T>
FL_DEVICE Pack<T, kWide> neighbours(const T* v, int64_t first, int64_t end) {
  const T* p = v + first;
  if (first + kWide <= end && reinterpret_cast<uintptr_t>(p) % 16 == 0) {
    return ld(reinterpret_cast<const Pack<T, kWide>*>(p));
  }
  Pack<T, kWide> out;
  for (int c = 0; c < kWide; ++c) out[c] = ld(v + (first + c < end ? first + c : end - 1));
  return out;
}

// What a pair asks of its row.
struct OfRow {
  float bias = 0;
  int32_t label = 0, id = 0, group = 0;

  template <class A>
  FL_DEVICE OfRow(const A& a, int64_t i) {
    if (a.x_bias) bias = ld(a.x_bias + i);
    if (a.x_labels) label = ld(a.x_labels + i);
    if (a.x_ids) id = ld(a.x_ids + i);
    if (a.x_groups) group = ld(a.x_groups + i);
  }
};

// What a pair asks of its columns; without labels or ids they differ from every row's.
struct OfColumns {
  Pack<float, kWide> bias = {};
  Pack<int32_t, kWide> label, id, group;

  template <class A>
  FL_DEVICE OfColumns(const A& a, int64_t j) {
    for (int c = 0; c < kWide; ++c) label[c] = id[c] = 1, group[c] = 0;
    if (a.y_bias) bias = neighbours(a.y_bias, j, a.column_end);
    if (a.y_labels) label = neighbours(a.y_labels, j, a.column_end);
    if (a.y_ids) id = neighbours(a.y_ids, j, a.column_end);
    if (a.y_groups) group = neighbours(a.y_groups, j, a.column_end);
  }
};

// The class of the pair (i, j + c), or kLeftOut.
template <class A>
FL_DEVICE int class_of(const A& a, float product, int64_t i, const OfRow& x, int64_t j,
                       const OfColumns& y, int c) {
  bool out = __float_as_int(product) == kExcluded || x.id == y.id[c] || x.group != y.group[c];
  out |= j + c >= a.column_end;
  out |= a.skip_self && i == j + c;
  out |= a.triangle && i >= j + c;
  return out ? kLeftOut : x.label == y.label[c] ? kPositive : kNegative;
}

// The window of a row or column for one class; s <= low and s >= high are outside.
struct Bounds {
  bool any = false;
  float low = 0, high = 0;

  Bounds() = default;
  FL_DEVICE Bounds(const float* window, int k, int64_t i, int64_t count) : any(window != nullptr) {
    if (!any) return;
    low = ld(window + 2 * k * count + i);
    high = ld(window + (2 * k + 1) * count + i);
  }
  // written so that a NaN score takes part
  FL_DEVICE bool holds(float s) const { return !any || !(s <= low || s >= high); }
};

struct BothBounds {
  Bounds of[kClasses];
  BothBounds() = default;
  FL_DEVICE BothBounds(const float* window, int64_t i, int64_t count)
      : of{{window, kPositive, i, count}, {window, kNegative, i, count}} {}
};

// A tile for those that go by columns: groups of columns, segments of rows.
struct Cut {
  uint32_t groups, segments;

  template <class A>
  FL_FUNCTION explicit Cut(const A& a)
      : groups((a.column_end - a.first_column + kAcross - 1) / kAcross),
        segments((a.row_end - a.first_row + kSegment - 1) / kSegment) {}
  FL_FUNCTION uint32_t count() const { return groups * segments; }
  FL_FUNCTION int64_t column(uint32_t work) const { return work % groups * kAcross; }
  FL_FUNCTION int64_t segment(uint32_t work) const { return work / groups; }
};

// What a launch computes a pair with.
struct Scoring {
  float scale;
  Score psi;
  pair_rules::Weighing<float> rule[kClasses];

  template <class A>
  FL_DEVICE explicit Scoring(const A& a)
      : scale(ld(a.scale)), psi(a.root ? Score::kRoot : Score::kLinear) {
    rule[kPositive] =
        pair_rules::weighing<float>(a.positive_factor, a.positive_center, a.positive_reach);
    rule[kNegative] =
        pair_rules::weighing<float>(a.negative_factor, a.negative_center, a.negative_reach);
  }

  FL_DEVICE float score(float product, float x_bias, float y_bias) const {
    return pair_rules::score<FloatMath>(psi, product * scale + (y_bias + x_bias));
  }

  template <int kClass>
  FL_DEVICE pair_rules::Term<FloatMath> term(float s) const {
    return pair_rules::term<FloatMath>(rule[kClass], s, pair_rules::score_slope<FloatMath>(psi, s));
  }
};

// A class that is known when this is compiled: what it indexes stays in registers.
template <int kClass>
struct Known {
  FL_FUNCTION constexpr operator int() const { return kClass; }
};

template <class F>
FL_DEVICE void each_class(F&& f) {
  f(Known<kPositive>{});
  f(Known<kNegative>{});
}

// Columns listed in `exclude` get the mark in place of their product.
#define EXCLUDE_FIELDS(F)                        \
  PAIR_FIELDS(F)                                 \
  F(const int32_t*, exclude) /* [n, excluded] */ \
  F(int64_t, excluded)
FL_ARGUMENTS(ExcludeArguments, EXCLUDE_FIELDS)

FL_KERNEL(kThreads) exclude_pairs(ExcludeArguments a) {
  // 32 bits within a tile: a division of 64 bits is a call
  const uint32_t excluded = a.excluded, count = (a.row_end - a.first_row) * excluded;
  for (uint32_t k = blockIdx.x * kThreads + threadIdx.x; k < count; k += gridDim.x * kThreads) {
    const int64_t row = k / excluded, at = ld(a.exclude + a.first_row * a.excluded + k);
    if (at < a.first_column || at >= a.column_end) continue;
    st(a.tile + row * a.stride + at - a.first_column, __int_as_float(kExcluded));
  }
}

// ---- statistics --------------------------------------------------------------------------------

#define STATISTICS_FIELDS(F)                                                        \
  PAIR_FIELDS(F)                                                                    \
  F(double*, rows)    /* [4, 2, n] state: the value is sum exp(z - best) for lse */ \
  F(double*, columns) /* [4, 2, m] or null */                                       \
  F(float*, parts)    /* [segments, 4, 2, columns of the tile] or null */
FL_ARGUMENTS(StatisticsArguments, STATISTICS_FIELDS)

// A class's sums: value = mass exp(best), or mass. `best` passes over a NaN, the sums do not.
struct Sums {
  float best = kNone, mass = 0, total = 0;
  int32_t count = 0;

  template <bool kLse>
  FL_DEVICE void add(Reduction f, float z) {
    if (z == kNone) return;
    if constexpr (kLse) {
      const bool grew = z > best;
      const float e = expf(grew ? best - z : z - best);
      mass = grew ? mass * e + 1.0f : mass + e;
    } else {
      mass += pair_rules::map_value<FloatMath>(f, z);
    }
    best = z > best ? z : best;
    total += z;
    ++count;
  }

  template <bool kLse>
  FL_DEVICE void add(const Sums& o) {
    const float high = o.best > best ? o.best : best;
    if constexpr (kLse) {
      // sums of nothing, or of NaN alone, have no best
      const float shift = high == kNone ? 0.0f : high;
      mass = mass * expf(best - shift) + o.mass * expf(o.best - shift);
    } else {
      mass += o.mass;
    }
    best = high;
    total += o.total;
    count += o.count;
  }
};

// In the place of an array of arrays: nvcc 13.0 gives the members of all but the first row of one 0
// for their initial values.
template <int kCount>
struct SumsOf {
  Sums at[kCount];
  FL_DEVICE Sums& operator[](int i) { return at[i]; }
};

// The sum over a warp's lanes.
template <bool kLse>
FL_DEVICE Sums over_warp(Sums s) {
  for (int apart = kWarp / 2; apart > 0; apart /= 2) {
    Sums o;
    o.best = __shfl_xor_sync(kAllLanes, s.best, apart);
    o.mass = __shfl_xor_sync(kAllLanes, s.mass, apart);
    o.total = __shfl_xor_sync(kAllLanes, s.total, apart);
    o.count = __shfl_xor_sync(kAllLanes, s.count, apart);
    s.add<kLse>(o);
  }
  return s;
}

// Adds to the state of one row or column of a class, whose statistics lie 2 count apart.
template <bool kLse>
FL_DEVICE void merge_into(double* state, int64_t count, int k, int64_t i, const Sums& s) {
  if (s.count == 0) return;
  double* at = state + k * count + i;
  const int64_t step = kClasses * count;
  const double best = ld(at + kBest * step), mass = ld(at + kValue * step), fresh = s.best;
  const bool grew = fresh > best;
  double sum = mass + s.mass;
  if (kLse && fresh != best) {
    const double shrink = expf(static_cast<float>(grew ? best - fresh : fresh - best));
    sum = grew ? mass * shrink + s.mass : mass + s.mass * shrink;
  }
  st(at + kValue * step, sum);
  st(at + kTotal * step, ld(at + kTotal * step) + s.total);
  st(at + kCount * step, ld(at + kCount * step) + s.count);
  if (grew) st(at + kBest * step, fresh);
}

// By rows: the tile's sums of each row, into the state.
template <bool kLse>
FL_KERNEL(kThreads, 4)
pair_rows(StatisticsArguments a) {
  const Scoring scoring(a);
  const Reduction f = static_cast<Reduction>(a.reduction);
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const int64_t step = int64_t(gridDim.x) * kWarps * kRowsAtOnce;
  for (int64_t first = a.first_row + warp * kRowsAtOnce; first < a.row_end; first += step) {
    SumsOf<kClasses> sums[kRowsAtOnce];
    // a ragged last group goes along its last row again, which is not stored twice
    const auto row = [&](int r) { return first + r < a.row_end ? first + r : a.row_end - 1; };
    const OfRow x[kRowsAtOnce] = {OfRow(a, row(0)), OfRow(a, row(1))};
    const BothBounds bounds[kRowsAtOnce] = {BothBounds(a.x_window, row(0), a.n),
                                            BothBounds(a.x_window, row(1), a.n)};
    // with a triangle nothing stands left of the diagonal
    const int64_t left = a.triangle && first > a.first_column ? first - a.first_column : 0;
    for (int64_t j = a.first_column + left / kAcross * kAcross + lane * kWide; j < a.column_end;
         j += kAcross) {
      const OfColumns y(a, j);
      FL_UNROLL
      for (int r = 0; r < kRowsAtOnce; ++r) {
        const auto product =
            ld_pack(a.tile + (row(r) - a.first_row) * a.stride + j - a.first_column);
        for (int c = 0; c < kWide; ++c) {
          const int kind = class_of(a, product[c], row(r), x[r], j, y, c);
          const float s = scoring.score(product[c], x[r].bias, y.bias[c]);
          each_class([&](auto k) {
            if (kind != k || !bounds[r].of[k].holds(s)) return;
            sums[r][k].template add<kLse>(f, scoring.term<k>(s).z);
          });
        }
      }
    }
    FL_UNROLL
    for (int r = 0; r < kRowsAtOnce; ++r) {
      each_class([&](auto k) {
        const Sums all = over_warp<kLse>(sums[r][k]);
        if (lane == 0 && first + r < a.row_end) merge_into<kLse>(a.rows, a.n, k, first + r, all);
      });
    }
  }
}

struct ColumnSums {
  Sums of[kWarps][kClasses][kAcross];
};

// By columns: sums over a segment of rows, into `parts`.
template <bool kLse>
FL_KERNEL(kThreads)
pair_columns(StatisticsArguments a) {
  FL_SHARED(ColumnSums, shared);
  const Scoring scoring(a);
  const Reduction f = static_cast<Reduction>(a.reduction);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t width = a.column_end - a.first_column;
  const Cut cut(a);
  for (uint32_t work = blockIdx.x; work < cut.count(); work += gridDim.x) {
    const int64_t at = cut.column(work), segment = cut.segment(work);
    const int64_t j = a.first_column + at + lane * kWide, begin = a.first_row + segment * kSegment;
    const int64_t end = begin + kSegment < a.row_end ? begin + kSegment : a.row_end;
    SumsOf<kWide> sums[kClasses];
    if (j < a.column_end) {
      const OfColumns y(a, j);
      BothBounds bounds[kWide];
      for (int c = 0; c < kWide; ++c) {
        bounds[c] = BothBounds(a.y_window, j + c < a.column_end ? j + c : j, a.m);
      }
      for (int64_t i = begin + warp; i < end; i += kWarps) {
        if (a.triangle && i >= j + kWide - 1) break;
        const OfRow x(a, i);
        const auto product = ld_pack(a.tile + (i - a.first_row) * a.stride + j - a.first_column);
        for (int c = 0; c < kWide; ++c) {
          const int kind = class_of(a, product[c], i, x, j, y, c);
          const float s = scoring.score(product[c], x.bias, y.bias[c]);
          each_class([&](auto k) {
            if (kind != k || !bounds[c].of[k].holds(s)) return;
            sums[k][c].template add<kLse>(f, scoring.term<k>(s).z);
          });
        }
      }
    }
    each_class([&](auto k) {
      for (int c = 0; c < kWide; ++c) shared.of[warp][k][lane * kWide + c] = sums[k][c];
    });
    __syncthreads();
    // a thread a column now
    if (at + threadIdx.x < width) {
      for (int k = 0; k < kClasses; ++k) {
        Sums all = shared.of[0][k][threadIdx.x];
        for (int w = 1; w < kWarps; ++w) all.template add<kLse>(shared.of[w][k][threadIdx.x]);
        float* to = a.parts + (segment * kStatistics * kClasses + k) * width + at + threadIdx.x;
        st(to + kValue * kClasses * width, all.mass);
        st(to + kTotal * kClasses * width, all.total);
        st(to + kCount * kClasses * width, float(all.count));
        st(to + kBest * kClasses * width, all.best);
      }
    }
    __syncthreads();
  }
}

// The segments' sums of each column, in ascending order, into the state.
template <bool kLse>
FL_KERNEL(kThreads)
merge_columns(StatisticsArguments a) {
  const uint32_t width = a.column_end - a.first_column, all = kClasses * width;
  const Cut cut(a);
  for (uint32_t w = blockIdx.x * kThreads + threadIdx.x; w < all; w += gridDim.x * kThreads) {
    FL_ROLLED
    for (int64_t segment = 0; segment < cut.segments; ++segment) {
      const float* from = a.parts + segment * kStatistics * kClasses * width + w;
      Sums s;
      s.count = static_cast<int32_t>(ld(from + kCount * kClasses * width));
      s.mass = ld(from + kValue * kClasses * width);
      s.total = ld(from + kTotal * kClasses * width);
      s.best = ld(from + kBest * kClasses * width);
      merge_into<kLse>(a.columns, a.m, w / width, a.first_column + w % width, s);
    }
  }
}

// ---- gradients ---------------------------------------------------------------------------------

#define GRADIENT_FIELDS(F)                                                                    \
  PAIR_FIELDS(F)                                                                              \
  F(const float*, row_vectors)    /* [2, kVectors, n] */                                      \
  F(const float*, column_vectors) /* [2, kVectors, m], or null: columns have no statistics */ \
  F(void*, ds)                    /* [rows, ds_stride] G; may be the tile */                  \
  F(int64_t, ds_stride)           /* a multiple of kWide */                                   \
  F(int32_t, type)                /* of G */
FL_ARGUMENTS(GradientArguments, GRADIENT_FIELDS)

template <class T>
FL_DEVICE void store_as(void* tile, int64_t at, const float* v) {
  Pack<T, kWide> out;
  for (int c = 0; c < kWide; ++c) out[c] = from_float<T>(v[c]);
  st(reinterpret_cast<Pack<T, kWide>*>(static_cast<T*>(tile) + at), out);
}

// The type differs between launches alone: a kernel for each would differ in this store alone.
FL_DEVICE void store_row(int32_t type, void* tile, int64_t at, const float* v) {
  if (type == kTypeFloat) {
    store_as<float>(tile, at, v);
  } else if (type == kTypeBf16) {
    store_as<Bf16>(tile, at, v);
  } else {
    store_as<Half>(tile, at, v);
  }
}

// By columns: f(first column, first row, end row) of a thread, its rows kWarps apart.
template <class A, class F>
FL_DEVICE void down_columns(const A& a, F&& f) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Cut cut(a);
  for (uint32_t work = blockIdx.x; work < cut.count(); work += gridDim.x) {
    const int64_t j = a.first_column + cut.column(work) + lane * kWide;
    const int64_t begin = a.first_row + cut.segment(work) * kSegment;
    const int64_t end = begin + kSegment < a.row_end ? begin + kSegment : a.row_end;
    if (j < a.column_end) f(j, begin + warp, end);
  }
}

// A tile of G = dL/du.
FL_KERNEL(kThreads)
pair_gradients(GradientArguments a) {
  const Scoring scoring(a);
  const Reduction f = static_cast<Reduction>(a.reduction);
  const int classes = a.x_labels ? kClasses : 1;
  down_columns(a, [&](int64_t j, int64_t begin, int64_t end) {
    const OfColumns y(a, j);
    BothBounds bounds[kWide];
    for (int c = 0; c < kWide; ++c) {
      bounds[c] = BothBounds(a.y_window, j + c < a.column_end ? j + c : j, a.m);
    }
    Pack<float, kWide> of_column[kClasses][kVectors] = {};
    each_class([&](auto k) {
      if (!a.column_vectors || (k == kPositive && classes == 1)) return;
      for (int v = 0; v < kVectors; ++v) {
        of_column[k][v] = neighbours(a.column_vectors + (k * kVectors + v) * a.m, j, a.column_end);
      }
    });
    for (int64_t i = begin; i < end; i += kWarps) {
      const int64_t row = i - a.first_row, column = j - a.first_column;
      float g[kWide] = {};
      if (!a.triangle || i < j + kWide - 1) {
        const OfRow x(a, i);
        const BothBounds own(a.x_window, i, a.n);
        const auto product = ld_pack(a.tile + row * a.stride + column);
        each_class([&](auto k) {
          if (k == kPositive && classes == 1) return;
          float of_row[kVectors];
          for (int v = 0; v < kVectors; ++v) {
            of_row[v] = ld(a.row_vectors + (k * kVectors + v) * a.n + i);
          }
          for (int c = 0; c < kWide; ++c) {
            if (class_of(a, product[c], i, x, j, y, c) != k) continue;
            const float s = scoring.score(product[c], x.bias, y.bias[c]);
            const auto term = scoring.term<k>(s);
            if (term.z == kNone) continue;
            float through = 0;
            if (own.of[k].holds(s)) {
              through = pair_rules::side_slope<FloatMath>(f, term.z, of_row[0], of_row[1],
                                                          of_row[2], of_row[3]);
            }
            if (a.column_vectors && bounds[c].of[k].holds(s)) {
              const auto& v = of_column[k];
              through +=
                  pair_rules::side_slope<FloatMath>(f, term.z, v[0][c], v[1][c], v[2][c], v[3][c]);
            }
            g[c] = through * term.slope;
          }
        });
      }
      store_row(a.type, a.ds, row * a.ds_stride + column, g);
    }
  });
}

// ---- attention ---------------------------------------------------------------------------------

#define ATTENTION_FIELDS(F)                                                                 \
  PAIR_FIELDS(F)                                                                            \
  F(int32_t, kind) /* the class of the pairs that are attended to */                        \
  F(float*, best)  /* [n] the largest z so far */                                           \
  F(double*, mass) /* [n] sum exp(z - best) so far */                                       \
  F(float*, out)   /* [n, width] sum exp(z - best) values so far, dense */                  \
  F(int64_t, width)                                                                         \
  F(void*, weights)         /* [rows, weight_stride] unit exp(z - best); may be the tile */ \
  F(int64_t, weight_stride) /* a multiple of kWide */                                       \
  F(float, unit) F(int32_t, type)
FL_ARGUMENTS(AttentionArguments, ATTENTION_FIELDS)

// z of the class that is attended to, -inf for the other pairs.
template <class A>
FL_DEVICE pair_rules::Term<FloatMath> attended(const A& a, const Scoring& scoring, float product,
                                               int64_t i, const OfRow& x, const Bounds& bounds,
                                               int64_t j, const OfColumns& y, int c) {
  const float s = scoring.score(product, x.bias, y.bias[c]);
  // both classes have the rule of the one
  auto term = scoring.term<kNegative>(s);
  const bool member = class_of(a, product, i, x, j, y, c) == a.kind;
  if (!member || !bounds.holds(s)) term.z = kNone;
  return term;
}

// By rows: weights under a running maximum; where it grows, the output so far shrinks.
FL_KERNEL(kThreads)
pair_attention(AttentionArguments a) {
  const Scoring scoring(a);
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t i = a.first_row + warp; i < a.row_end; i += int64_t(gridDim.x) * kWarps) {
    const OfRow x(a, i);
    const Bounds bounds(a.x_window, a.kind, i, a.n);
    const float* products = a.tile + (i - a.first_row) * a.stride - a.first_column;
    float high = kNone;
    for (int64_t j = a.first_column + lane * kWide; j < a.column_end; j += kAcross) {
      const OfColumns y(a, j);
      const auto product = ld_pack(products + j);
      for (int c = 0; c < kWide; ++c) {
        const float z = attended(a, scoring, product[c], i, x, bounds, j, y, c).z;
        high = z > high ? z : high;
      }
    }
    high = warp_max(high);
    const float before = ld(a.best + i);
    high = before > high ? before : high;
    const float shift = high == kNone ? 0.0f : high;
    float mass = 0;
    for (int64_t j = a.first_column + lane * kWide; j < a.column_end; j += kAcross) {
      const OfColumns y(a, j);
      const auto product = ld_pack(products + j);
      float weight[kWide];
      for (int c = 0; c < kWide; ++c) {
        weight[c] = expf(attended(a, scoring, product[c], i, x, bounds, j, y, c).z - shift);
        mass += weight[c];
        weight[c] *= a.unit;
      }
      store_row(a.type, a.weights, (i - a.first_row) * a.weight_stride + j - a.first_column,
                weight);
    }
    mass = warp_sum(mass);
    const double old = ld(a.mass + i);
    // no lane may write the state that another has yet to read
    __syncwarp();
    const float shrink = expf(before - shift);
    if (lane == 0) {
      st(a.best + i, high);
      st(a.mass + i, old * shrink + mass);
    }
    if (old == 0 || shrink == 1.0f) continue;
    for (int64_t e = lane; e < a.width; e += kWarp) {
      float* at = a.out + i * a.width + e;
      st(at, ld(at) * shrink);
    }
  }
}

#define ATTENTION_GRADIENT_FIELDS(F)                                                        \
  PAIR_FIELDS(F)                                                                            \
  F(int32_t, kind)                                                                          \
  F(const float*, base)  /* [2, n] lse rounded, and exp(that - lse) */                      \
  F(const float*, shift) /* [n] grad_lse - <grad_out, out> */                               \
  F(const float*, into)  /* [rows, stride] <grad_out, values>, or null: no G */             \
  F(void*, weights)      /* [rows, low_stride] unit softmax(z), or null; may be the tile */ \
  F(void*, ds)           /* [rows, low_stride] G, or null; may be `into` */                 \
  F(int64_t, low_stride) /* a multiple of kWide */                                          \
  F(float, unit) F(int32_t, type)
FL_ARGUMENTS(AttentionGradientArguments, ATTENTION_GRADIENT_FIELDS)

// By columns: a tile of the weights and of G.
FL_KERNEL(kThreads)
pair_attention_gradients(AttentionGradientArguments a) {
  const Scoring scoring(a);
  down_columns(a, [&](int64_t j, int64_t begin, int64_t end) {
    const OfColumns y(a, j);
    for (int64_t i = begin; i < end; i += kWarps) {
      const OfRow x(a, i);
      const Bounds bounds(a.x_window, a.kind, i, a.n);
      const int64_t row = i - a.first_row, column = j - a.first_column;
      const auto product = ld_pack(a.tile + row * a.stride + column);
      Pack<float, kWide> through = {};
      if (a.into) through = ld_pack(a.into + row * a.stride + column);
      const float base = ld(a.base + i), rest = ld(a.base + a.n + i), shift = ld(a.shift + i);
      float weight[kWide], g[kWide];
      for (int c = 0; c < kWide; ++c) {
        const auto term = attended(a, scoring, product[c], i, x, bounds, j, y, c);
        const bool member = term.z != kNone;
        const float p = member ? expf(term.z - base) * rest : 0.0f;
        weight[c] = p * a.unit;
        g[c] = member ? p * term.slope * (through[c] + shift) : 0.0f;
      }
      if (a.weights) store_row(a.type, a.weights, row * a.low_stride + column, weight);
      if (a.ds) store_row(a.type, a.ds, row * a.low_stride + column, g);
    }
  });
}

// ---- launches ----------------------------------------------------------------------------------

inline int64_t blocks_for(int64_t work) { return grid_of(work, 8); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
int64_t row_blocks(const A& a, int rows) {
  return blocks_for(ceil_div(a.row_end - a.first_row, rows * kWarps));
}

template <class A>
int64_t column_blocks(const A& a) {
  return blocks_for(Cut(a).count());
}

int run_exclude(const ExcludeArguments& a, Stream stream) {
  const int64_t count = (a.row_end - a.first_row) * a.excluded;
  return launch(exclude_pairs, blocks_for(ceil_div(count, kThreads)), kThreads, 0, stream, a);
}

template <bool kLse>
int statistics(const StatisticsArguments& a, Stream stream) {
  int error = launch(pair_rows<kLse>, row_blocks(a, kRowsAtOnce), kThreads, 0, stream, a);
  if (error || !a.columns) return error;
  error = launch(pair_columns<kLse>, column_blocks(a), kThreads, 0, stream, a);
  if (error) return error;
  const int64_t each = kClasses * (a.column_end - a.first_column);
  return launch(merge_columns<kLse>, blocks_for(ceil_div(each, kThreads)), kThreads, 0, stream, a);
}

int run_statistics(const StatisticsArguments& a, Stream stream) {
  const bool lse = static_cast<Reduction>(a.reduction) == Reduction::kLse;
  return lse ? statistics<true>(a, stream) : statistics<false>(a, stream);
}

int run_gradients(const GradientArguments& a, Stream stream) {
  return launch(pair_gradients, column_blocks(a), kThreads, 0, stream, a);
}

int run_attention(const AttentionArguments& a, Stream stream) {
  return launch(pair_attention, row_blocks(a, 1), kThreads, 0, stream, a);
}

int run_attention_gradients(const AttentionGradientArguments& a, Stream stream) {
  return launch(pair_attention_gradients, column_blocks(a), kThreads, 0, stream, a);
}

FL_EXPORT(pair_exclude, ExcludeArguments, EXCLUDE_FIELDS, run_exclude)
FL_EXPORT(pair_statistics, StatisticsArguments, STATISTICS_FIELDS, run_statistics)
FL_EXPORT(pair_gradients, GradientArguments, GRADIENT_FIELDS, run_gradients)
FL_EXPORT(pair_attention, AttentionArguments, ATTENTION_FIELDS, run_attention)
FL_EXPORT(pair_attention_gradients, AttentionGradientArguments, ATTENTION_GRADIENT_FIELDS,
          run_attention_gradients)

}  // namespace fused_losses::cuda::pairs
