// The sweep over pairs on tiles of products (the maths: primitives/pairs,
// backends/cuda_pairs.py).
//
// A tile is a block of rows against a block of columns, [rows, stride] float, made by the library
// and still in L2. Work goes in two shapes: by rows, where a warp owns whole rows and their sums,
// and by columns, where a thread owns kWide columns of a segment of rows and keeps their vectors in
// registers. No atomics: every sum has one owner and a fixed order.
#pragma once

#include "../warp.h"

namespace fused_losses::cuda::pairs {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kWide = 4;                // columns of a thread: 16 bytes of the tile
constexpr int kAcross = kWarp * kWide;  // columns of a warp
constexpr int64_t kSegment = 128;       // rows of a block that goes down columns
// the bits of a product that is listed in `exclude`: a NaN
constexpr int32_t kExcluded = 0x7fe51ded;

// clang-format off
#define PAIR_FIELDS(F)                                                                            \
  F(float*, tile)            /* products, [rows, stride], 16-byte aligned */                      \
  F(int64_t, stride)         /* a multiple of kWide */                                            \
  F(const float*, scale)     /* [1] */                                                            \
  F(const float*, x_bias)    /* [n] or null; so are all vectors */                                \
  F(const float*, y_bias)    /* [m] */                                                            \
  F(const int32_t*, x_labels) F(const int32_t*, y_labels)                                         \
  F(const int32_t*, x_ids) F(const int32_t*, y_ids)                                               \
  F(const int32_t*, x_groups) F(const int32_t*, y_groups)                                         \
  F(const float*, x_window)  /* [4, n] */                                                         \
  F(const float*, y_window)  /* [4, m] */                                                         \
  F(double, positive_factor) F(double, positive_center) F(double, positive_reach)                 \
  F(double, negative_factor) F(double, negative_center) F(double, negative_reach)                 \
  F(bool, root) F(bool, skip_self) F(bool, triangle) F(int32_t, reduction)                        \
  F(int64_t, n) F(int64_t, m)                                                                     \
  F(int64_t, first_row) F(int64_t, row_end) F(int64_t, first_column) F(int64_t, column_end)
// clang-format on

template <class T>
FL_DEVICE void store_as(void* tile, int64_t at, const float* v) {
  Pack<T, kWide> out;
  for (int c = 0; c < kWide; ++c) out[c] = from_float<T>(v[c]);
  st(reinterpret_cast<Pack<T, kWide>*>(static_cast<T*>(tile) + at), out);
}

// The type differs between launches alone: a kernel for each would differ in this store alone.
FL_DEVICE void store_row(int32_t type, void* tile, int64_t at, const float* v) {
  if (type == kTypeFloat) {
    store_as<float>(tile, at, v);
  } else if (type == kTypeBf16) {
    store_as<Bf16>(tile, at, v);
  } else {
    store_as<Half>(tile, at, v);
  }
}

// A tile for those that go by columns: groups of columns, segments of rows.
struct Cut {
  uint32_t groups, segments;

  template <class A>
  FL_FUNCTION explicit Cut(const A& a)
      : groups((a.column_end - a.first_column + kAcross - 1) / kAcross),
        segments((a.row_end - a.first_row + kSegment - 1) / kSegment) {}
  FL_FUNCTION uint32_t count() const { return groups * segments; }
  FL_FUNCTION int64_t column(uint32_t work) const { return work % groups * kAcross; }
  FL_FUNCTION int64_t segment(uint32_t work) const { return work / groups; }
};

// By columns: f(first column, first row, end row) of a thread, its rows kWarps apart.
template <class A, class F>
FL_DEVICE void down_columns(const A& a, F&& f) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Cut cut(a);
  for (uint32_t work = blockIdx.x; work < cut.count(); work += gridDim.x) {
    const int64_t j = a.first_column + cut.column(work) + lane * kWide;
    const int64_t begin = a.first_row + cut.segment(work) * kSegment;
    const int64_t end = begin + kSegment < a.row_end ? begin + kSegment : a.row_end;
    if (j < a.column_end) f(j, begin + warp, end);
  }
}

inline int64_t blocks_for(int64_t work) { return grid_of(work, 8); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class A>
int64_t row_blocks(const A& a, int rows) {
  return blocks_for(ceil_div(a.row_end - a.first_row, rows * kWarps));
}

template <class A>
int64_t column_blocks(const A& a) {
  return blocks_for(Cut(a).count());
}

}  // namespace fused_losses::cuda::pairs
