// The k best columns of each row: what the screen needs of the bank's rows.
#include "lists.h"
#include "rows.h"

namespace fused_losses::cuda::topk {

#define BANK_FIELDS(F)                                                \
  F(const void*, y)        /* [rows, d] */                            \
  F(const double*, center) /* [d], null: 0 */                         \
  F(const float*, scale)   /* [rows], null: 1 */                      \
  F(float*, multiplier)    /* [rows], null: not asked; as the next */ \
  F(float*, offset)                                                   \
  F(double*, longest) /* [parts], max |y - center| so far */          \
  F(double*, squares) /* [rows] |y - center|^2 */                     \
  F(int64_t, stride)                                                  \
  F(int64_t, rows)                                                    \
  F(int64_t, d)                                                       \
  F(int64_t, parts)                                                   \
  F(int32_t, type)                                                    \
  F(int32_t, group)                                                   \
  F(int32_t, kind)                                                    \
  F(bool, largest)
FL_ARGUMENTS(BankArguments, BANK_FIELDS)

struct BankShared {
  double most[kWarps];
};

// A row with NaN is not the longest: it needs no bound, for its key comes before all others.
template <class T>
FL_KERNEL(kThreads)
bank_rows(BankArguments a) {
  FL_SHARED(BankShared, s);
  const T* const y = static_cast<const T*>(a.y);
  const bool aligned = packs(y, a.stride);
  const int lane = threadIdx.x % kWarp, per = kWarp / a.group, part = lane % a.group;
  const int64_t step = int64_t(gridDim.x) * kWarps * per;
  double longest = 0;
  // every lane of a warp takes part in the sums, with a row or without
  for (int64_t base = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * per; base < a.rows;
       base += step) {
    const int64_t j = base + lane / a.group;
    const bool real = j < a.rows;
    double square = 0;
    if (real) {
      const double scale = a.scale ? ld(a.scale + j) : 1.0;
      for_share(y + j * a.stride, a.d, a.group, part, aligned, [&](int64_t k, int64_t, double v) {
        v *= scale;
        // codes have no center
        if constexpr (sizeof(T) > 1) {
          if (a.center && k < a.d) v -= ld(a.center + k);
        }
        square += v * v;
      });
    }
    square = group_sum(square, a.group);
    if (!real || part != 0) continue;
    if (a.squares) st(a.squares + j, square);
    const double length = std::sqrt(square);
    if (a.multiplier) {
      const double m = a.kind == kCosine ? inverse_length(square) : 1.0;
      st(a.multiplier + j, float(m) * (a.scale ? ld(a.scale + j) : 1.0f));
    }
    if (a.offset) st(a.offset + j, float(a.largest ? square / 2 : -square / 2));
    if (length > longest) longest = length;
  }
  if (a.longest == nullptr) return;
  longest = block_reduce(longest, s.most, [](double u, double v) { return u > v ? u : v; });
  if (threadIdx.x != 0) return;
  double* const mine = a.longest + blockIdx.x;
  if (longest > ld(mine)) st(mine, longest);
}

int run_topk_bank(BankArguments a, Stream stream) {
  return with_row_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    a.group = sharing<T>(a.d);
    const int64_t each = kWarps * (kWarp / a.group);
    const int64_t blocks = (a.rows + each - 1) / each;
    return launch(bank_rows<T>, blocks < a.parts ? blocks : a.parts, kThreads, 0, stream, a);
  });
}
FL_EXPORT(topk_bank, BankArguments, BANK_FIELDS, run_topk_bank)

}  // namespace fused_losses::cuda::topk
