// Values weighted by the softmax over a row's pairs of one class, and the gradient.
#include "scoring.h"

namespace fused_losses::cuda::pairs {

#define ATTENTION_FIELDS(F)                                                                 \
  PAIR_FIELDS(F)                                                                            \
  F(int32_t, kind) /* the class of the pairs that are attended to */                        \
  F(float*, best)  /* [n] the largest z so far */                                           \
  F(double*, mass) /* [n] sum exp(z - best) so far */                                       \
  F(float*, out)   /* [n, width] sum exp(z - best) values so far, dense */                  \
  F(int64_t, width)                                                                         \
  F(void*, weights)         /* [rows, weight_stride] unit exp(z - best); may be the tile */ \
  F(int64_t, weight_stride) /* a multiple of kWide */                                       \
  F(float, unit) F(int32_t, type)
FL_ARGUMENTS(AttentionArguments, ATTENTION_FIELDS)

// z of the class that is attended to, -inf for the other pairs.
template <class A>
FL_DEVICE pair_rules::Term<FloatMath> attended(const A& a, const Scoring& scoring, float product,
                                               int64_t i, const OfRow& x, const Bounds& bounds,
                                               int64_t j, const OfColumns& y, int c) {
  const float s = scoring.score(product, x.bias, y.bias[c]);
  // both classes have the rule of the one
  auto term = scoring.term<kNegative>(s);
  const bool member = class_of(a, product, i, x, j, y, c) == a.kind;
  if (!member || !bounds.holds(s)) term.z = kNone;
  return term;
}

// By rows: weights under a running maximum; where it grows, the output so far shrinks.
FL_KERNEL(kThreads)
pair_attention(AttentionArguments a) {
  const Scoring scoring(a);
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t i = a.first_row + warp; i < a.row_end; i += int64_t(gridDim.x) * kWarps) {
    const OfRow x(a, i);
    const Bounds bounds(a.x_window, a.kind, i, a.n);
    const float* products = a.tile + (i - a.first_row) * a.stride - a.first_column;
    float high = kNone;
    for (int64_t j = a.first_column + lane * kWide; j < a.column_end; j += kAcross) {
      const OfColumns y(a, j);
      const auto product = ld_pack(products + j);
      for (int c = 0; c < kWide; ++c) {
        const float z = attended(a, scoring, product[c], i, x, bounds, j, y, c).z;
        high = z > high ? z : high;
      }
    }
    high = warp_max(high);
    const float before = ld(a.best + i);
    high = before > high ? before : high;
    const float shift = high == kNone ? 0.0f : high;
    float mass = 0;
    for (int64_t j = a.first_column + lane * kWide; j < a.column_end; j += kAcross) {
      const OfColumns y(a, j);
      const auto product = ld_pack(products + j);
      float weight[kWide];
      for (int c = 0; c < kWide; ++c) {
        weight[c] = expf(attended(a, scoring, product[c], i, x, bounds, j, y, c).z - shift);
        mass += weight[c];
        weight[c] *= a.unit;
      }
      store_row(a.type, a.weights, (i - a.first_row) * a.weight_stride + j - a.first_column,
                weight);
    }
    mass = warp_sum(mass);
    const double old = ld(a.mass + i);
    // no lane may write the state that another has yet to read
    __syncwarp();
    const float shrink = expf(before - shift);
    if (lane == 0) {
      st(a.best + i, high);
      st(a.mass + i, old * shrink + mass);
    }
    if (old == 0 || shrink == 1.0f) continue;
    for (int64_t e = lane; e < a.width; e += kWarp) {
      float* at = a.out + i * a.width + e;
      st(at, ld(at) * shrink);
    }
  }
}

int run_attention(const AttentionArguments& a, Stream stream) {
  return launch(pair_attention, row_blocks(a, 1), kThreads, 0, stream, a);
}

FL_EXPORT(pair_attention, AttentionArguments, ATTENTION_FIELDS, run_attention)

#define ATTENTION_GRADIENT_FIELDS(F)                                                        \
  PAIR_FIELDS(F)                                                                            \
  F(int32_t, kind)                                                                          \
  F(const float*, base)  /* [2, n] lse rounded, and exp(that - lse) */                      \
  F(const float*, shift) /* [n] grad_lse - <grad_out, out> */                               \
  F(const float*, into)  /* [rows, stride] <grad_out, values>, or null: no G */             \
  F(void*, weights)      /* [rows, low_stride] unit softmax(z), or null; may be the tile */ \
  F(void*, ds)           /* [rows, low_stride] G, or null; may be `into` */                 \
  F(int32_t, ds_type)                                                                       \
  F(int64_t, low_stride) /* a multiple of kWide */                                          \
  F(float, unit) F(int32_t, type)
FL_ARGUMENTS(AttentionGradientArguments, ATTENTION_GRADIENT_FIELDS)

// By columns: a tile of the weights and of G.
FL_KERNEL(kThreads)
pair_attention_gradients(AttentionGradientArguments a) {
  const Scoring scoring(a);
  down_columns(a, [&](int64_t j, int64_t begin, int64_t end) {
    const OfColumns y(a, j);
    for (int64_t i = begin; i < end; i += kWarps) {
      const OfRow x(a, i);
      const Bounds bounds(a.x_window, a.kind, i, a.n);
      const int64_t row = i - a.first_row, column = j - a.first_column;
      const auto product = ld_pack(a.tile + row * a.stride + column);
      Pack<float, kWide> through = {};
      if (a.into) through = ld_pack(a.into + row * a.stride + column);
      const float base = ld(a.base + i), rest = ld(a.base + a.n + i), shift = ld(a.shift + i);
      float weight[kWide], g[kWide];
      for (int c = 0; c < kWide; ++c) {
        const auto term = attended(a, scoring, product[c], i, x, bounds, j, y, c);
        const bool member = term.z != kNone;
        const float p = member ? expf(term.z - base) * rest : 0.0f;
        weight[c] = p * a.unit;
        g[c] = member ? p * term.slope * (through[c] + shift) : 0.0f;
      }
      if (a.weights) store_row(a.type, a.weights, row * a.low_stride + column, weight);
      if (a.ds) store_row(a.ds_type, a.ds, row * a.low_stride + column, g);
    }
  });
}

int run_attention_gradients(const AttentionGradientArguments& a, Stream stream) {
  return launch(pair_attention_gradients, column_blocks(a), kThreads, 0, stream, a);
}

FL_EXPORT(pair_attention_gradients, AttentionGradientArguments, ATTENTION_GRADIENT_FIELDS,
          run_attention_gradients)

}  // namespace fused_losses::cuda::pairs
