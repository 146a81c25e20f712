// The epilogues of `row_statistics` on a tile of products <x_i, w_j>, which a library has put into
// L2 (backends/cuda.py):
//   gradient_rows  the tile replaced by G / |w_j|, in place, also where G has 16 bits
//   column_sums    sums of G over rows, for the bias
//   finish_bias    those sums as the gradient of the bias
//   finish_weight  G^T x as the gradient of W: projection, scatter to rows `classes`, cast
// ../../row_statistics.h has the formulas.
#include "scores.h"

namespace fused_losses::cuda::row_statistics {

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
    float along = 0, inverse = 0;
    if (a.inverse != nullptr) {
      FL_ROLLED
      for (int64_t k = lane * kStep; k < packed; k += kWarp * kStep) {
        const Pack<float, kStep> u = ld_many<kStep>(g + k);
        const Pack<T, kStep> v = ld_pack(w + k);
        for (int i = 0; i < kStep; ++i) along += u[i] * to_float(v[i]);
      }
      FL_ROLLED
      for (int64_t k = packed + lane; k < a.d; k += kWarp) along += ld(g + k) * to_float(ld(w + k));
      inverse = ld(static_cast<const float*>(a.inverse) + j);
      along = warp_sum(along) * inverse;
    }
    // a class of zeros has no direction: NaN of a row over its length is none either
    const bool dead = a.inverse != nullptr && inverse == 0;
    FL_ROLLED
    for (int64_t k = lane * kStep; k < packed; k += kWarp * kStep) {
      const Pack<float, kStep> u = ld_many<kStep>(g + k);
      Pack<T, kStep> to;
      if (a.inverse != nullptr) {
        const Pack<T, kStep> v = ld_pack(w + k);
        for (int i = 0; i < kStep; ++i) {
          const float left = dead ? 0 : u[i] - along * (to_float(v[i]) * inverse);
          to[i] = from_float<T>(left * factor);
        }
      } else {
        for (int i = 0; i < kStep; ++i) to[i] = from_float<T>(u[i] * factor);
      }
      st_pack(out + k, to);
    }
    FL_ROLLED
    for (int64_t k = packed + lane; k < a.d; k += kWarp) {
      const float v = a.inverse != nullptr ? along * (to_float(ld(w + k)) * inverse) : 0;
      st(out + k, from_float<T>(dead ? 0 : (ld(g + k) - v) * factor));
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
