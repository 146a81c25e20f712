// The k best columns of each row: the judge. It scores chosen columns, or every one, in double from
// the rows themselves.
#include "lists.h"
#include "rows.h"

namespace fused_losses::cuda::topk {

// Larger is better; of equals, the lower column.
struct alignas(16) Scored {
  int64_t order, column;
};

constexpr Scored kNothing = {INT64_MIN, INT64_MAX};

FL_DEVICE bool before(const Scored& a, const Scored& b) {
  return a.order > b.order || (a.order == b.order && a.column < b.column);
}

FL_DEVICE int64_t order_of(double score, bool largest) {
  const double v = largest ? score : -score, key = v == 0 ? 0.0 : v;
  int64_t bits;
  memcpy(&bits, &key, 8);
  return bits ^ (bits >> 63 & INT64_MAX);
}

FL_DEVICE double score_of(int64_t order, bool largest) {
  const int64_t bits = order ^ (order >> 63 & INT64_MAX);
  double v;
  memcpy(&v, &bits, 8);
  return largest || v == 0 ? v : -v;
}

#define EXACT_FIELDS(F)                                                       \
  PAIR_FIELDS(F)                                                              \
  F(const void*, x)          /* [n, d] */                                     \
  F(const void*, y)          /* [m, d] */                                     \
  F(const float*, y_scale)   /* [m], null: 1 */                               \
  F(const double*, x_square) /* [n] |x|^2, with cosine */                     \
  F(const int32_t*, listed)  /* [n, columns], -1: none; null: all of y */     \
  F(const int64_t*, rows)    /* those to do; null: every one */               \
  F(const int64_t*, count)   /* how many of them; null: n */                  \
  F(void*, parts)            /* [n, splits, k] Scored, null with one split */ \
  F(double*, keys)           /* [n, k] */                                     \
  F(int64_t*, index)                                                          \
  F(int64_t, stride_x)                                                        \
  F(int64_t, stride_y)                                                        \
  F(int64_t, n)                                                               \
  F(int64_t, d)                                                               \
  F(int64_t, columns)                                                         \
  F(int64_t, span) /* columns of a split */                                   \
  F(int32_t, splits)                                                          \
  F(int32_t, k)                                                               \
  F(int32_t, slots) /* a power of two, k or more */                           \
  F(int32_t, width) /* columns at a time, a power of two */                   \
  F(int32_t, group)                                                           \
  F(int32_t, places) /* of x in shared memory */                              \
  F(int32_t, x_type)                                                          \
  F(int32_t, y_type)                                                          \
  F(int32_t, kind)                                                            \
  F(bool, largest)
FL_ARGUMENTS(ExactArguments, EXACT_FIELDS)

// The list of a row as keys and indices.
FL_DEVICE void write_best(const ExactArguments& a, int64_t i, const Scored* list) {
  FL_ROLLED
  for (int s = threadIdx.x; s < a.k; s += kThreads) {
    const Scored v = list[s];
    const bool some = v.column != kNothing.column;
    st(a.keys + i * a.k + s, some ? score_of(v.order, a.largest) : double(NAN));
    st(a.index + i * a.k + s, some ? v.column : -1);
  }
}

// A group's score of one column; all lanes of the warp come.
template <class T>
FL_DEVICE double exact_score(const ExactArguments& a, const double* x, int64_t i, int64_t j,
                             bool real) {
  double sum = 0, square = 0;
  if (real) {
    const T* const y = static_cast<const T*>(a.y);
    const double scale = a.y_scale ? ld(a.y_scale + j) : 1.0;
    const bool apart = a.kind == kSquaredDistance;
    for_share(y + j * a.stride_y, a.d, a.group, threadIdx.x % a.group, packs(y, a.stride_y),
              [&](int64_t, int64_t place, double v) {
                const double w = v * scale, u = apart ? x[place] - w : x[place];
                sum += u * (apart ? u : w);
                square += w * w;
              });
  }
  sum = group_sum(sum, a.group);
  if (a.kind != kCosine) return sum;
  return cosine_of(sum, ld(a.x_square + i), group_sum(square, a.group));
}

// A block for a range of a row's columns. Rows beyond `count` cost nothing.
template <class T>
FL_KERNEL(kThreads, kBlocks)
exact_best(ExactArguments a) {
  Scored* const list = reinterpret_cast<Scored*>(dynamic_shared());
  Scored* const fresh = list + a.slots;
  double* const x = reinterpret_cast<double*>(fresh + a.width);  // as for_share places it
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, per = kWarp / a.group;
  const int64_t count = a.count ? ld(a.count) : a.n;
  const int split = int(blockIdx.x) % a.splits;
  for (int64_t nth = int(blockIdx.x) / a.splits; nth < count; nth += int(gridDim.x) / a.splits) {
    const int64_t i = a.rows ? ld(a.rows + nth) : nth;
    FL_ROLLED
    for (int k = threadIdx.x; k < a.places; k += kThreads) {
      const int pack = k / kPack<T>, round = pack / a.group * kPack<T> + k % kPack<T>;
      x[round * a.group + pack % a.group] =
          k < a.d ? load_element(a.x, a.x_type, i * a.stride_x + k) : 0.0;
    }
    FL_ROLLED
    for (int s = threadIdx.x; s < a.slots; s += kThreads) list[s] = kNothing;
    __syncthreads();
    const int64_t begin = int64_t(split) * a.span;
    const int64_t end = begin + a.span < a.columns ? begin + a.span : a.columns;
    for (int64_t base = begin; base < end; base += a.width) {
      bool hit = false;
      const Scored worst = list[a.k - 1];
      for (int first = warp * per; first < a.width; first += kWarps * per) {
        const int at = first + lane / a.group;
        bool real = at < a.width && base + at < end;
        int64_t j = base + at;
        if (real && a.listed) {
          j = ld(a.listed + i * a.columns + j);
          real = j >= 0;
        } else if (real) {
          real = allowed(a, i, j);
        }
        const double score = exact_score<T>(a, x, i, j, real);
        if (lane % a.group != 0 || at >= a.width) continue;
        Scored v = kNothing;
        if (real && score == score) v = {order_of(score, a.largest), j};
        fresh[at] = v;
        hit |= before(v, worst);
      }
      if (!__syncthreads_or(hit)) continue;
      sort<BlockTeam>(fresh, a.width);
      merge<BlockTeam>(list, a.slots, fresh, a.width);
    }
    if (a.parts) {
      Scored* const to = static_cast<Scored*>(a.parts) + (nth * a.splits + split) * a.k;
      FL_ROLLED
      for (int s = threadIdx.x; s < a.k; s += kThreads) st(to + s, list[s]);
    } else {
      write_best(a, i, list);
    }
    __syncthreads();
  }
}

// The best of all splits of a row.
FL_KERNEL(kThreads) merge_splits(ExactArguments a) {
  Scored* const list = reinterpret_cast<Scored*>(dynamic_shared());
  Scored* const fresh = list + a.slots;
  const int64_t count = a.count ? ld(a.count) : a.n;
  for (int64_t nth = blockIdx.x; nth < count; nth += gridDim.x) {
    for (int64_t split = 0; split < a.splits; ++split) {
      const Scored* const from =
          static_cast<const Scored*>(a.parts) + (nth * a.splits + split) * a.k;
      Scored* const to = split == 0 ? list : fresh;
      FL_ROLLED
      for (int s = threadIdx.x; s < a.slots; s += kThreads) {
        to[s] = s < a.k ? ld(from + s) : kNothing;
      }
      __syncthreads();
      if (split > 0) merge<BlockTeam>(list, a.slots, fresh, a.slots);
    }
    write_best(a, a.rows ? ld(a.rows + nth) : nth, list);
    __syncthreads();
  }
}

int run_topk_exact(ExactArguments a, Stream stream) {
  const int code = with_row_type(a.y_type, [&](auto zero) {
    using T = decltype(zero);
    a.group = sharing<T>(a.d);
    a.places = static_cast<int32_t>(round_up(a.d, int64_t(a.group) * kPack<T>));
    const size_t shared = sizeof(Scored) * (a.slots + a.width) + sizeof(double) * a.places;
    const int64_t rows = grid_of(a.n, static_cast<int>((8 + a.splits - 1) / a.splits));
    return launch(exact_best<T>, rows * a.splits, kThreads, shared, stream, a);
  });
  if (code || !a.parts) return code;
  return launch(merge_splits, grid_of(a.n, 8), kThreads, 2 * sizeof(Scored) * a.slots, stream, a);
}
FL_EXPORT(topk_exact, ExactArguments, EXACT_FIELDS, run_topk_exact)

}  // namespace fused_losses::cuda::topk
