// The k best columns of each row by a score, exactly, without torch (primitives/topk).
//
// A cheap product screens: a pair whose score cannot reach the k-th best so far, by a bound on the
// rounding of that product, is dropped; what remains is scored again in double. The answer is the
// one of the scores in double, ties to the lowest index, whatever the screen's precision.
#pragma once

#include "row_statistics.h"

namespace fused_losses {

enum class Affinity { kDot, kCosine, kSquaredDistance };
enum class Match { kAny, kSame, kDifferent };

// Rows of a narrow copy of y that screen in its place: y_j is within error[j] of scale[j] codes_j.
struct Codes {
  Matrix rows;  // int8; data null: none
  const float *scale, *error;
};

struct TopkProblem {
  Matrix x;              // [n, d] float or double, dense
  Matrix y;              // [m, d] any type; rows of int8 are multiplied by y_scale
  const float* y_scale;  // [m], for int8 only
  Codes codes;
  int64_t n, m, d, k;
  Affinity affinity;
  bool largest;
  const int32_t *x_labels, *y_labels;  // both or neither
  Match match;
  const int32_t *x_ids, *y_ids;  // equal ids: left out
  const int32_t* exclude;        // [n, excluded] columns left out, -1: none
  int64_t excluded;
  bool skip_self;     // leave out i == j
  bool symmetric;     // y is x and skip_self: half the products
  bool bf16;          // screen with bfloat16 products
  size_t most_bytes;  // what the candidates may take, about
};

// [n, k]; past the last candidate of a row: index -1, key NaN.
struct TopkOut {
  double* keys;  // <x, y>, the cosine or |x - y|^2
  int64_t* index;
};

struct TopkKernels {
  size_t (*bytes)(const TopkProblem&, int threads);
  void (*run)(const TopkProblem&, const TopkOut&, void* buffer, const Parallel&);
};

}  // namespace fused_losses
