// The epilogues of `row_statistics` on a tile of products <x_i, w_j>, which a library has put into
// L2 (backends/cuda.py):
//   score_rows     the tile's max, sum of exp, argmax and weighted sum merged into each row's state
//   finish_rows    the state of all tiles as lse, hardest, ..; the target's score
// ../../row_statistics.h has the formulas.
#include "scores.h"

namespace fused_losses::cuda::row_statistics {

constexpr int32_t kNowhere = 0x7fffffff;

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
  F(int32_t, type_x)           \
  F(bool, normalize)

// x [n, d] in float, or as weight [*, d]; the state [parts, n], at most 32 parts. lse, target
// double; weighted (null without moment), hardest_score float; hardest int64; [n] each
FL_ARGUMENTS(FinishArguments, FINISH_FIELDS)

// <x, w>, over |w| if asked, summed in double: lse - target is what an exponential follows. A warp.
template <class X, class T>
FL_DEVICE double target_score(const X* x, const T* w, int64_t d, bool wide, bool normalize) {
  const int lane = threadIdx.x % kWarp;
  const int64_t packed = wide ? d / kPack<T> * kPack<T> : 0;
  double dot = 0, square = 0;
  for (int64_t k = lane * kPack<T>; k < packed; k += kWarp * kPack<T>) {
    const Pack<X, kPack<T>> u = ld_many<kPack<T>>(x + k);
    const Pack<T, kPack<T>> v = ld_pack(w + k);
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
  return norm < double(kShortest) ? 0 * dot : dot / norm;
}

// A warp a row.
template <class X, class T>
FL_KERNEL(128)
finish_rows(FinishArguments a) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const X* const x = static_cast<const X*>(a.x);
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
    const auto kernel = a.type_x == a.type ? finish_rows<T, T> : finish_rows<float, T>;
    return launch(kernel, blocks_of_warps(a.n, 128), 128, 0, stream, a);
  });
}

FL_EXPORT(row_finish, FinishArguments, FINISH_FIELDS, run_finish)

}  // namespace fused_losses::cuda::row_statistics
