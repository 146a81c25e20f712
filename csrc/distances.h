// The matrix of distances, without torch: out[i][j] = the distance of x's row i from y's row j, and
// its gradient. The meaning of each kind: primitives/distances.
#pragma once

#include "common.h"

namespace fused_losses {

enum class Distance {
  kDot,
  kSquared,
  kEuclidean,
  kCityblock,
  kMinkowski,
  kChebyshev,
  kCanberra,
  kBraycurtis,
  kJensenShannon,
  kKl,
  kHamming,
  kJaccard,
  kScaled,
};

struct DistanceProblem {
  const void *x, *y;  // [n, d] and [m, d] dense, float or double; with is_bool bytes 0 and 1
  const void* w;      // [d] or null; kScaled: [m, d]; in the type of x
  int64_t n, m, d;
  Distance kind;
  double p;  // of kMinkowski
  bool is_double;
  bool is_bool;  // kHamming and kJaccard without weights; distances in float
  Precision precision;
  int64_t out_stride;  // elements between rows of distances, 0: m
  int64_t between() const { return out_stride ? out_stride : m; }
};

struct DistanceBackwardIn {
  const void* grad;  // [n, m] in the type of x; elements `row_stride` and `column_stride` apart
  int64_t row_stride, column_stride;
  const void* out;  // [n, m] as the forward returned it
};

// In the type of x, dense, each may be null; they are written whole.
struct DistanceBackwardOut {
  void *dx, *dy;  // [n, d], [m, d]
  void* dw;       // kCanberra [d], kScaled [m, d]
};

struct DistanceKernels {
  size_t (*forward_bytes)(const DistanceProblem&, int threads);
  void (*forward)(const DistanceProblem&, void* out, void* buffer, const Parallel&);
  size_t (*backward_bytes)(const DistanceProblem&, const DistanceBackwardOut&, int threads);
  void (*backward)(const DistanceProblem&, const DistanceBackwardIn&, const DistanceBackwardOut&,
                   void* buffer, const Parallel&);
};

}  // namespace fused_losses
