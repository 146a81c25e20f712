// The epilogues of `row_statistics` on a tile of products <x_i, w_j>, which a library has put into
// L2 (backends/cuda.py):
//   score_rows     the tile's max, sum of exp, argmax and weighted sum merged into each row's state
//   finish_rows    the state of all tiles as lse, hardest, ..; the target's score
//   gradient_rows  the tile replaced by G / |w_j|, in place, also where G has 16 bits
//   column_sums    sums of G over rows, for the bias
//   finish_bias    those sums as the gradient of the bias
//   finish_weight  G^T x as the gradient of W: projection, scatter to rows `classes`, cast
// ../row_statistics.h has the formulas.
#include "rows.h"
#include "warp.h"

namespace fused_losses::cuda::row_statistics {

constexpr float kLog2E = 1.4426950408889634f;
constexpr int32_t kNowhere = 0x7fffffff;
constexpr int kFour = 4;

FL_DEVICE float negative_infinity() { return -__int_as_float(0x7f800000); }

// exp(z - from); from = -inf stands for rows without any other score.
FL_DEVICE float exp_from(float z, float from) { return exp2f((z - from) * kLog2E); }

// What a row's products become before the bias is added: z up to t, p + q z + r z^2 above it.
template <bool kBent>
struct Bend {
  Pack<float, kFour> tpqr = {};

  // `bends`: [rows, 4], 16-byte aligned.
  FL_DEVICE Bend(const void* bends, int64_t row) {
    if constexpr (kBent) {
      tpqr = ld_pack(static_cast<const float*>(bends) + kFour * row);
    }
  }

  FL_DEVICE float value(float z) const {
    return kBent && z > tpqr[0] ? tpqr[1] + (tpqr[2] + tpqr[3] * z) * z : z;
  }

  FL_DEVICE float slope(float z) const {
    return kBent && z > tpqr[0] ? tpqr[2] + 2 * tpqr[3] * z : 1;
  }
};

// What makes a product a score, of the tile's columns; any may be null.
struct Columns {
  const float* inverse;  // 1/|w_j|
  const float* bias;
  const float* weight;  // v_j; null: 1
  int64_t length;

  // Columns j .. j+3 of one of them; `fill` past the last, or where it is null.
  FL_DEVICE Pack<float, kFour> at(const float* p, int64_t j, float fill) const {
    if (p != nullptr && packs(p, 0) && j + kFour <= length) return ld_pack(p + j);
    Pack<float, kFour> out;
    for (int k = 0; k < kFour; ++k) {
      out[k] = p != nullptr && j + k < length ? ld(p + j + k) : fill;
    }
    return out;
  }

  // The products at columns j .. j+3 over |w_j|; j is a multiple of 4.
  FL_DEVICE Pack<float, kFour> scaled(Pack<float, kFour> z, int64_t j) const {
    if (inverse != nullptr) {
      const Pack<float, kFour> scale = at(inverse, j, 0);
      for (int k = 0; k < kFour; ++k) z[k] *= scale[k];
    }
    return z;
  }

  // Scores of those.
  template <bool kBent>
  FL_DEVICE Pack<float, kFour> scores(Pack<float, kFour> z, int64_t j,
                                      const Bend<kBent>& bend) const {
    for (int k = 0; k < kFour; ++k) z[k] = bend.value(z[k]);
    if (bias != nullptr) {
      const Pack<float, kFour> shift = at(bias, j, 0);
      for (int k = 0; k < kFour; ++k) z[k] += shift[k];
    }
    return z;
  }
};

// ---- forward -----------------------------------------------------------------------------------

#define SCORE_FIELDS(F)         \
  F(const void*, products)      \
  F(const void*, inverse)       \
  F(const void*, bias)          \
  F(const void*, column_weight) \
  F(const void*, bend)          \
  F(const int32_t*, positions)  \
  F(void*, high)                \
  F(void*, mass)                \
  F(void*, best)                \
  F(void*, moment)              \
  F(int64_t, stride)            \
  F(int64_t, rows)              \
  F(int64_t, length)            \
  F(int64_t, first)             \
  F(int64_t, parts)             \
  F(int64_t, state_stride)

// products [rows, stride], 16-byte aligned, stride a multiple of 4; inverse, bias, column_weight
// [length]; bend float [rows, 4], 16-byte aligned, or null; positions [rows], among all columns, of
// which the tile's first is `first`. The state: high float, mass double, best int32, moment double
// or null, [parts, state_stride] each; the tile with first = 0 starts it.
FL_ARGUMENTS(ScoreArguments, SCORE_FIELDS)

// A warp a row and part of the columns.
template <bool kBent>
FL_KERNEL(256)
score_rows(ScoreArguments a) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const Columns columns = {static_cast<const float*>(a.inverse), static_cast<const float*>(a.bias),
                           static_cast<const float*>(a.column_weight), a.length};
  float* const highs = static_cast<float*>(a.high);
  double* const masses = static_cast<double*>(a.mass);
  int32_t* const bests = static_cast<int32_t*>(a.best);
  double* const moments = static_cast<double*>(a.moment);
  const int64_t width = round_up((a.length + a.parts - 1) / a.parts, kFour);
  for (int64_t item = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; item < a.rows * a.parts;
       item += int64_t(gridDim.x) * warps) {
    const int64_t row = item % a.rows, part = item / a.rows;
    const int64_t begin = part * width;
    const int64_t end = begin + width < a.length ? begin + width : a.length;
    const float* products = static_cast<const float*>(a.products) + row * a.stride;
    const int64_t target = ld(a.positions + row) - a.first;
    const Bend<kBent> bend(a.bend, row);
    // of this lane's columns: a few dozen a tile, so that float sums are as good as their terms
    float high = negative_infinity(), mass = 0, moment = 0;
    int32_t best = kNowhere;
    for (int64_t j = begin + lane * kFour; j < end; j += kWarp * kFour) {
      Pack<float, kFour> z = columns.scores(columns.scaled(ld_pack(products + j), j), j, bend);
      if (moments != nullptr) {
        const Pack<float, kFour> v = columns.at(columns.weight, j, 1);
        for (int k = 0; k < kFour; ++k) {
          if (j + k < end && j + k != target) moment += v[k] * z[k];
        }
      }
      float top = high;
      for (int k = 0; k < kFour; ++k) {
        if (j + k >= end || j + k == target) z[k] = negative_infinity();
        if (z[k] > top) {  // not for a NaN, which the mass carries
          top = z[k];
          best = int32_t(a.first + j + k);
        }
      }
      const float from = top == negative_infinity() ? 0 : top;
      mass *= exp_from(high, from);
      for (int k = 0; k < kFour; ++k) mass += exp_from(z[k], from);
      high = top;
    }
    const float top = warp_max(high);
    const float from = top == negative_infinity() ? 0 : top;
    const double total = warp_sum(double(mass) * exp_from(high, from));
    const int32_t where = warp_reduce(high == top ? best : kNowhere,
                                      [](int32_t b, int32_t c) { return b < c ? b : c; });
    const double sum = moments != nullptr ? warp_sum(double(moment)) : 0;
    if (lane != 0) continue;
    const int64_t at = part * a.state_stride + row;
    if (a.first == 0) {
      st(highs + at, top);
      st(masses + at, total);
      st(bests + at, where);
      if (moments != nullptr) st(moments + at, sum);
      continue;
    }
    const float old = ld(highs + at);
    if (top > old) {
      st(highs + at, top);
      st(bests + at, where);
    }
    const float highest = top > old ? top : old;
    const double base = highest == negative_infinity() ? 0 : highest;
    st(masses + at, ld(masses + at) * exp(old - base) + total * exp(top - base));
    if (moments != nullptr) st(moments + at, ld(moments + at) + sum);
  }
}

int run_scores(const ScoreArguments& a, Stream stream) {
  const auto kernel = a.bend != nullptr ? score_rows<true> : score_rows<false>;
  return launch(kernel, blocks_of_warps(a.rows * a.parts, 256), 256, 0, stream, a);
}

FL_EXPORT(row_scores, ScoreArguments, SCORE_FIELDS, run_scores)

#define FINISH_FIELDS(F)       \
  F(const void*, x)            \
  F(const void*, weight)       \
  F(const int32_t*, positions) \
  F(const int64_t*, classes)   \
  F(const void*, high)         \
  F(const void*, mass)         \
  F(const void*, best)         \
  F(const void*, moment)       \
  F(void*, lse)                \
  F(void*, target)             \
  F(void*, weighted)           \
  F(void*, hardest)            \
  F(void*, hardest_score)      \
  F(int64_t, stride_x)         \
  F(int64_t, stride_w)         \
  F(int64_t, n)                \
  F(int64_t, d)                \
  F(int64_t, parts)            \
  F(int32_t, type)             \
  F(bool, normalize)

// x [n, d], weight [*, d]; the state [parts, n], at most 32 parts. lse, target double; weighted
// (null without moment), hardest_score float; hardest int64; [n] each
FL_ARGUMENTS(FinishArguments, FINISH_FIELDS)

// <x, w>, over |w| if asked, summed in double: lse - target is what an exponential follows. A warp.
template <class T>
FL_DEVICE double target_score(const T* x, const T* w, int64_t d, bool wide, bool normalize) {
  const int lane = threadIdx.x % kWarp;
  const int64_t packed = wide ? d / kPack<T> * kPack<T> : 0;
  double dot = 0, square = 0;
  for (int64_t k = lane * kPack<T>; k < packed; k += kWarp * kPack<T>) {
    const Pack<T, kPack<T>> u = ld_pack(x + k), v = ld_pack(w + k);
    for (int i = 0; i < kPack<T>; ++i) {
      const double f = to_float(v[i]);
      dot += to_float(u[i]) * f;
      square += f * f;
    }
  }
  FL_ROLLED
  for (int64_t k = packed + lane; k < d; k += kWarp) {
    const double f = to_float(ld(w + k));
    dot += to_float(ld(x + k)) * f;
    square += f * f;
  }
  dot = warp_sum(dot);
  if (!normalize) return dot;
  const double norm = sqrt(warp_sum(square));
  return norm <= double(kZeroNorm) ? 0 : dot / norm;
}

// A warp a row.
template <class T>
FL_KERNEL(128)
finish_rows(FinishArguments a) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const T* const x = static_cast<const T*>(a.x);
  const T* const w = static_cast<const T*>(a.weight);
  const bool wide = packs(x, a.stride_x) && packs(w, a.stride_w);
  for (int64_t row = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; row < a.n;
       row += int64_t(gridDim.x) * warps) {
    const bool mine = lane < a.parts;
    const int64_t at = lane * a.n + row;
    const float high = mine ? ld(static_cast<const float*>(a.high) + at) : negative_infinity();
    const double mass = mine ? ld(static_cast<const double*>(a.mass) + at) : 0;
    const int32_t best = mine ? ld(static_cast<const int32_t*>(a.best) + at) : kNowhere;
    const float top = warp_max(high);
    const double base = top == negative_infinity() ? 0 : top;
    const double total = warp_sum(mass * exp(high - base));
    const int32_t where = warp_reduce(high == top ? best : kNowhere,
                                      [](int32_t b, int32_t c) { return b < c ? b : c; });
    if (a.moment != nullptr) {
      const double sum = warp_sum(mine ? ld(static_cast<const double*>(a.moment) + at) : 0);
      if (lane == 0) st(static_cast<float*>(a.weighted) + row, float(sum));
    }
    const int32_t position = ld(a.positions + row);
    double score = 0;
    if (position >= 0) {
      const int64_t id = a.classes ? ld(a.classes + position) : position;
      score = target_score(x + row * a.stride_x, w + id * a.stride_w, a.d, wide, a.normalize);
    }
    if (lane != 0) continue;
    st(static_cast<double*>(a.target) + row, score);
    // no score at all: log 0 = -inf; a NaN among the scores is in the mass and so in both outputs
    const double lse = total == 0 ? double(negative_infinity()) : base + log(total);
    st(static_cast<double*>(a.lse) + row, lse);
    st(static_cast<float*>(a.hardest_score) + row, total == total ? top : float(total));
    int64_t hardest = where == kNowhere ? -1 : where;
    if (hardest >= 0 && a.classes != nullptr) hardest = ld(a.classes + hardest);
    st(static_cast<int64_t*>(a.hardest) + row, hardest);
  }
}

int run_finish(const FinishArguments& a, Stream stream) {
  return with_float_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return launch(finish_rows<T>, blocks_of_warps(a.n, 128), 128, 0, stream, a);
  });
}

FL_EXPORT(row_finish, FinishArguments, FINISH_FIELDS, run_finish)

// ---- backward ----------------------------------------------------------------------------------

#define GRADIENT_FIELDS(F)      \
  F(void*, products)            \
  F(const void*, inverse)       \
  F(const void*, bias)          \
  F(const void*, column_weight) \
  F(const void*, bend)          \
  F(const int32_t*, positions)  \
  F(const void*, lse)           \
  F(const void*, grad_lse)      \
  F(const void*, grad_target)   \
  F(const void*, grad_weighted) \
  F(void*, sums)                \
  F(int64_t, stride)            \
  F(int64_t, rows)              \
  F(int64_t, length)            \
  F(int64_t, first)             \
  F(int64_t, rows_a_sum)        \
  F(int32_t, out_type)

// As of SCORE_FIELDS, stride a multiple of 8. lse, grad_* float [rows]; grad_weighted may be null.
// Where sums is not null: [rows / rows_a_sum, stride], each row over rows_a_sum rows of G.
FL_ARGUMENTS(GradientArguments, GRADIENT_FIELDS)

template <bool kBent>
struct RowGradient {
  float lse, by_lse, by_target, by_weighted;
  int64_t target;
  Bend<kBent> bend;

  FL_DEVICE RowGradient(const GradientArguments& a, int64_t row)
      : lse(ld(static_cast<const float*>(a.lse) + row)),
        by_lse(ld(static_cast<const float*>(a.grad_lse) + row)),
        by_target(ld(static_cast<const float*>(a.grad_target) + row)),
        by_weighted(a.grad_weighted ? ld(static_cast<const float*>(a.grad_weighted) + row) : 0),
        target(ld(a.positions + row) - a.first),
        bend(a.bend, row) {
    if (lse == negative_infinity()) lse = 0;  // no other class: nothing to share out
  }

  // The gradient of the scores at columns j .. j+3 from their products, or with `of_products` G,
  // the gradient of the products; by_target or 0 where the target is.
  FL_DEVICE Pack<float, kFour> at(const Columns& columns, const Pack<float, kFour>& products,
                                  int64_t j, bool weighted, bool of_products) const {
    const Pack<float, kFour> scaled = columns.scaled(products, j);
    Pack<float, kFour> g = columns.scores(scaled, j, bend);
    // a product may round to the other side of a bend than in the forward, where the score jumps
    for (int k = 0; k < kFour; ++k) {
      if (kBent && g[k] > lse) g[k] = lse;
      g[k] = by_lse * exp_from(g[k], lse);
    }
    if (weighted) {
      const Pack<float, kFour> v = columns.at(columns.weight, j, 1);
      for (int k = 0; k < kFour; ++k) g[k] += by_weighted * v[k];
    }
    if (kBent && of_products) {
      for (int k = 0; k < kFour; ++k) g[k] *= bend.slope(scaled[k]);
    }
    for (int k = 0; k < kFour; ++k) {
      if (j + k == target) g[k] = of_products ? by_target : 0;
    }
    return g;
  }
};

FL_DEVICE Columns columns_of(const GradientArguments& a) {
  return {static_cast<const float*>(a.inverse), static_cast<const float*>(a.bias),
          static_cast<const float*>(a.column_weight), a.length};
}

// A block a row. A 16-bit G is written behind what the block has read: its row takes the first half
// of the row of products.
template <class Out, bool kBent>
FL_KERNEL(256)
gradient_rows(GradientArguments a) {
  constexpr int kStep = kPack<Out>;
  const Columns columns = columns_of(a);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const RowGradient<kBent> gradient(a, row);
    float* const products = static_cast<float*>(a.products) + row * a.stride;
    Out* const out = reinterpret_cast<Out*>(products);
    for (int64_t start = 0; start < a.length; start += int64_t(blockDim.x) * kStep) {
      const int64_t j = start + threadIdx.x * kStep;
      Pack<Out, kStep> to = {};
      for (int i = 0; i < kStep && j + i < a.length; i += kFour) {
        Pack<float, kFour> g = gradient.at(columns, ld_pack(products + j + i), j + i,
                                           a.grad_weighted != nullptr, true);
        if (columns.inverse != nullptr) {
          const Pack<float, kFour> scale = columns.at(columns.inverse, j + i, 0);
          for (int k = 0; k < kFour; ++k) g[k] *= scale[k];
        }
        for (int k = 0; k < kFour; ++k) to[i + k] = from_float<Out>(g[k]);
      }
      if constexpr (sizeof(Out) < sizeof(float)) __syncthreads();
      if (j < a.length) st_pack(out + j, to);
    }
  }
}

// A thread owns four columns, a block a run of rows: sums in the order of the rows.
template <bool kBent>
FL_KERNEL(128)
column_sums(GradientArguments a) {
  const Columns columns = columns_of(a);
  const int64_t groups = (a.length + kFour * blockDim.x - 1) / (kFour * blockDim.x);
  const int64_t runs = (a.rows + a.rows_a_sum - 1) / a.rows_a_sum;
  for (int64_t item = blockIdx.x; item < groups * runs; item += gridDim.x) {
    const int64_t j = (item % groups * blockDim.x + threadIdx.x) * kFour, run = item / groups;
    if (j >= a.length) continue;
    const int64_t begin = run * a.rows_a_sum;
    const int64_t end = begin + a.rows_a_sum < a.rows ? begin + a.rows_a_sum : a.rows;
    Pack<float, kFour> total = {};
    for (int64_t row = begin; row < end; ++row) {
      const float* products = static_cast<const float*>(a.products) + row * a.stride;
      const Pack<float, kFour> g = RowGradient<kBent>(a, row).at(columns, ld_pack(products + j), j,
                                                                 a.grad_weighted != nullptr, false);
      for (int k = 0; k < kFour; ++k) total[k] += g[k];
    }
    st_pack(static_cast<float*>(a.sums) + run * a.stride + j, total);
  }
}

int run_gradient(const GradientArguments& a, Stream stream) {
  if (a.sums != nullptr) {
    const int64_t groups = (a.length + 511) / 512;
    const int64_t blocks = groups * ((a.rows + a.rows_a_sum - 1) / a.rows_a_sum);
    const auto kernel = a.bend != nullptr ? column_sums<true> : column_sums<false>;
    const int error = launch(kernel, grid_of(blocks, 32), 128, 0, stream, a);
    if (error != 0) return error;
  }
  return with_float_type(a.out_type, [&](auto zero) {
    using T = decltype(zero);
    // as many threads as the row has packs, so that a narrow tile leaves few idle
    const int64_t wanted = round_up((a.length + kPack<T> - 1) / kPack<T>, kWarp);
    const int threads = wanted < 256 ? static_cast<int>(wanted) : 256;
    const auto kernel = a.bend != nullptr ? gradient_rows<T, true> : gradient_rows<T, false>;
    return launch(kernel, grid_of(a.rows, 32), threads, 0, stream, a);
  });
}

FL_EXPORT(row_gradient, GradientArguments, GRADIENT_FIELDS, run_gradient)

#define WEIGHT_FIELDS(F)     \
  F(const void*, gradient)   \
  F(const void*, weight)     \
  F(const void*, inverse)    \
  F(const int64_t*, classes) \
  F(const void*, sums)       \
  F(const void*, unscale)    \
  F(void*, dweight)          \
  F(void*, dbias)            \
  F(int64_t, stride_w)       \
  F(int64_t, stride_dw)      \
  F(int64_t, stride_sums)    \
  F(int64_t, first)          \
  F(int64_t, count)          \
  F(int64_t, d)              \
  F(int64_t, runs)           \
  F(int32_t, type)           \
  F(bool, compact)

// gradient float [count, d], already over |w_j|, or null; weight [*, d]; inverse [count] or null
// without projection; classes [count] of this tile, or null for first ..; sums float [runs,
// stride_sums] or null; unscale [1] or null. dweight [*, d] and dbias float [*] are written at the
// tile's classes, dweight if compact at its columns first ..
FL_ARGUMENTS(WeightArguments, WEIGHT_FIELDS)

// A thread a class.
FL_KERNEL(128) finish_bias(WeightArguments a) {
  const float factor = a.unscale ? ld(static_cast<const float*>(a.unscale)) : 1;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; j < a.count; j += step) {
    float push = 0;
    for (int64_t r = 0; r < a.runs; ++r) {
      push += ld(static_cast<const float*>(a.sums) + r * a.stride_sums + j);
    }
    const int64_t id = a.classes ? ld(a.classes + j) : a.first + j;
    st(static_cast<float*>(a.dbias) + id, push * factor);
  }
}

// A warp a class.
template <class T>
FL_KERNEL(128)
finish_weight(WeightArguments a) {
  constexpr int kStep = kPack<T>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const float* const gradients = static_cast<const float*>(a.gradient);
  const T* const weights = static_cast<const T*>(a.weight);
  T* const outs = static_cast<T*>(a.dweight);
  const float factor = a.unscale ? ld(static_cast<const float*>(a.unscale)) : 1;
  const bool wide = packs(gradients, a.d) && packs(weights, a.stride_w) && packs(outs, a.stride_dw);
  const int64_t packed = wide ? a.d / kStep * kStep : 0;
  for (int64_t j = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; j < a.count;
       j += int64_t(gridDim.x) * warps) {
    const int64_t id = a.classes ? ld(a.classes + j) : a.first + j;
    const float* g = gradients + j * a.d;
    const T* w = weights + id * a.stride_w;
    T* out = outs + (a.compact ? a.first + j : id) * a.stride_dw;
    float along = 0;
    if (a.inverse != nullptr) {
      FL_ROLLED
      for (int64_t k = lane * kStep; k < packed; k += kWarp * kStep) {
        const Pack<float, kStep> u = ld_many<kStep>(g + k);
        const Pack<T, kStep> v = ld_pack(w + k);
        for (int i = 0; i < kStep; ++i) along += u[i] * to_float(v[i]);
      }
      FL_ROLLED
      for (int64_t k = packed + lane; k < a.d; k += kWarp) along += ld(g + k) * to_float(ld(w + k));
      const float inverse = ld(static_cast<const float*>(a.inverse) + j);
      along = warp_sum(along) * inverse * inverse;
    }
    FL_ROLLED
    for (int64_t k = lane * kStep; k < packed; k += kWarp * kStep) {
      const Pack<float, kStep> u = ld_many<kStep>(g + k);
      Pack<T, kStep> to;
      if (a.inverse != nullptr) {
        const Pack<T, kStep> v = ld_pack(w + k);
        for (int i = 0; i < kStep; ++i) {
          to[i] = from_float<T>((u[i] - along * to_float(v[i])) * factor);
        }
      } else {
        for (int i = 0; i < kStep; ++i) to[i] = from_float<T>(u[i] * factor);
      }
      st_pack(out + k, to);
    }
    FL_ROLLED
    for (int64_t k = packed + lane; k < a.d; k += kWarp) {
      const float v = a.inverse != nullptr ? along * to_float(ld(w + k)) : 0;
      st(out + k, from_float<T>((ld(g + k) - v) * factor));
    }
  }
}

int run_weight(const WeightArguments& a, Stream stream) {
  if (a.sums != nullptr) {
    const int64_t blocks = grid_of((a.count + 127) / 128, 32);
    const int error = launch(finish_bias, blocks, 128, 0, stream, a);
    if (error != 0) return error;
  }
  if (a.gradient == nullptr) return 0;
  return with_float_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return launch(finish_weight<T>, blocks_of_warps(a.count, 128), 128, 0, stream, a);
  });
}

FL_EXPORT(row_weight, WeightArguments, WEIGHT_FIELDS, run_weight)

}  // namespace fused_losses::cuda::row_statistics
