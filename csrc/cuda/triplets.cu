// All triplets of a row of scores, by counting: csrc/triplets.h, one block a row.
//
// Positives come to shared memory, sorted by score; every negative finds by two searches the run
// of positives that it violates, and running sums give the run's sum. More positives than fit are
// taken in parts: each triplet has one positive, so parts add up. Atomics are of integers only.
#include "../triplets.h"
#include "warp.h"

namespace fused_losses::cuda::triplets {

constexpr int kPart = 1024;  // positives at a time, a power of two
constexpr int kMostThreads = 256;
constexpr int kNeighbours = 4;  // columns of a thread at a time

#define TRIPLET_FIELDS(F)                                                    \
  F(const float*, score)   /* [rows, columns] */                             \
  F(const void*, positive) /* [rows, columns] bool, and disjoint from it: */ \
  F(const void*, negative)                                                   \
  F(const float*, grad)  /* [rows] with a stride; null: forward */           \
  F(double*, statistics) /* [rows, 2]; forward */                            \
  F(float*, slope)       /* [rows, columns]; backward */                     \
  F(int64_t, rows)                                                           \
  F(int64_t, columns)                                                        \
  F(int64_t, grad_stride)                                                    \
  F(float, margin)                                                           \
  F(int32_t, kind) /* of Triplet */
FL_ARGUMENTS(TripletArguments, TRIPLET_FIELDS)

struct TripletShared {
  double before[kPart + 1];  // sums of the first reaches
  double sums[kMostThreads / kWarp];
  int64_t numbers[kMostThreads / kWarp];
  float near[kPart];         // the positives' scores, increasing
  int32_t at[kPart];         // their columns
  int32_t count[kPart + 1];  // of their triplets, as differences
  int32_t ranks[2][kMostThreads / kWarp];
};

// A thread's share of a tile of a row's columns.
struct Columns {
  float score[kNeighbours];
  bool positive[kNeighbours], negative[kNeighbours];
};

struct TripletRow {
  const float* score;
  const uint8_t *positive, *negative;
  float* slope;
  int columns;
  bool packed;  // four neighbours a thread, else neighbours a thread each

  FL_DEVICE TripletRow(const TripletArguments& a, int64_t i)
      : score(a.score + i * a.columns),
        positive(static_cast<const uint8_t*>(a.positive) + i * a.columns),
        negative(static_cast<const uint8_t*>(a.negative) + i * a.columns),
        slope(a.slope + (a.slope ? i * a.columns : 0)),
        columns(static_cast<int>(a.columns)) {
    packed = packs(a.score, a.columns) && reinterpret_cast<uintptr_t>(a.positive) % 4 == 0 &&
             reinterpret_cast<uintptr_t>(a.negative) % 4 == 0;
  }

  FL_DEVICE int step() const { return blockDim.x * kNeighbours; }
  FL_DEVICE int column(int tile, int u) const {
    return packed ? tile + threadIdx.x * kNeighbours + u : tile + u * blockDim.x + threadIdx.x;
  }

  FL_DEVICE Columns read(int tile) const {
    Columns c = {};
    if (packed) {
      const int j = column(tile, 0);
      if (j >= columns) return c;
      const auto scores = ld_pack(score + j);
      const uint32_t in = ld(reinterpret_cast<const uint32_t*>(positive + j));
      const uint32_t out = ld(reinterpret_cast<const uint32_t*>(negative + j));
      FL_UNROLL
      for (int u = 0; u < kNeighbours; ++u) {
        c.score[u] = scores[u];
        c.positive[u] = in >> 8 * u & 1;
        c.negative[u] = out >> 8 * u & 1;
      }
      return c;
    }
    FL_UNROLL
    for (int u = 0; u < kNeighbours; ++u) {
      const int j = column(tile, u);
      if (j >= columns) continue;
      c.score[u] = ld(score + j);
      c.positive[u] = ld(positive + j);
      c.negative[u] = ld(negative + j);
    }
    return c;
  }

  FL_DEVICE Pack<float, kNeighbours> read_slope(int tile) const {
    Pack<float, kNeighbours> v = {};
    if (packed) return column(tile, 0) < columns ? ld_pack(slope + column(tile, 0)) : v;
    FL_UNROLL
    for (int u = 0; u < kNeighbours; ++u) {
      if (column(tile, u) < columns) v[u] = ld(slope + column(tile, u));
    }
    return v;
  }

  FL_DEVICE void write_slope(int tile, const Pack<float, kNeighbours>& v) const {
    if (packed) {
      if (column(tile, 0) < columns) st_pack(slope + column(tile, 0), v);
      return;
    }
    FL_UNROLL
    for (int u = 0; u < kNeighbours; ++u) {
      if (column(tile, u) < columns) st(slope + column(tile, u), v[u]);
    }
  }
};

// The sum over the threads before this one; `all`: over every thread. One barrier; `scratch` is
// free after the next one.
template <class T>
FL_DEVICE T sum_before(T v, T* scratch, T& all) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  T up_to = v;
  for (int apart = 1; apart < kWarp; apart *= 2) {
    const T left = __shfl_up_sync(kAllLanes, up_to, apart);
    if (lane >= apart) up_to += left;
  }
  if (lane == kWarp - 1) scratch[warp] = up_to;
  __syncthreads();
  T before = 0;
  all = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before = all;
    all += scratch[w];
  }
  // and not up_to - v: that may be inf - inf
  const T left = __shfl_up_sync(kAllLanes, up_to, 1);
  return lane > 0 ? before + left : before;
}

// How many of n increasing values + shift are < v (or <= v).
template <bool kEqual>
FL_DEVICE int how_many(const float* values, int n, float shift, float v) {
  int first = 0, count = n;
  while (count > 0) {
    const int half = count / 2;
    const float middle = values[first + half] + shift;
    const bool over = kEqual ? middle <= v : middle < v;
    first = over ? first + half + 1 : first;
    count = over ? count - half - 1 : half;
  }
  return first;
}

// The n positives by score, equal ones by column: the same order in every run.
FL_DEVICE void sort_positives(TripletShared& s, int n) {
  int padded = 1;
  while (padded < n) padded *= 2;
  for (int k = n + threadIdx.x; k < padded; k += blockDim.x) {
    s.near[k] = INFINITY;
    s.at[k] = INT32_MAX;
  }
  __syncthreads();
  for (int size = 2; size <= padded; size *= 2) {
    for (int apart = size / 2; apart > 0; apart /= 2) {
      for (int k = threadIdx.x; k < padded / 2; k += blockDim.x) {
        const int low = 2 * k - (k & (apart - 1)), high = low + apart;
        const float a = s.near[low], b = s.near[high];
        const int32_t i = s.at[low], j = s.at[high];
        const bool later = a > b || (a == b && i > j);
        if (later == ((low & size) == 0)) {
          s.near[low] = b, s.near[high] = a;
          s.at[low] = j, s.at[high] = i;
        }
      }
      // one warp sorts what it has lanes for
      if (padded <= 2 * kWarp) {
        __syncwarp();
      } else {
        __syncthreads();
      }
    }
  }
  __syncthreads();
}

// The run of positives [from, to) that a negative at this score violates.
struct Run {
  int from, to;
};

FL_DEVICE Run violated(const TripletShared& s, int n, float far, float margin, Triplet kind) {
  // positives in order of score: those that reach beyond `far` come last
  Run run = {how_many<true>(s.near, n, margin, far), n};
  if (kind != Triplet::kAll && run.from < n) {
    const int nearer = how_many<false>(s.near, n, 0, far);
    if (kind == Triplet::kHard) {
      run.from = run.from > nearer ? run.from : nearer;
    } else {
      run.to = run.from > nearer ? run.from : nearer;
    }
  }
  return run;
}

template <bool kSlopes>
FL_KERNEL(kMostThreads)
triplets(TripletArguments a) {
  FL_SHARED(TripletShared, s);
  const Triplet kind = static_cast<Triplet>(a.kind);
  for (int64_t i = blockIdx.x; i < a.rows; i += gridDim.x) {
    const TripletRow row(a, i);
    const int step = row.step();
    int tile_of_next = 0, found_by_then = 0;  // where reading positives goes on
    int positives = 0;
    int64_t number = 0;
    bool broken = false;  // a NaN among the pairs of a row that has triplets
    double total = 0;
    for (int part = 0; part == 0 || part < positives; part += kPart) {
      // this part's positives; the first time everything is looked at
      bool has_nan = false, has_negative = false, more = false;
      int found = found_by_then, turn = 0;
      for (int tile = tile_of_next; tile < row.columns; tile += step, turn ^= 1) {
        const Columns c = row.read(tile);
        int mine = 0, all;
        FL_UNROLL
        for (int u = 0; u < kNeighbours; ++u) {
          mine += c.positive[u];
          has_negative |= c.negative[u];
          has_nan |= (c.positive[u] || c.negative[u]) && c.score[u] != c.score[u];
        }
        int slot = found + sum_before(mine, s.ranks[turn], all) - part;
        FL_UNROLL
        for (int u = 0; u < kNeighbours; ++u) {
          if (!c.positive[u]) continue;
          if (slot >= 0 && slot < kPart) {
            s.near[slot] = c.score[u];
            s.at[slot] = row.column(tile, u);
          }
          ++slot;
        }
        if (!more && found + all > part + kPart) {
          more = true;
          tile_of_next = tile;
          found_by_then = found;
        }
        found += all;
        if (part > 0 && more) break;
      }
      if (part == 0) {
        // without negatives there is nothing to sort, and a NaN would not be sorted
        positives = __syncthreads_or(has_negative) ? found : 0;
        broken = __syncthreads_or(has_nan) && positives > 0;
        if (broken) break;
      }
      const int n = positives - part < kPart ? positives - part : kPart;
      const bool last = part + kPart >= positives;
      sort_positives(s, n);

      const int piece = (n + blockDim.x - 1) / blockDim.x;
      const int from = threadIdx.x * piece, to = from + piece < n ? from + piece : n;
      if constexpr (kSlopes) {
        for (int k = threadIdx.x; k < n; k += blockDim.x) s.count[k] = 0;
      } else {
        double sum = 0, all;
        // a positive at -inf is never violated by less than NaN
        const auto reach = [&](int k) { return s.near[k] == -INFINITY ? 0 : s.near[k] + a.margin; };
        for (int k = from; k < to; ++k) sum += reach(k);
        sum = sum_before(sum, s.sums, all);
        for (int k = from; k < to; ++k) {
          s.before[k] = sum;
          sum += reach(k);
        }
        if (threadIdx.x == 0) s.before[n] = all;
      }
      __syncthreads();

      int of_all = 0;  // negatives that violate every positive
      const float grad = kSlopes ? ld(a.grad + i * a.grad_stride) : 0;
      for (int tile = 0; tile < row.columns; tile += step) {
        const Columns c = row.read(tile);
        Pack<float, kNeighbours> slope = {};
        if (kSlopes && part > 0) slope = row.read_slope(tile);
        FL_UNROLL
        for (int u = 0; u < kNeighbours; ++u) {
          if (!c.negative[u] || !(c.score[u] < INFINITY)) continue;
          const Run run = violated(s, n, c.score[u], a.margin, kind);
          const int count = run.to - run.from;
          if (count == 0) continue;
          if constexpr (kSlopes) {
            slope[u] -= count;
            // most negatives begin at the first positive and end after the last: no conflicts there
            if (run.from == 0) {
              ++of_all;
            } else {
              atomicAdd(&s.count[run.from], 1);
            }
            if (run.to < n) atomicAdd(&s.count[run.to], -1);
          } else {
            total += s.before[run.to] - s.before[run.from] - count * double(c.score[u]);
            number += count;
          }
        }
        if constexpr (kSlopes) {
          for (int u = 0; u < kNeighbours; ++u) slope[u] *= last ? grad : 1;
          row.write_slope(tile, slope);
        }
      }
      if constexpr (kSlopes) {
        if (of_all > 0) atomicAdd(&s.count[0], of_all);
        __syncthreads();
        int count = 0, all;
        for (int k = from; k < to; ++k) count += s.count[k];
        count = sum_before(count, s.ranks[0], all);
        for (int k = from; k < to; ++k) {
          count += s.count[k];
          st(row.slope + s.at[k], last ? count * grad : static_cast<float>(count));
        }
      }
      __syncthreads();
    }
    if constexpr (kSlopes) {
      for (int tile = 0; broken && tile < row.columns; tile += step) {
        const Columns c = row.read(tile);
        Pack<float, kNeighbours> slope = {};
        FL_UNROLL
        for (int u = 0; u < kNeighbours; ++u) {
          if (c.positive[u] || c.negative[u]) slope[u] = NAN;
        }
        row.write_slope(tile, slope);
      }
    } else {
      total = block_sum(total, s.sums);
      number = block_sum(number, s.numbers);
      if (threadIdx.x == 0) {
        st(a.statistics + 2 * i, broken ? double(NAN) : total);
        st(a.statistics + 2 * i + 1, double(number));
      }
    }
  }
}

int run_triplets(const TripletArguments& a, Stream stream) {
  const int64_t blocks = grid_of(a.rows, 8);
  const int64_t warps = (a.columns + kNeighbours * kWarp - 1) / (kNeighbours * kWarp);
  const int64_t threads = warps < 1 ? kWarp : warps * kWarp;
  const auto kernel = a.grad ? triplets<true> : triplets<false>;
  return launch(kernel, blocks, threads < kMostThreads ? threads : kMostThreads, 0, stream, a);
}
FL_EXPORT(triplets, TripletArguments, TRIPLET_FIELDS, run_triplets)

}  // namespace fused_losses::cuda::triplets
