// A tile of pairs: a block has 64 x 64 of them, a thread 4 x 4, and coordinates go by in shared
// memory as floats, whatever the rows are.
#pragma once

#include "rows.h"

namespace fused_losses::cuda::distances {

constexpr int kTile = 64;   // rows of a side in a block's tile
constexpr int kDepth = 32;  // coordinates in shared memory at a time, or rows that go by
constexpr int kThreads = 256;
constexpr int kBlocks = 2;   // a processor, at least: 128 registers a thread
constexpr int kEach = 4;     // of a tile's side a thread has
constexpr int kChunk = 512;  // terms that a float sum runs over before it is put aside
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Where coordinate k of row r stands: groups of four rows change places from one group of four
// coordinates to the next, so that a warp that writes a row's packs meets all banks.
FL_DEVICE int turned(int k, int r) { return k * kTile + ((r / 4 ^ (k / 4 & 7)) * 4 | r % 4); }

template <class M>
struct TileShared {
  using V = typename M::V;
  alignas(16) V x[kDepth * kTile];
  alignas(16) V y[kDepth * kTile];
  alignas(16) V w[M::kRowWeights ? kDepth * kTile : 4];
  float weights[M::kWeights ? kDepth : 1];
  float x_flags[kTile], y_flags[kTile];  // 0, or NaN that a row makes of its pairs
};

// to[k][r] = coordinates [k0, k0 + kDepth) of rows [first, first + kTile), zeros where there are
// none. Bit i of the result: pack i of this thread had an element that is not >= lowest.
template <bool kFlags, class V>
FL_DEVICE unsigned stage(const Rows& rows, int64_t first, int32_t k0, float lowest, V* to) {
  unsigned bad = 0;
  with_rows<V>(rows, [&](const auto* at, bool packed) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(at)>>;
    constexpr int kWide = kPack<T>, kParts = kDepth / kWide, kPacks = kTile * kParts / kThreads;
    for (int i = 0; i < kPacks; ++i) {
      const int e = i * kThreads + threadIdx.x, r = e / kParts, part = e % kParts;
      V v[kWide] = {};
      if (first + r < rows.count) {
        load_pack(at + (first + r) * rows.stride, k0 + part * kWide, rows.d, packed, v);
      }
      for (int c = 0; c < kWide; ++c) {
        to[turned(part * kWide + c, r)] = v[c];
        if constexpr (kFlags) bad |= static_cast<unsigned>(!(v[c] >= lowest)) << i;
      }
    }
  });
  return bad;
}

// flags[r] from what `stage` found in a row; every thread of the block.
FL_DEVICE void put_flags(const Rows& rows, unsigned bad, float* flags) {
  const int parts = rows.type == kTypeFloat ? kDepth / 4 : kDepth / 8, lane = threadIdx.x % kWarp;
  for (int i = 0; i < kTile * parts / kThreads; ++i) {
    const unsigned votes = __ballot_sync(kAllLanes, bad >> i & 1);
    const int r = (i * kThreads + threadIdx.x) / parts;
    const bool any = (votes >> lane & ((1u << parts) - 1)) != 0;
    if (lane % parts == 0) flags[r] = any ? kNan : 0.0f;
  }
}

// Four neighbours in shared memory.
template <class V>
FL_DEVICE Pack<V, 4> four(const V* p) {
  return *reinterpret_cast<const Pack<V, 4>*>(p);
}

template <class Rule>
constexpr bool kIsJaccard = std::is_same_v<Rule, distance_rules::Jaccard<FloatMath, true>>;

// sums[r][c]: of rows i0 + 4 ty + r of x and j0 + 4 tx + c of y.
template <class M, class V>
FL_DEVICE void tile_sums(const M& metric, const Rows& x, const Rows& y, const float* w,
                         int64_t w_stride, int64_t i0, int64_t j0, TileShared<M>& s,
                         V (&sums)[kEach][kEach][M::kSums]) {
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const float lowest = M::kNonNegative ? 0.0f : -distance_rules::kInfinity<float>;
  const Rows row_weights = {w, w_stride, y.count, y.d, kTypeFloat};
  unsigned bad_x = 0, bad_y = 0;
  const int32_t step = M::kAside ? kChunk : x.d;
  for (int32_t chunk = 0; chunk < x.d; chunk += step) {
    V aside[kEach][kEach][M::kSums] = {};
    auto& part = M::kAside ? aside : sums;
    const int32_t end = step < x.d - chunk ? chunk + step : x.d;
    for (int32_t k0 = chunk; k0 < end; k0 += kDepth) {
      __syncthreads();
      bad_x |= stage<M::kFlags>(x, i0, k0, lowest, s.x);
      bad_y |= stage<M::kFlags>(y, j0, k0, lowest, s.y);
      if constexpr (M::kRowWeights) stage<false>(row_weights, j0, k0, lowest, s.w);
      if constexpr (M::kWeights) {
        const int32_t k = k0 + static_cast<int32_t>(threadIdx.x);
        if (threadIdx.x < kDepth) s.weights[threadIdx.x] = k >= x.d ? 0 : w ? ld(w + k) : 1;
      }
      __syncthreads();
      // coordinates past the end are zeros, which add nothing
      const int depth = end - k0 < kDepth ? end - k0 : kDepth;
      for (int k4 = 0; k4 < depth; k4 += 4) {
        const int across = (tx ^ (k4 / 4 & 7)) * 4, down = (ty ^ (k4 / 4 & 7)) * 4;
        FL_UNROLL_TIMES(M::kSums == 2 || M::kNonNegative ? 1 : 4)
        for (int c = 0; c < 4; ++c) {
          const int k = k4 + c;
          const auto mine = four(s.x + k * kTile + down), theirs = four(s.y + k * kTile + across);
          Pack<V, 4> scale = {};
          if constexpr (M::kRowWeights) scale = four(s.w + k * kTile + across);
          const float weight = M::kWeights ? s.weights[k] : 1.0f;
          for (int r = 0; r < kEach; ++r) {
            for (int e = 0; e < kEach; ++e) {
              if constexpr (M::kPlaces) {
                metric.add_at(part[r][e], mine[r], theirs[e], k0 + k);
              } else {
                metric.add(part[r][e], mine[r], theirs[e], scale[e], weight);
              }
            }
          }
        }
      }
    }
    if constexpr (M::kAside) {
      for (int r = 0; r < kEach; ++r) {
        for (int e = 0; e < kEach; ++e) {
          for (int k = 0; k < M::kSums; ++k) {
            sums[r][e][k] = M::join(sums[r][e][k], part[r][e][k]);
          }
        }
      }
    }
  }
  if constexpr (M::kFlags) {
    put_flags(x, bad_x, s.x_flags);
    put_flags(y, bad_y, s.y_flags);
    __syncthreads();
  }
}

// A rule as this loop runs it. kAside: sums are put aside every kChunk coordinates, which keeps
// their digits; the pairs of sums of Jaccard would take twice the registers.
template <class Rule>
struct Metric : Rule {
  using V = float;
  static constexpr bool kPlaces = false, kAside = !kIsJaccard<Rule>;
};

// Enough to fill the processors a few times.
inline int64_t blocks_for(int64_t tiles) { return grid_of(tiles, 16); }

inline int64_t tiles_of(int64_t n, int64_t m) {
  return (n + kTile - 1) / kTile * ((m + kTile - 1) / kTile);
}

}  // namespace fused_losses::cuda::distances
