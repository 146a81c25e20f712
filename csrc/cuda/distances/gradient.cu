// The gradient of distances, a sum over the rows of the other side: a block owns 64 rows by 64
// coordinates, and the rows of the other side go by with the factors of their pairs.
#include "tile.h"

namespace fused_losses::cuda::distances {

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

// f (other - own) of near pairs, f as it is given.
struct NearPairTerm : distance_rules::DifferenceTerm<FloatMath, true> {
  FL_DEVICE static float factor(float g, float out, float& size) {
    return is_near(out, size, false) ? g : 0.0f;
  }
};

template <class Term>
constexpr bool kIsChebyshev = std::is_same_v<Term, ChebyshevTerm>;
template <class Term>
constexpr bool kIsNear = std::is_same_v<Term, NearTerm<false>> ||
                         std::is_same_v<Term, NearTerm<true>> || std::is_same_v<Term, NearPairTerm>;

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
  kNearPair,
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
  F(const float*, totals) /* of the near terms of distances, [n] */ \
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
  F(bool, add) /* to what `to` has; with totals: to own totals - to */ \
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
    if constexpr (kIsNear<Term>) {
      bool any = in.totals != nullptr;
      for (int64_t j = split * in.span; j < end && !any; j += kTile) {
        any = ld(in.near + i0 / kTile * in.near_own + j / kTile * in.near_other) != 0;
      }
      // nothing is added: rows need not be read
      if (!any) continue;
    }
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
      if (kIsNear<Term> && in.totals) {
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
    case kNearPair:
      return of(NearPairTerm{});
    default:
      return 1;
  }
}
FL_EXPORT(distance_gradient, DistanceGradient, DISTANCE_GRADIENT_FIELDS, run_distance_gradient)

}  // namespace fused_losses::cuda::distances
