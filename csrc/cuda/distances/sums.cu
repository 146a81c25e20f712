// The matrix of distances that are sums over coordinates, of floats or of bits.
#include "tile.h"

namespace fused_losses::cuda::distances {

// The first coordinate where |x - y| is largest, as the bits of the result.
struct Largest : distance_rules::Metric<FloatMath> {
  using V = float;
  static constexpr int kSums = 2;
  static constexpr bool kPlaces = true, kAside = false;
  FL_DEVICE static void add_at(float* s, float x, float y, int32_t k) {
    const int32_t apart = FloatMath::bits(fabsf(x - y));
    const bool more = apart > FloatMath::bits(s[0]);
    s[0] = more ? FloatMath::value(apart) : s[0];
    s[1] = more ? FloatMath::value(k) : s[1];
  }
  FL_DEVICE static float finish(const float* s) { return s[1]; }
};

// hamming and jaccard of rows of bits.
template <bool kJaccard>
struct BitMetric : distance_rules::Traits {
  using V = uint32_t;
  static constexpr int kSums = kJaccard ? 2 : 1;
  static constexpr bool kPlaces = false, kAside = false;
  float total;
  FL_DEVICE static void add(uint32_t* s, uint32_t x, uint32_t y, uint32_t, float) {
    s[0] += __popc(x ^ y);
    if constexpr (kJaccard) s[1] += __popc(x | y);
  }
  FL_DEVICE float finish(const uint32_t* s) const {
    if constexpr (!kJaccard) return static_cast<float>(s[0]) / total;
    return static_cast<float>(s[0]) / static_cast<float>(s[kSums - 1] ? s[kSums - 1] : 1);
  }
};

// Besides the kinds of csrc/distances.h: what gradients want, sum |x + y| and the first coordinate
// where |x - y| is largest (int32).
enum : int32_t { kSumOfSizes = static_cast<int32_t>(Distance::kScaled) + 1, kLargest };

// clang-format off
#define DISTANCE_SUMS_FIELDS(F) \
  F(const void*, x) /* [n, d] of `type` */ \
  F(const void*, y) /* [m, d] */ \
  F(const float*, w) /* null, [d] or, of kScaled, [m, d] */ \
  F(const float*, total) /* of hamming: the sum of w; null: d */ \
  F(float*, out) /* [n, m] */ \
  F(int64_t, x_stride) \
  F(int64_t, y_stride) \
  F(int64_t, w_stride) \
  F(int64_t, out_stride) \
  F(int64_t, n) \
  F(int64_t, m) \
  F(int64_t, d) \
  F(int32_t, type) \
  F(int32_t, kind) \
  F(double, p)
// clang-format on
FL_ARGUMENTS(DistanceSums, DISTANCE_SUMS_FIELDS)

template <class M>
struct SumsArguments {
  DistanceSums in;
  M metric;
};

template <class M>
constexpr bool kIsMinkowski = false;
template <int kPower>
constexpr bool kIsMinkowski<Metric<distance_rules::Minkowski<FloatMath, kPower>>> = true;
template <class M>
constexpr bool kIsHamming = std::is_same_v<M, Metric<distance_rules::Hamming<FloatMath, true>>>;

template <class M>
FL_KERNEL(kThreads, kBlocks)
distance_sums(SumsArguments<M> a) {
  FL_SHARED(TileShared<M>, s);
  const DistanceSums& in = a.in;
  const auto d = static_cast<int32_t>(in.d);
  const Rows x = {in.x, in.x_stride, in.n, d, in.type};
  const Rows y = {in.y, in.y_stride, in.m, d, in.type};
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int64_t across = (in.m + kTile - 1) / kTile, tiles = (in.n + kTile - 1) / kTile * across;
  const bool packed = packs(in.out, in.out_stride);
  if constexpr (kIsHamming<M>) a.metric.total = in.total ? ld(in.total) : static_cast<float>(in.d);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t i0 = tile / across * kTile, j0 = tile % across * kTile, j = j0 + tx * kEach;
    typename M::V sums[kEach][kEach][M::kSums] = {};
    tile_sums(a.metric, x, y, in.w, in.w_stride, i0, j0, s, sums);
    unsigned beyond = 0;  // the pairs whose sum of powers left the range of float
    FL_UNROLL
    for (int r = 0; r < kEach; ++r) {
      const int64_t i = i0 + ty * kEach + r;
      if (i >= in.n) continue;
      float v[kEach];
      FL_UNROLL
      for (int e = 0; e < kEach; ++e) {
        v[e] = a.metric.finish(sums[r][e]);
        if constexpr (M::kFlags) v[e] += s.x_flags[ty * kEach + r] + s.y_flags[tx * kEach + e];
        if constexpr (kIsMinkowski<M>) {
          const float sum = sums[r][e][0];
          const bool inside = sum >= M::kLow && sum <= M::kHigh;
          if (!inside && j + e < in.m) beyond |= 1u << (r * kEach + e);
        }
      }
      store_four(in.out + i * in.out_stride + j, in.m - j, packed, v);
    }
    // a loop of its own: an index of `sums` that is not constant would put them into memory
    for (; beyond != 0; beyond &= beyond - 1) {
      const int pair = __ffs(static_cast<int>(beyond)) - 1;
      const int64_t i = i0 + ty * kEach + pair / kEach, column = j + pair % kEach;
      const auto apart = [&](int64_t k) { return fabsf(element(x, i, k) - element(y, column, k)); };
      st(in.out + i * in.out_stride + column,
         distance_rules::scaled_minkowski(in.d, static_cast<float>(in.p), apart));
    }
  }
}

template <class M>
int launch_sums(const DistanceSums& in, Stream stream, const M& metric) {
  const SumsArguments<M> a = {in, metric};
  return launch(distance_sums<M>, blocks_for(tiles_of(in.n, in.m)), kThreads, 0, stream, a);
}

int run_distance_sums(const DistanceSums& a, Stream stream) {
  namespace rules = distance_rules;
  using Math = FloatMath;
  const auto of = [&](auto rule) { return launch_sums(a, stream, Metric<decltype(rule)>{rule}); };
  switch (a.kind) {
    case static_cast<int32_t>(Distance::kCityblock):
      return of(rules::Cityblock<Math>{});
    case static_cast<int32_t>(Distance::kMinkowski):
      if (a.p == 3) return of(rules::Minkowski<Math, 3>(3));
      if (a.p == 4) return of(rules::Minkowski<Math, 4>(4));
      return of(rules::Minkowski<Math, 0>(a.p));
    case static_cast<int32_t>(Distance::kChebyshev):
      return of(rules::Chebyshev<Math>{});
    case static_cast<int32_t>(Distance::kCanberra):
      return of(rules::Canberra<Math, true>{});
    case static_cast<int32_t>(Distance::kBraycurtis):
      return of(rules::Braycurtis<Math>{});
    case static_cast<int32_t>(Distance::kJensenShannon):
      return of(rules::JensenShannon<Math>{});
    case static_cast<int32_t>(Distance::kKl):
      return of(rules::KullbackLeibler<Math>{});
    case static_cast<int32_t>(Distance::kHamming):
      return of(rules::Hamming<Math, true>{});
    case static_cast<int32_t>(Distance::kJaccard):
      return of(rules::Jaccard<Math, true>{});
    case static_cast<int32_t>(Distance::kScaled):
      return of(rules::Scaled<Math>{});
    case kSumOfSizes:
      return of(rules::SumOfSizes<Math>{});
    case kLargest:
      return launch_sums(a, stream, Largest{});
    default:
      return 1;
  }
}
FL_EXPORT(distance_sums, DistanceSums, DISTANCE_SUMS_FIELDS, run_distance_sums)

// ---- bits ---------------------------------------------------------------------------------------

// clang-format off
#define DISTANCE_PACK_FIELDS(F) \
  F(const void*, rows) /* [n, d] bytes 0 and 1 */ \
  F(void*, words) /* [n, width] of 32 bits; width is 4 ceil(d / 128) */ \
  F(int64_t, stride) \
  F(int64_t, n) \
  F(int64_t, d) \
  F(int64_t, width)
// clang-format on
FL_ARGUMENTS(DistancePack, DISTANCE_PACK_FIELDS)

// A warp packs 512 coordinates of a row at a time, a lane 16 of them.
FL_KERNEL(kThreads) distance_pack(DistancePack a) {
  constexpr int64_t kWide = 16;
  const auto* rows = static_cast<const uint8_t*>(a.rows);
  auto* words = static_cast<uint32_t*>(a.words);
  const bool packed = packs(rows, a.stride);
  const int lane = threadIdx.x % kWarp;
  const int64_t pieces = (a.width + kWarp / 2 - 1) / (kWarp / 2);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t first = blockIdx.x * (kThreads / kWarp) + threadIdx.x / kWarp;
  for (int64_t task = first; task < a.n * pieces; task += warps) {
    const int64_t i = task / pieces, k = (task % pieces * kWarp + lane) * kWide;
    uint32_t half = 0;
    const auto* row = rows + i * a.stride;
    if (packed && k + kWide <= a.d) {
      const auto pack = ld_pack(row + k);
      for (int c = 0; c < kWide; ++c) half |= static_cast<uint32_t>(pack[c] != 0) << c;
    } else {
      for (int c = 0; c < kWide; ++c) {
        if (k + c < a.d) half |= static_cast<uint32_t>(ld(row + k + c) != 0) << c;
      }
    }
    const uint32_t high = __shfl_down_sync(kAllLanes, half, 1);
    const int64_t word = k / 32;
    if (lane % 2 == 0 && word < a.width) st(words + i * a.width + word, half | high << 16);
  }
}

int run_distance_pack(const DistancePack& a, Stream stream) {
  const int64_t pieces = (a.width + kWarp / 2 - 1) / (kWarp / 2);
  const int64_t blocks = (a.n * pieces + kThreads / kWarp - 1) / (kThreads / kWarp);
  return launch(distance_pack, blocks_for(blocks), kThreads, 0, stream, a);
}
FL_EXPORT(distance_pack, DistancePack, DISTANCE_PACK_FIELDS, run_distance_pack)

// clang-format off
#define DISTANCE_BITS_FIELDS(F) \
  F(const void*, x) /* [n, width] of `distance_pack` */ \
  F(const void*, y) /* [m, width] */ \
  F(float*, out) /* [n, m] */ \
  F(int64_t, n) \
  F(int64_t, m) \
  F(int64_t, d) \
  F(int64_t, width) \
  F(bool, jaccard)
// clang-format on
FL_ARGUMENTS(DistanceBits, DISTANCE_BITS_FIELDS)

int run_distance_bits(const DistanceBits& a, Stream stream) {
  const DistanceSums in = {a.x, a.y, nullptr, nullptr, a.out,      a.width, a.width, 0,
                           a.m, a.n, a.m,     a.width, kTypeWords, 0,       0};
  const float total = static_cast<float>(a.d);
  if (a.jaccard) return launch_sums(in, stream, BitMetric<true>{{}, total});
  return launch_sums(in, stream, BitMetric<false>{{}, total});
}
FL_EXPORT(distance_bits, DistanceBits, DISTANCE_BITS_FIELDS, run_distance_bits)

}  // namespace fused_losses::cuda::distances
