// The gradient of the statistics: a tile of it from a tile of products.
#include "scoring.h"

namespace fused_losses::cuda::pairs {

constexpr int kVectors = 4;  // of a class: base, mean, rest, share

#define GRADIENT_FIELDS(F)                                                                    \
  PAIR_FIELDS(F)                                                                              \
  F(const float*, row_vectors)    /* [2, kVectors, n] */                                      \
  F(const float*, column_vectors) /* [2, kVectors, m], or null: columns have no statistics */ \
  F(void*, ds)                    /* [rows, ds_stride] G; may be the tile */                  \
  F(int64_t, ds_stride)           /* a multiple of kWide */                                   \
  F(int32_t, type)                /* of G */
FL_ARGUMENTS(GradientArguments, GRADIENT_FIELDS)

// A tile of G = dL/du.
FL_KERNEL(kThreads)
pair_gradients(GradientArguments a) {
  const Scoring scoring(a);
  const Reduction f = static_cast<Reduction>(a.reduction);
  const int classes = a.x_labels ? kClasses : 1;
  down_columns(a, [&](int64_t j, int64_t begin, int64_t end) {
    const OfColumns y(a, j);
    BothBounds bounds[kWide];
    for (int c = 0; c < kWide; ++c) {
      bounds[c] = BothBounds(a.y_window, j + c < a.column_end ? j + c : j, a.m);
    }
    Pack<float, kWide> of_column[kClasses][kVectors] = {};
    each_class([&](auto k) {
      if (!a.column_vectors || (k == kPositive && classes == 1)) return;
      for (int v = 0; v < kVectors; ++v) {
        of_column[k][v] = neighbours(a.column_vectors + (k * kVectors + v) * a.m, j, a.column_end);
      }
    });
    for (int64_t i = begin; i < end; i += kWarps) {
      const int64_t row = i - a.first_row, column = j - a.first_column;
      float g[kWide] = {};
      if (!a.triangle || i < j + kWide - 1) {
        const OfRow x(a, i);
        const BothBounds own(a.x_window, i, a.n);
        const auto product = ld_pack(a.tile + row * a.stride + column);
        each_class([&](auto k) {
          if (k == kPositive && classes == 1) return;
          float of_row[kVectors];
          for (int v = 0; v < kVectors; ++v) {
            of_row[v] = ld(a.row_vectors + (k * kVectors + v) * a.n + i);
          }
          for (int c = 0; c < kWide; ++c) {
            if (class_of(a, product[c], i, x, j, y, c) != k) continue;
            const float s = scoring.score(product[c], x.bias, y.bias[c]);
            const auto term = scoring.term<k>(s);
            if (term.z == kNone) continue;
            float through = 0;
            if (own.of[k].holds(s)) {
              through = pair_rules::side_slope<FloatMath>(f, term.z, of_row[0], of_row[1],
                                                          of_row[2], of_row[3]);
            }
            if (a.column_vectors && bounds[c].of[k].holds(s)) {
              const auto& v = of_column[k];
              through +=
                  pair_rules::side_slope<FloatMath>(f, term.z, v[0][c], v[1][c], v[2][c], v[3][c]);
            }
            g[c] = through * term.slope;
          }
        });
      }
      store_row(a.type, a.ds, row * a.ds_stride + column, g);
    }
  });
}

int run_gradients(const GradientArguments& a, Stream stream) {
  return launch(pair_gradients, column_blocks(a), kThreads, 0, stream, a);
}

FL_EXPORT(pair_gradients, GradientArguments, GRADIENT_FIELDS, run_gradients)

}  // namespace fused_losses::cuda::pairs
