// Sums over all triplets of a row of scores, by counting, without torch
// (fused_losses/primitives/row_rules/rules.py).
//
//   loss = sum over positives p, negatives n of max(0, d_p - d_n + margin), over those of a kind:
//   hard: d_n <= d_p, semihard: d_n > d_p. Its slope in d_p is the number of the triplets of p that
//   are not 0, in d_n minus the number of those of n.
#pragma once

#include "common.h"

namespace fused_losses {

enum class Triplet { kAll, kHard, kSemihard };

struct TripletProblem {
  const void* score;                // [rows, columns], float or double
  const bool *positive, *negative;  // [rows, columns], disjoint
  int64_t rows, columns;
  double margin;
  Triplet kind;
  bool is_double;
};

struct TripletKernels {
  size_t (*bytes)(const TripletProblem&, int threads);
  // statistics [rows, 2]: the sum, NaN where a pair of a row with triplets is NaN, and the number
  void (*forward)(const TripletProblem&, double* statistics, void* buffer, const Parallel&);
  // slope [rows, columns] in the type of the score, times grad [rows] of that type
  void (*backward)(const TripletProblem&, const void* grad, void* slope, void* buffer,
                   const Parallel&);
};

}  // namespace fused_losses
