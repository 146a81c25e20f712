// The matrix of distances and its gradient.
//
// Sums over coordinates: a block has 64 x 64 pairs, a thread 4 x 4 of them, and coordinates go by
// in shared memory as floats, whatever the rows are. A gradient: a block owns 64 rows by 64
// coordinates, and the rows of the other side go by with the factors of their pairs. Kinds made of
// products take the library's products and turn them into distances here; the pairs that cancel are
// summed from differences by the same loops.
#include <cmath>

#include "../distances.h"
#include "../rules/distances.h"
#include "warp.h"

namespace fused_losses::cuda::distances {

constexpr int kTile = 64;   // rows of a side in a block's tile
constexpr int kDepth = 32;  // coordinates in shared memory at a time, or rows that go by
constexpr int kThreads = 256;
constexpr int kBlocks = 2;   // a processor, at least: 128 registers a thread
constexpr int kEach = 4;     // of a tile's side a thread has
constexpr int kChunk = 512;  // terms that a float sum runs over before it is put aside

constexpr int32_t kSignBit = std::numeric_limits<int32_t>::min();
constexpr float kTiny = std::numeric_limits<float>::min();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// What the rules compute with.
struct FloatMath {
  using Scalar = float;
  using Value = float;
  using Code = int32_t;
  using Bits = int32_t;

  FL_FUNCTION static Bits bits(float v) {
    Bits out;
    memcpy(&out, &v, 4);
    return out;
  }
  FL_FUNCTION static float value(Bits v) {
    float out;
    memcpy(&out, &v, 4);
    return out;
  }
  FL_FUNCTION static float to_value(Bits v) { return static_cast<float>(v); }
  FL_FUNCTION static float all(float v) { return v; }
  FL_FUNCTION static float magnitude(float v) { return fabsf(v); }
  FL_FUNCTION static float turn_sign(float v, float by) {
    return value(bits(v) ^ (bits(by) & kSignBit));
  }
  FL_FUNCTION static float reciprocal(float v) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, v);
#else
    return 1.0f / v;
#endif
  }
  FL_FUNCTION static float root(float v) { return sqrtf(v); }
  FL_FUNCTION static float not_zero(float v) { return kTiny > v ? kTiny : v; }
  FL_FUNCTION static float log_near_one(float z) { return distance_rules::float_log_near_one(z); }
  FL_FUNCTION static float small_power_of_two(float f) {
    return distance_rules::float_small_power_of_two(f);
  }
  FL_FUNCTION static float times_power_of_two(float v, float n) {
    n = n < -127.0f ? -127.0f : n;
    n = n > 128.0f ? 128.0f : n;
    return v * value((static_cast<int32_t>(n) + 127) << 23);
  }
  FL_FUNCTION static float divergence(float t, float rest) {
    return distance_rules::float_divergence<FloatMath>(t, rest);
  }
};

// ---- rows ---------------------------------------------------------------------------------------

// Words of a row of bits, for which nothing is converted.
constexpr int32_t kTypeWords = -1;

struct Rows {
  const void* at;
  int64_t stride, count;
  int32_t d, type;
};

FL_DEVICE float element(const Rows& rows, int64_t i, int32_t k) {
  const int64_t at = i * rows.stride + k;
  if (rows.type == kTypeFloat) return ld(static_cast<const float*>(rows.at) + at);
  if (rows.type == kTypeBf16) return to_float(ld(static_cast<const Bf16*>(rows.at) + at));
  return to_float(ld(static_cast<const Half*>(rows.at) + at));
}

template <class V, class T>
FL_DEVICE V widened(T v) {
  if constexpr (std::is_same_v<V, T>) {
    return v;
  } else {
    return to_float(v);
  }
}

// A pack of a row from coordinate k on, zeros past its end.
template <class T, class V>
FL_DEVICE void load_pack(const T* row, int32_t k, int32_t d, bool packed, V* v) {
  constexpr int kWide = kPack<T>;
  if (packed && k + kWide <= d) {
    const auto pack = ld_pack(row + k);
    for (int c = 0; c < kWide; ++c) v[c] = widened<V>(pack[c]);
  } else {
    for (int c = 0; c < kWide; ++c) v[c] = k + c < d ? widened<V>(ld(row + k + c)) : V(0);
  }
}

// Four numbers `stride` apart of which `real` exist, zeros after them; `packed`: neighbours that
// can be read at once.
FL_DEVICE void load_four(const float* p, int64_t stride, int64_t real, bool packed, float* v) {
  if (packed && real >= 4) {
    const auto pack = ld_pack(p);
    for (int c = 0; c < 4; ++c) v[c] = pack[c];
  } else {
    for (int c = 0; c < 4; ++c) v[c] = c < real ? ld(p + c * stride) : 0.0f;
  }
}

FL_DEVICE void store_four(float* p, int64_t real, bool packed, const float* v) {
  if (packed && real >= 4) {
    st_pack(p, Pack<float, 4>{{v[0], v[1], v[2], v[3]}});
  } else {
    for (int c = 0; c < 4; ++c) {
      if (c < real) st(p + c, v[c]);
    }
  }
}

// f(rows as pointers to their type, whether they can be read in packs).
template <class V, class F>
FL_DEVICE void with_rows(const Rows& rows, F&& f) {
  if constexpr (std::is_same_v<V, uint32_t>) {
    const auto* at = static_cast<const uint32_t*>(rows.at);
    f(at, packs(at, rows.stride));
  } else if (rows.type == kTypeFloat) {
    const auto* at = static_cast<const float*>(rows.at);
    f(at, packs(at, rows.stride));
  } else if (rows.type == kTypeBf16) {
    const auto* at = static_cast<const Bf16*>(rows.at);
    f(at, packs(at, rows.stride));
  } else {
    const auto* at = static_cast<const Half*>(rows.at);
    f(at, packs(at, rows.stride));
  }
}

// ---- a tile of pairs ----------------------------------------------------------------------------

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
constexpr bool kIsJaccard = false;
template <>
constexpr bool kIsJaccard<distance_rules::Jaccard<FloatMath, true>> = true;

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

// ---- forward: sums over coordinates -------------------------------------------------------------

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
constexpr bool kIsHamming = false;
template <>
constexpr bool kIsHamming<Metric<distance_rules::Hamming<FloatMath, true>>> = true;

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

// Enough to fill the processors a few times.
inline int64_t blocks_for(int64_t tiles) { return grid_of(tiles, 16); }

inline int64_t tiles_of(int64_t n, int64_t m) {
  return (n + kTile - 1) / kTile * ((m + kTile - 1) / kTile);
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

// ---- forward: bits ------------------------------------------------------------------------------

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

// ---- forward: products --------------------------------------------------------------------------

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
  F(bool, rooted)
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
        const bool cancels = !(v[e] >= size * distance_rules::kNear<float>);
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

// ---- backward: products -------------------------------------------------------------------------

// A pair whose gradient is taken from its difference.
FL_DEVICE bool is_near(float out, float size, bool rooted) {
  return !((rooted ? out * out : out) >= size * distance_rules::kNear<float>);
}

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

// ---- backward: sums over the rows of the other side ---------------------------------------------

// f sign(own - other) at the one coordinate that attains the distance.
struct ChebyshevTerm : distance_rules::Term<FloatMath> {
  static constexpr bool kSecond = true;
  FL_DEVICE static void add_at(float& sum, float own, float other, float f, float place,
                               int32_t k) {
    const float apart = own - other, by = apart > 0 ? f : apart < 0 ? -f : f * apart;
    sum = FloatMath::bits(place) == k ? sum + by : sum;
  }
};

// f (own - other) of near pairs, those that products left out.
template <bool kRooted>
struct NearTerm : distance_rules::DifferenceTerm<FloatMath> {
  FL_DEVICE static float factor(float g, float out, float& size) {
    const float f = distance_rules::difference_factor<FloatMath>(g, out, kRooted);
    return is_near(out, size, kRooted) ? f : 0.0f;
  }
};

template <class Term>
constexpr bool kIsChebyshev = std::is_same_v<Term, ChebyshevTerm>;
template <class Term>
constexpr bool kIsNear =
    std::is_same_v<Term, NearTerm<false>> || std::is_same_v<Term, NearTerm<true>>;

// As backends/cuda_distances.py numbers them.
enum TermKind : int32_t {
  kSignTerm,
  kMinkowskiTerm,
  kChebyshevTerm,
  kCanberraTerm,
  kCanberraShare,
  kBraycurtisTerm,
  kJensenShannonTerm,
  kKlOfX,
  kKlOfY,
  kScaledOfX,
  kScaledOfY,
  kScaledOfW,
  kNearSquared,
  kNearEuclidean,
};

// clang-format off
#define DISTANCE_GRADIENT_FIELDS(F) \
  F(const void*, own) /* [n, d] of `type`: the rows whose gradient is summed */ \
  F(const void*, other) /* [m, d] */ \
  F(const float*, own_w) /* null, [n, d] of kScaledOfY, [1, d] of kCanberraTerm */ \
  F(const float*, other_w) /* [m, d] of kScaledOfX */ \
  F(const float*, grad) /* [n, m], of any strides */ \
  F(const float*, out) /* [n, m], neighbours along one side */ \
  F(const float*, pairs) /* null, or a number a pair: kSumOfSizes, kLargest */ \
  F(const float*, own_norms) /* of the near terms */ \
  F(const float*, other_norms) \
  F(const float*, totals) /* of the near terms, [n] */ \
  F(const int32_t*, near) /* of `distance_factors` */ \
  F(float*, to) /* [splits, n, d] */ \
  F(int64_t, own_stride) \
  F(int64_t, other_stride) \
  F(int64_t, own_w_stride) \
  F(int64_t, other_w_stride) \
  F(int64_t, grad_own) \
  F(int64_t, grad_other) \
  F(int64_t, out_own) \
  F(int64_t, out_other) \
  F(int64_t, pairs_own) \
  F(int64_t, pairs_other) \
  F(int64_t, near_own) \
  F(int64_t, near_other) \
  F(int64_t, n) \
  F(int64_t, m) \
  F(int64_t, d) \
  F(int64_t, span) /* rows of other in a split: a multiple of kTile */ \
  F(int32_t, type) \
  F(int32_t, term) \
  F(bool, add) /* to what `to` has; near terms: to own totals - to */ \
  F(double, p)
// clang-format on
FL_ARGUMENTS(DistanceGradient, DISTANCE_GRADIENT_FIELDS)

template <class Term>
struct GradientArguments {
  DistanceGradient in;
  Term term;
};

template <class Term>
struct GradientShared {
  alignas(16) float other[kDepth * kTile];  // [row][coordinate]
  alignas(16) float w[Term::kOtherWeights ? kDepth * kTile : 4];
  alignas(16) float first[kDepth * kTile];  // [row of other][own row], `turned`
  alignas(16) float second[Term::kSecond ? kDepth * kTile : 4];
};

// to[s][k] = coordinates [k0, k0 + kTile) of rows [first, first + kDepth), zeros past the end.
FL_DEVICE void stage_rows(const Rows& rows, int64_t first, int32_t k0, float* to) {
  with_rows<float>(rows, [&](const auto* at, bool packed) {
    using T = std::remove_cv_t<std::remove_pointer_t<decltype(at)>>;
    constexpr int kWide = kPack<T>, kParts = kTile / kWide;
    FL_ROLLED
    for (int e = threadIdx.x; e < kDepth * kParts; e += kThreads) {
      const int s = e / kParts, part = e % kParts;
      if (first + s >= rows.count) continue;
      float v[kWide];
      load_pack(at + (first + s) * rows.stride, k0 + part * kWide, rows.d, packed, v);
      for (int c = 0; c < kWide; ++c) to[s * kTile + part * kWide + c] = v[c];
    }
  });
}

// Factors of kTile own rows from i on with kDepth others from j on, a thread four pairs at a time.
template <class Term>
FL_DEVICE void stage_factors(const DistanceGradient& in, int64_t i, int64_t j,
                             GradientShared<Term>& s) {
  // along the side where the distances are neighbours
  const bool along = in.out_other == 1;
  const int64_t grad_step = along ? in.grad_other : in.grad_own;
  const int64_t pairs_step = along ? in.pairs_other : in.pairs_own;
  const bool packed_grad = grad_step == 1 && packs(in.grad, along ? in.grad_own : in.grad_other);
  const bool packed_out = packs(in.out, along ? in.out_own : in.out_other);
  FL_ROLLED
  for (int e = threadIdx.x; e < kDepth * kTile / 4; e += kThreads) {
    const int o = along ? e / (kDepth / 4) : e % (kTile / 4) * 4;
    const int t = along ? e % (kDepth / 4) * 4 : e / (kTile / 4);
    const int64_t own = i + o, other = j + t;
    int64_t real = along ? in.m - other : in.n - own;
    if ((along ? in.n - own : in.m - other) <= 0) real = 0;
    float g[4], out[4], second[4] = {}, first[4];
    load_four(in.grad + own * in.grad_own + other * in.grad_other, grad_step, real, packed_grad, g);
    load_four(in.out + own * in.out_own + other * in.out_other, 1, real, packed_out, out);
    if constexpr (kIsNear<Term>) {
      for (int c = 0; c < 4; ++c) {
        if (c >= real) continue;
        const int64_t r = own + (along ? 0 : c), q = other + (along ? c : 0);
        second[c] = ld(in.own_norms + r) + ld(in.other_norms + q);
      }
    } else if (in.pairs) {
      const float* at = in.pairs + own * in.pairs_own + other * in.pairs_other;
      load_four(at, pairs_step, real, false, second);
    }
    for (int c = 0; c < 4; ++c) {
      first[c] = c < real ? Term::factor(g[c], out[c], second[c]) : 0.0f;
      const int at = turned(along ? t + c : t, along ? o : o + c);
      s.first[at] = first[c];
      if constexpr (Term::kSecond) s.second[at] = second[c];
    }
  }
}

template <class Term>
FL_KERNEL(kThreads, kBlocks)
distance_gradient(GradientArguments<Term> a) {
  FL_SHARED(GradientShared<Term>, s);
  const DistanceGradient& in = a.in;
  const auto d = static_cast<int32_t>(in.d);
  const Rows own = {in.own, in.own_stride, in.n, d, in.type};
  const Rows other = {in.other, in.other_stride, in.m, d, in.type};
  const Rows other_w = {in.other_w, in.other_w_stride, in.m, d, kTypeFloat};
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
  const int32_t across = (d + kTile - 1) / kTile;
  const int64_t tiles = (in.n + kTile - 1) / kTile * across;
  const int64_t tasks = tiles * ((in.m + in.span - 1) / in.span);
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int64_t split = task / tiles, tile = task % tiles, i0 = tile / across * kTile;
    const int32_t k0 = static_cast<int32_t>(tile % across) * kTile, k = k0 + tx * kEach;
    const int64_t end = split * in.span + in.span < in.m ? split * in.span + in.span : in.m;
    float mine[kEach][kEach], total[kEach][kEach] = {};
    with_rows<float>(own, [&](const auto* at, bool) {
      for (int r = 0; r < kEach; ++r) {
        const int64_t i = i0 + ty * kEach + r;
        for (int e = 0; e < kEach; ++e) {
          const bool real = i < in.n && k + e < d;
          mine[r][e] = real ? to_float(ld(at + i * own.stride + k + e)) : 0.0f;
        }
      }
    });
    for (int64_t chunk = split * in.span; chunk < end; chunk += kChunk) {
      float part[kEach][kEach] = {};
      const int64_t last = chunk + kChunk < end ? chunk + kChunk : end;
      for (int64_t j = chunk; j < last; j += kDepth) {
        if constexpr (kIsNear<Term>) {
          if (!ld(in.near + i0 / kTile * in.near_own + j / kTile * in.near_other)) continue;
        }
        __syncthreads();
        stage_rows(other, j, k0, s.other);
        if constexpr (Term::kOtherWeights) stage_rows(other_w, j, k0, s.w);
        stage_factors<Term>(in, i0, j, s);
        __syncthreads();
        const int count = last - j < kDepth ? static_cast<int>(last - j) : kDepth;
        for (int t = 0; t < count; ++t) {
          const auto theirs = four(s.other + t * kTile + tx * kEach);
          const int at = turned(t, ty * kEach);
          const auto first = four(s.first + at);
          Pack<float, 4> scale = {}, second = {};
          if constexpr (Term::kOtherWeights) scale = four(s.w + t * kTile + tx * kEach);
          if constexpr (Term::kSecond) second = four(s.second + at);
          for (int r = 0; r < kEach; ++r) {
            for (int e = 0; e < kEach; ++e) {
              if constexpr (kIsChebyshev<Term>) {
                Term::add_at(part[r][e], mine[r][e], theirs[e], first[r], second[r], k + e);
              } else {
                a.term.add(part[r][e], mine[r][e], theirs[e], scale[e], first[r], second[r]);
              }
            }
          }
        }
      }
      for (int r = 0; r < kEach; ++r) {
        for (int e = 0; e < kEach; ++e) total[r][e] += part[r][e];
      }
    }
    const bool packed = packs(in.to, in.d);
    for (int r = 0; r < kEach; ++r) {
      const int64_t i = i0 + ty * kEach + r;
      if (i >= in.n || k >= d) continue;
      float* to = in.to + (split * in.n + i) * in.d + k;
      float before[kEach] = {}, sum[kEach];
      if (in.add) load_four(to, 1, d - k, packed, before);
      if constexpr (kIsNear<Term>) {
        const float far = ld(in.totals + i);
        for (int e = 0; e < kEach; ++e) before[e] = mine[r][e] * far - before[e];
      }
      for (int e = 0; e < kEach; ++e) {
        float v = total[r][e];
        const bool real = k + e < d;
        const float* w = in.own_w + i * in.own_w_stride + k + e;
        if constexpr (Term::kFinish) {
          v = a.term.finish(v, mine[r][e], in.own_w && real ? ld(w) : 1.0f);
        } else {
          if (in.own_w && real) v *= ld(w);
        }
        sum[e] = before[e] + v;
      }
      store_four(to, d - k, packed, sum);
    }
  }
}

int run_distance_gradient(const DistanceGradient& a, Stream stream) {
  namespace rules = distance_rules;
  using Math = FloatMath;
  const auto of = [&](auto term) {
    using Term = decltype(term);
    const GradientArguments<Term> arguments = {a, term};
    const int64_t tasks = tiles_of(a.n, a.d) * ((a.m + a.span - 1) / a.span);
    return launch(distance_gradient<Term>, blocks_for(tasks), kThreads, 0, stream, arguments);
  };
  switch (a.term) {
    case kSignTerm:
      return of(rules::SignTerm<Math>{});
    case kMinkowskiTerm:
      if (a.p == 3) return of(rules::MinkowskiTerm<Math, 3>(3));
      if (a.p == 4) return of(rules::MinkowskiTerm<Math, 4>(4));
      return of(rules::MinkowskiTerm<Math, 0>(a.p));
    case kChebyshevTerm:
      return of(ChebyshevTerm{});
    case kCanberraTerm:
      return of(rules::CanberraTerm<Math>{});
    case kCanberraShare:
      return of(rules::CanberraShare<Math>{});
    case kBraycurtisTerm:
      return of(rules::BraycurtisTerm<Math>{});
    case kJensenShannonTerm:
      return of(rules::JensenShannonTerm<Math>{});
    case kKlOfX:
      return of(rules::KlOfX<Math>{});
    case kKlOfY:
      return of(rules::KlOfY<Math>{});
    case kScaledOfX:
      return of(rules::ScaledOfX<Math>{});
    case kScaledOfY:
      return of(rules::ScaledOfY<Math>{});
    case kScaledOfW:
      return of(rules::ScaledOfW<Math>{});
    case kNearSquared:
      return of(NearTerm<false>{});
    case kNearEuclidean:
      return of(NearTerm<true>{});
    default:
      return 1;
  }
}
FL_EXPORT(distance_gradient, DistanceGradient, DISTANCE_GRADIENT_FIELDS, run_distance_gradient)

}  // namespace fused_losses::cuda::distances
