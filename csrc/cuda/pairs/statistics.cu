// Sums over the pairs of each row and column by class, and the state that tiles add to.
#include "scoring.h"

namespace fused_losses::cuda::pairs {

constexpr int kRowsAtOnce = 2;  // of a warp that goes along rows

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

FL_EXPORT(pair_statistics, StatisticsArguments, STATISTICS_FIELDS, run_statistics)

}  // namespace fused_losses::cuda::pairs
