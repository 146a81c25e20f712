// Scores of listed pairs, without torch (fused_losses/primitives/listed).
//
//   score_k = <x_i, y_j>, or with apart |x_i - y_j|^2          of line k = (i, j)
//
// A row with an entry that is not finite has scores of NaN.
#pragma once

#include "row_statistics.h"

namespace fused_losses {

struct ListedProblem {
  Matrix x, y;                    // [n, d] and [m, d], of one type
  const int64_t *rows, *columns;  // [pairs], in range
  int64_t n, m, d, pairs;
  bool own;    // y is x, whose gradient is then that of both
  bool apart;  // of differences
};

struct ListedKernels {
  size_t (*bytes)(const ListedProblem&, int threads, bool backward);
  // score [pairs] in the type that sums are held in
  void (*forward)(const ListedProblem&, void* score, void* buffer, const Parallel&);
  // grad [pairs] in that type; dx [n, d] and dy [m, d] in the rows' own, null where not asked for;
  // dy is null of own rows
  void (*backward)(const ListedProblem&, const void* grad, void* dx, void* dy, void* buffer,
                   const Parallel&);
};

}  // namespace fused_losses
