// Classes folded by a rule, without torch: what a caller fills in (the maths:
// primitives/class_rules).
//
//   c_ij = pool_k <x_i, w_jk>
//   forward:  of the classes that are none of a row's labels the rule's statistics, and the highest
//   c backward: G_ij = sum_s dstatistic_s slope_s(c_ij) (exp(term_s - statistic_s) of an lse), at
//   its
//             labels dtarget; through the pool and the norms to dx and dw as in row_statistics.h
#pragma once

#include "row_statistics.h"

namespace fused_losses {

enum class ClassRule { kSoftmax, kSummedSoftmax, kSFace, kSphereFace2 };

// A label of a row: where its class stands among those that take part, and its place in [n, slots].
struct ClassLabel {
  int64_t position;
  int64_t row;
  int64_t slot;
};

struct ClassProblem {
  Problem rows;  // k counts centres, `group` of a class; without targets, bias, bend and weights
  ClassRule rule;
  double params[4];
  const void* values;  // [value_rows, n] in the accumulation type, or null
  int64_t value_rows;
  double softness;           // 0: a class's best centre, the first of equal ones
  const ClassLabel* labels;  // [label_count] by increasing position
  int64_t label_count;
  int64_t slots;  // labels a row
};

struct ClassForwardOut {
  double* statistics;   // [S, n]
  int64_t* hardest;     // [n] an id, or -1
  void* hardest_score;  // [n] in the accumulation type
};

struct ClassBackwardIn {
  const void* grad_statistics;  // [S, n] in the accumulation type, as all here
  const void* grad_targets;     // [n, slots]
  const void* statistics;       // [S, n]
};

struct ClassKernels {
  size_t (*forward_bytes)(const ClassProblem&, int threads);
  size_t (*backward_bytes)(const ClassProblem&, int threads, bool dx, bool dw);
  void (*forward)(const ClassProblem&, const ClassForwardOut&, void* buffer, const Parallel&);
  void (*backward)(const ClassProblem&, const ClassBackwardIn&, const BackwardOut&, void* buffer,
                   const Parallel&);
};

}  // namespace fused_losses
