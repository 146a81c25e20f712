// Distances made of the library's products: from products to distances, where the pairs that cancel
// are summed from differences, and from gradients to the factors of the products of the backward.
#include "tile.h"

namespace fused_losses::cuda::distances {

// clang-format off
#define DISTANCE_NORMS_FIELDS(F) \
  F(const void*, rows) /* [n, d] of `type` */ \
  F(float*, norms) /* [n]: |row|^2 */ \
  F(int64_t, stride) \
  F(int64_t, n) \
  F(int64_t, d) \
  F(int32_t, type) \
  F(bool, rounded) /* of elements rounded to bfloat16 */
// clang-format on
FL_ARGUMENTS(DistanceNorms, DISTANCE_NORMS_FIELDS)

// A warp a row.
FL_KERNEL(kThreads) distance_norms(DistanceNorms a) {
  const auto d = static_cast<int32_t>(a.d);
  const Rows rows = {a.rows, a.stride, a.n, d, a.type};
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t first = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (int64_t i = first; i < a.n; i += warps) {
    float total = 0;
    with_rows<float>(rows, [&](const auto* at, bool packed) {
      using T = std::remove_cv_t<std::remove_pointer_t<decltype(at)>>;
      constexpr int kWide = kPack<T>;
      for (int32_t k = lane * kWide; k < d; k += kWarp * kWide) {
        float v[kWide];
        load_pack(at + i * a.stride, k, d, packed, v);
        for (int c = 0; c < kWide; ++c) {
          const float u = a.rounded ? to_float(from_float<Bf16>(v[c])) : v[c];
          total += u * u;
        }
      }
    });
    total = warp_sum(total);
    if (lane == 0) st(a.norms + i, total);
  }
}

int run_distance_norms(const DistanceNorms& a, Stream stream) {
  const int64_t blocks = (a.n + kThreads / kWarp - 1) / (kThreads / kWarp);
  return launch(distance_norms, blocks_for(blocks), kThreads, 0, stream, a);
}
FL_EXPORT(distance_norms, DistanceNorms, DISTANCE_NORMS_FIELDS, run_distance_norms)

// clang-format off
#define DISTANCE_PRODUCTS_FIELDS(F) \
  F(const void*, x) /* [n, d] of `type` */ \
  F(const void*, y) /* [m, d] */ \
  F(const float*, x_norms) /* of `distance_norms` */ \
  F(const float*, y_norms) \
  F(float*, out) /* [n, m]: products, which become distances */ \
  F(int64_t, x_stride) \
  F(int64_t, y_stride) \
  F(int64_t, out_stride) \
  F(int64_t, n) \
  F(int64_t, m) \
  F(int64_t, d) \
  F(int32_t, type) \
  F(bool, rooted) \
  F(float, share) /* of |x|^2 + |y|^2, below which a pair is near */
// clang-format on
FL_ARGUMENTS(DistanceProducts, DISTANCE_PRODUCTS_FIELDS)

FL_KERNEL(kThreads, kBlocks) distance_products(DistanceProducts a) {
  using M = Metric<distance_rules::Squares<FloatMath>>;
  FL_SHARED(TileShared<M>, s);
  const auto d = static_cast<int32_t>(a.d);
  const Rows x = {a.x, a.x_stride, a.n, d, a.type}, y = {a.y, a.y_stride, a.m, d, a.type};
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t across = (a.m + kTile - 1) / kTile, tiles = (a.n + kTile - 1) / kTile * across;
  const bool packed = packs(a.out, a.out_stride), packed_norms = packs(a.y_norms, 4);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t i0 = tile / across * kTile, j0 = tile % across * kTile, j = j0 + tx * kEach;
    float columns[kEach];
    unsigned near = 0;
    load_four(a.y_norms + j, 1, a.m - j, packed_norms, columns);
    for (int r = 0; r < kEach; ++r) {
      const int64_t i = i0 + ty * kEach + r;
      if (i >= a.n) continue;
      float v[kEach];
      float* to = a.out + i * a.out_stride + j;
      load_four(to, 1, a.m - j, packed, v);
      const float row = ld(a.x_norms + i);
      for (int e = 0; e < kEach; ++e) {
        const float size = row + columns[e];
        v[e] = distance_rules::from_product<FloatMath>(size, v[e]);
        // `not >=`: NaN and what has overflowed as well
        const bool cancels = !(v[e] >= size * a.share);
        near |= static_cast<unsigned>(cancels && j + e < a.m) << (r * kEach + e);
        v[e] = a.rooted ? sqrtf(v[e]) : v[e];
      }
      store_four(to, a.m - j, packed, v);
    }
    if (!__syncthreads_or(near != 0)) continue;
    float sums[kEach][kEach][1] = {};
    tile_sums(M{}, x, y, nullptr, 0, i0, j0, s, sums);
    for (int r = 0; r < kEach; ++r) {
      float* to = a.out + (i0 + ty * kEach + r) * a.out_stride + j;
      for (int e = 0; e < kEach; ++e) {
        const float v = sums[r][e][0];
        if (near >> (r * kEach + e) & 1) st(to + e, a.rooted ? sqrtf(v) : v);
      }
    }
  }
}

int run_distance_products(const DistanceProducts& a, Stream stream) {
  return launch(distance_products, blocks_for(tiles_of(a.n, a.m)), kThreads, 0, stream, a);
}
FL_EXPORT(distance_products, DistanceProducts, DISTANCE_PRODUCTS_FIELDS, run_distance_products)

// clang-format off
#define DISTANCE_FACTORS_FIELDS(F) \
  F(const float*, grad) /* [n, m], of any strides */ \
  F(const float*, out) /* [n, m]; null: dot, and g = grad */ \
  F(const float*, x_norms) \
  F(const float*, y_norms) \
  F(void*, g) /* [n, m] of `type`: factors of the far pairs, 0 for near ones */ \
  F(float*, row_sums) /* [tiles across, n] of g, a tile's columns each */ \
  F(float*, column_sums) /* [tiles down, m] */ \
  F(int32_t*, near) /* [tiles down, tiles across]: whether a tile has near pairs */ \
  F(int64_t, grad_row) \
  F(int64_t, grad_column) \
  F(int64_t, out_row) \
  F(int64_t, near_row) \
  F(int64_t, n) \
  F(int64_t, m) \
  F(int32_t, type) \
  F(bool, rooted)
// clang-format on
FL_ARGUMENTS(DistanceFactors, DISTANCE_FACTORS_FIELDS)

struct FactorsShared {
  float part[16][kTile];
};

FL_KERNEL(kThreads) distance_factors(DistanceFactors a) {
  FL_SHARED(FactorsShared, s);
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t across = (a.m + kTile - 1) / kTile, tiles = (a.n + kTile - 1) / kTile * across;
  const bool packed_grad = a.grad_column == 1 && packs(a.grad, a.grad_row);
  const bool packed_out = packs(a.out, a.out_row), packed_g = a.m % kPack<float> == 0;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t i0 = tile / across * kTile, j0 = tile % across * kTile, j = j0 + tx * kEach;
    float columns[kEach] = {}, below[kEach] = {};
    int near = 0;
    if (a.out) load_four(a.y_norms + j, 1, a.m - j, false, columns);
    for (int r = 0; r < kEach; ++r) {
      const int64_t i = i0 + ty * kEach + r;
      float g[kEach] = {}, total = 0;
      if (i < a.n) {
        load_four(a.grad + i * a.grad_row + j * a.grad_column, a.grad_column, a.m - j, packed_grad,
                  g);
        if (a.out) {
          float out[kEach];
          load_four(a.out + i * a.out_row + j, 1, a.m - j, packed_out, out);
          const float row = ld(a.x_norms + i);
          for (int e = 0; e < kEach; ++e) {
            const float v = distance_rules::difference_factor<FloatMath>(g[e], out[e], a.rooted);
            const bool close = j + e < a.m && is_near(out[e], row + columns[e], a.rooted);
            // a factor that is 0 needs no difference
            near |= close && v != 0;
            g[e] = close ? 0 : v;
          }
        }
        if (a.type == kTypeBf16) {
          auto* to = static_cast<Bf16*>(a.g) + i * a.m + j;
          for (int e = 0; e < kEach; ++e) {
            const Bf16 rounded = from_float<Bf16>(g[e]);
            // sums must be of what is multiplied
            g[e] = to_float(rounded);
            if (j + e < a.m) st(to + e, rounded);
          }
        } else {
          store_four(static_cast<float*>(a.g) + i * a.m + j, a.m - j, packed_g, g);
        }
      }
      for (int e = 0; e < kEach; ++e) {
        total += g[e];
        below[e] += g[e];
      }
      // over the 16 threads of a row
      for (int apart = 8; apart > 0; apart /= 2) {
        total += __shfl_xor_sync(kAllLanes, total, apart);
      }
      if (a.row_sums && tx == 0 && i < a.n) st(a.row_sums + tile % across * a.n + i, total);
    }
    if (!a.out) continue;
    const int any = __syncthreads_or(near);
    if (threadIdx.x == 0) st(a.near + tile / across * a.near_row + tile % across, any);
    for (int e = 0; e < kEach; ++e) s.part[ty][tx * kEach + e] = below[e];
    __syncthreads();
    const int64_t column = j0 + threadIdx.x;
    if (threadIdx.x < kTile && column < a.m) {
      float total = 0;
      for (int t = 0; t < 16; ++t) total += s.part[t][threadIdx.x];
      st(a.column_sums + tile / across * a.m + column, total);
    }
  }
}

int run_distance_factors(const DistanceFactors& a, Stream stream) {
  return launch(distance_factors, blocks_for(tiles_of(a.n, a.m)), kThreads, 0, stream, a);
}
FL_EXPORT(distance_factors, DistanceFactors, DISTANCE_FACTORS_FIELDS, run_distance_factors)

}  // namespace fused_losses::cuda::distances
