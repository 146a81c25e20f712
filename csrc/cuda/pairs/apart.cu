// G of pairs whose scores are squared distances: what of it goes into products, and its sums.
//
//   dx_i = 2 scale (sum_far G_ij y_j - x_i sum_far G_ij + sum_near G_ij (y_j - x_i))
//
// Near pairs cancel in products: their G is 0 there, and distances/gradient.cu sums them from
// differences in the tiles that have some.
#include "../distances/rows.h"
#include "tile.h"

namespace fused_losses::cuda::pairs {

constexpr int kSide = 64;  // of a tile, as distances/tile.h has it
constexpr int kSideThreads = 256, kAcrossSide = kSide / kWide;

// clang-format off
#define SPLIT_FIELDS(F) \
  F(const float*, g) /* [n, stride] G */ \
  F(const float*, squares) /* [n, stride] |x - y|^2 */ \
  F(const float*, x_norms) /* [n] 16 share |x|^2: with them distances/math.h tells near pairs */ \
  F(const float*, y_norms) /* [m] */ \
  F(void*, far) /* [n, far_stride] of `type`: G, 0 for near pairs */ \
  F(float*, row_sums) /* [tiles across, n] of `far`, a tile's columns each */ \
  F(float*, column_sums) /* [tiles down, m] */ \
  F(float*, moments) /* [tiles across, n] of G |x - y|^2 over all pairs */ \
  F(int32_t*, near) /* [tiles down, tiles across]: whether a tile has near pairs */ \
  F(int64_t, stride) /* a multiple of kWide, and so is far_stride */ \
  F(int64_t, far_stride) \
  F(int64_t, n) \
  F(int64_t, m) \
  F(int32_t, type)
// clang-format on
FL_ARGUMENTS(SplitArguments, SPLIT_FIELDS)

struct SplitShared {
  float part[kSideThreads / kAcrossSide][kSide];
};

FL_DEVICE float rounded_to(int32_t type, float v) {
  if (type == kTypeFloat) return v;
  return type == kTypeBf16 ? to_float(from_float<Bf16>(v)) : to_float(from_float<Half>(v));
}

FL_KERNEL(kSideThreads) pair_split(SplitArguments a) {
  FL_SHARED(SplitShared, s);
  const int tx = threadIdx.x % kAcrossSide, ty = threadIdx.x / kAcrossSide;
  const int64_t across = (a.m + kSide - 1) / kSide;
  const int64_t tiles = (a.n + kSide - 1) / kSide * across;
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t down = tile / across, j = tile % across * kSide + tx * kWide;
    float columns[kWide] = {}, below[kWide] = {};
    int any = 0;
    for (int e = 0; e < kWide; ++e) columns[e] = j + e < a.m ? ld(a.y_norms + j + e) : 0.0f;
    for (int r = 0; r < kWide; ++r) {
      const int64_t i = down * kSide + ty * kWide + r;
      float total = 0, moment = 0;
      if (i < a.n && j < a.m) {
        const float row = ld(a.x_norms + i);
        const auto g = ld_pack(a.g + i * a.stride + j);
        const auto square = ld_pack(a.squares + i * a.stride + j);
        float far[kWide];
        for (int e = 0; e < kWide; ++e) {
          const bool real = j + e < a.m && g[e] != 0;
          const bool close = distances::is_near(square[e], row + columns[e], false);
          any |= real && close;
          // sums must be of what is multiplied
          far[e] = real && !close ? rounded_to(a.type, g[e]) : 0.0f;
          moment += real ? g[e] * square[e] : 0.0f;
          total += far[e];
          below[e] += far[e];
        }
        store_row(a.type, a.far, i * a.far_stride + j, far);
      }
      // over the threads of a row
      for (int apart = kAcrossSide / 2; apart > 0; apart /= 2) {
        total += __shfl_xor_sync(kAllLanes, total, apart);
        moment += __shfl_xor_sync(kAllLanes, moment, apart);
      }
      if (tx == 0 && i < a.n) {
        st(a.row_sums + tile % across * a.n + i, total);
        st(a.moments + tile % across * a.n + i, moment);
      }
    }
    for (int e = 0; e < kWide; ++e) s.part[ty][tx * kWide + e] = below[e];
    any = __syncthreads_or(any);
    if (threadIdx.x == 0) st(a.near + tile, any);
    const int64_t column = tile % across * kSide + threadIdx.x;
    if (threadIdx.x < kSide && column < a.m) {
      float total = 0;
      for (int t = 0; t < kSideThreads / kAcrossSide; ++t) total += s.part[t][threadIdx.x];
      st(a.column_sums + down * a.m + column, total);
    }
    __syncthreads();
  }
}

int run_split(const SplitArguments& a, Stream stream) {
  const int64_t tiles = ceil_div(a.n, kSide) * ceil_div(a.m, kSide);
  return launch(pair_split, blocks_for(tiles), kSideThreads, 0, stream, a);
}

FL_EXPORT(pair_split, SplitArguments, SPLIT_FIELDS, run_split)

}  // namespace fused_losses::cuda::pairs
