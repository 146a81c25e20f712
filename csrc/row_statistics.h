// The streamed primitive behind margin softmax, without torch: what a caller fills in.
//
//   c_ij = <x_i, w_j>        (w_j / |w_j| with normalize)
//   z_ij = psi_i(c_ij) + b_j,   psi_i(c) = c, or with bend p_i + q_i c + r_i c^2 where c > t_i
//   forward:  lse_i = log sum_{j != y_i} exp z_ij, target_i = c_{i,y_i}, weighted_sum_i, hardest_i
//   backward: H_ij = dlse_i exp(z_ij - lse_i) + dweighted_i v_j,  db_j = sum_{i: y_i != j} H_ij
//             G_ij = psi'_i(c_ij) H_ij,  G_{i,y_i} = dtarget_i
//             dx = G w,  dw = (G^T x - w_hat <w_hat, G^T x>) / |w|
#pragma once

#include <cstddef>
#include <cstdint>

#include "common.h"

namespace fused_losses {

enum class Type { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8 };

// A row whose target stands at `position` among the classes that take part.
struct Target {
  int64_t position;
  int64_t row;
};

// A row-major matrix whose rows are dense; stride in elements.
struct Matrix {
  const void* data;
  Type type;
  int64_t stride;
};

// c[m, n] = (beta) c + op(a) op(b), column-major, as BLAS has it; float or double by the caller.
struct Gemm {
  void (*float32)(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const float* a, int64_t lda,
                  const float* b, int64_t ldb, float beta, float* c, int64_t ldc);
  void (*float64)(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const double* a, int64_t lda,
                  const double* b, int64_t ldb, double beta, double* c, int64_t ldc);
};

struct Problem {
  Matrix x;  // [n, d]
  Matrix w;  // [*, d]
  int64_t n, d;
  int64_t k;                  // classes that take part
  const int64_t* ids;         // [k] their rows in w, or null for 0 .. k-1
  const void* bias;           // [*] in the accumulation type, or null
  const void* column_weight;  // [*] in the accumulation type, or null for 1
  const void* bend;           // [4, n] t, p, q, r in the accumulation type, or null
  const Target* targets;      // [target_count] by increasing position
  int64_t target_count;
  bool normalize;
  bool weighted;
  Precision precision;
  void* kept;  // [kept_classes, padded n] products kept for the backward
  int64_t kept_classes;
  Gemm gemm;          // the host's BLAS, for kernels without wide vectors; may be null
  int64_t group = 1;  // so many neighbours stay in one tile
  int64_t tile = 0;   // classes in a tile; 0: as many as the caches like
};

// Outputs of the forward, [n] each. What decides 1 - p comes in double: a score near 48 has steps
// of 4e-6 in float. The rest is in the accumulation type: float, or double for float64 problems.
struct ForwardOut {
  double* lse;
  double* target;
  void* weighted_sum;  // null unless weighted
  int64_t* hardest;    // an id, or -1
  void* hardest_score;
};

struct BackwardIn {
  const void* grad_lse;       // [n]
  const void* grad_target;    // [n]
  const void* grad_weighted;  // [n] or null
  const void* lse;            // [n]
};

struct BackwardOut {
  void* dx;      // [n, d] dense in x's type, or null
  void* dw;      // [*, d] dense in w's type (rows outside ids are left alone), or null
  void* db;      // [*] in the accumulation type, or null
  bool compact;  // dw is [k, d], a row for each class that takes part
};

// The kernels of one instruction set; buffers are the caller's, 64-byte aligned.
struct RowKernels {
  size_t (*forward_bytes)(const Problem&, int threads);
  size_t (*backward_bytes)(const Problem&, int threads, bool dx, bool dw);
  void (*forward)(const Problem&, const ForwardOut&, void* buffer, const Parallel&);
  void (*backward)(const Problem&, const BackwardIn&, const BackwardOut&, void* buffer,
                   const Parallel&);
};

constexpr int64_t kKeptPadding = 64;

}  // namespace fused_losses
