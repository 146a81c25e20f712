// Divergences of two softmaxes over classes, without torch: what a caller fills in.
//
//   u_ij = <x_i, w_j> + b_j                               the student's scores
//   v_ij = <t_i, wt_j> + bt_j  or  scale_i s_ij + bt_j     the teacher's, of rows or dense
//   q_s, q_t: their softmaxes over the classes other than the row's target
//   folds of a kind (the maths and the twin in Python: primitives/divergence/rules.py):
//     kForward, kReverse         KL(q_t || q_s), KL(q_s || q_t)
//     kPower                     P = log sum exp(eps v), the mean of u under that softmax
//     kJensenShannon, kTotalVariation   the value, its slopes in log q_s and in log q_t summed
//     kBernoulli, kBernoulliNorm, kSquared   the value
#pragma once

#include "row_statistics.h"

namespace fused_losses {

enum class DivergenceKind {
  kForward,
  kReverse,
  kPower,
  kJensenShannon,
  kTotalVariation,
  kBernoulli,
  kBernoulliNorm,
  kSquared
};

constexpr int kMostFolds = 3;

constexpr int folds_of(DivergenceKind kind) {
  switch (kind) {
    case DivergenceKind::kPower:
      return 2;
    case DivergenceKind::kJensenShannon:
    case DivergenceKind::kTotalVariation:
      return 3;
    default:
      return 1;
  }
}

// What the forward keeps of a row beside its folds, as pairs (a number, what is beyond it): lse -
// teacher_lse (of kPower lse - P), then means: of u - v under the leading softmax (kForward,
// kReverse), of u (kPower), of the slopes in log q_s and in log q_t under either softmax. Where one
// class has nearly all of a softmax the number is that class's own and the rest a sum over others.
constexpr int kept_of(DivergenceKind kind) {
  switch (kind) {
    case DivergenceKind::kForward:
    case DivergenceKind::kReverse:
    case DivergenceKind::kPower:
      return 4;
    case DivergenceKind::kJensenShannon:
    case DivergenceKind::kTotalVariation:
      return 6;
    default:
      return 0;
  }
}

// Scores [n, *] of any strides, in elements.
struct DenseScores {
  const void* data;  // null: the teacher has rows and weights
  Type type;
  int64_t row_stride, column_stride;
  const void* scale;  // [n] in the accumulation type, or null for 1
};

// Both sides have the same n, k, ids and targets; of a dense teacher x, w and d are empty. What the
// forward keeps for the backward, without bias: u in student.kept; in teacher.kept, where v is not
// dense, u - v of tiles whose sides are near each other and v of the others.
struct DivergenceProblem {
  Problem student, teacher;
  DenseScores dense;
  DivergenceKind kind;
  double param;
};

struct DivergenceForwardOut {
  double *lse, *teacher_lse, *target, *teacher_target;  // [n]; targets with bias and scale
  double* folds;                                        // [folds + kept, n]
};

// Gradients in the accumulation type, [n] each; folds: of the differentiable ones.
struct DivergenceBackwardIn {
  const void *grad_lse, *grad_teacher_lse, *grad_target, *grad_teacher_target;
  const void* grad_folds;  // [folds, n]
  const double *lse, *teacher_lse, *folds;
  const double* kept;  // [kept, n] or null: of the folds
};

// What is asked for of each side; of a dense teacher ddense [n, columns] and dscale [n], both in
// the accumulation type, added to what stands there.
struct DivergenceBackwardOut {
  BackwardOut student, teacher;
  void* ddense;
  int64_t dense_columns;
  void* dscale;
};

struct DivergenceKernels {
  size_t (*forward_bytes)(const DivergenceProblem&, int threads);
  size_t (*backward_bytes)(const DivergenceProblem&, const DivergenceBackwardOut&, int threads);
  void (*forward)(const DivergenceProblem&, const DivergenceForwardOut&, void* buffer,
                  const Parallel&);
  void (*backward)(const DivergenceProblem&, const DivergenceBackwardIn&,
                   const DivergenceBackwardOut&, void* buffer, const Parallel&);
};

}  // namespace fused_losses
