// Columns listed in `exclude` get the mark in place of their product.
#include "tile.h"

namespace fused_losses::cuda::pairs {

#define EXCLUDE_FIELDS(F)                        \
  PAIR_FIELDS(F)                                 \
  F(const int32_t*, exclude) /* [n, excluded] */ \
  F(int64_t, excluded)
FL_ARGUMENTS(ExcludeArguments, EXCLUDE_FIELDS)

FL_KERNEL(kThreads) exclude_pairs(ExcludeArguments a) {
  // 32 bits within a tile: a division of 64 bits is a call
  const uint32_t excluded = a.excluded, count = (a.row_end - a.first_row) * excluded;
  for (uint32_t k = blockIdx.x * kThreads + threadIdx.x; k < count; k += gridDim.x * kThreads) {
    const int64_t row = k / excluded, at = ld(a.exclude + a.first_row * a.excluded + k);
    if (at < a.first_column || at >= a.column_end) continue;
    st(a.tile + row * a.stride + at - a.first_column, __int_as_float(kExcluded));
  }
}

int run_exclude(const ExcludeArguments& a, Stream stream) {
  const int64_t count = (a.row_end - a.first_row) * a.excluded;
  return launch(exclude_pairs, blocks_for(ceil_div(count, kThreads)), kThreads, 0, stream, a);
}

FL_EXPORT(pair_exclude, ExcludeArguments, EXCLUDE_FIELDS, run_exclude)

}  // namespace fused_losses::cuda::pairs
