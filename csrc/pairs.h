// The sweep over pairs, without torch: what a caller fills in (the maths: primitives/pairs).
//
//   s_ij = psi(scale <x_i, y_j> + a_i + b_j),  z_ij = factor_c (s_ij - center_c) w_ij,
//   forward: value, total, count and best of each class of pairs, for rows and for columns
//   backward: G_ij = dL/du_ij,  dx = scale G y,  dy = scale G^T x,  dscale = sum G <x, y>
//
// apart: v = -|x - y|^2 / 2 stands in place of the product, made of half_norms p = -|x|^2 / 2 and
// q = -|y|^2 / 2. A pair is near when not v <= share (p + q), and its v and gradients come from
// differences. dx = scale sum G (y - x), dy = scale sum G (x - y), dscale = sum G v; the biases
// have no gradients.
//
// Work goes in blocks and tiles of sizes that the number of threads does not change, and every sum
// has one owner or a fixed order: the results are the same bits on any number of threads.
#pragma once

#include "common.h"

namespace fused_losses {

enum class Score { kLinear, kRoot };
enum class Reduction { kLse, kSoftplus, kRelu };
enum PairClass { kPositive, kNegative };
constexpr int64_t kClasses = 2;
// How the statistics of a class are indexed.
constexpr int64_t kValue = 0, kTotal = 1, kCount = 2, kBest = 3, kStatistics = 4;

struct Rule {
  double factor, center, reach;  // reach = inf: no weight
};

// One side's vectors, each [count] or null; `window` [4, count] and `bias` in the type of x.
struct PairSide {
  const void* data;  // [count, d] dense
  int64_t count;
  const void* bias;
  const int32_t* labels;
  const int32_t* ids;
  const int32_t* groups;
  const void* window;
  const void* half_norms;  // [count] with apart, in the type of x; else null
};

struct PairProblem {
  PairSide rows, columns;  // with triangle: the same twice
  int64_t d;
  double scale;
  const int32_t* exclude;  // [rows, excluded] columns, -1: none
  int64_t excluded;
  Score score;
  Rule rule[kClasses];
  Reduction reduction;
  bool skip_self, triangle;
  bool apart;      // near pairs are mended: see below
  bool both;       // statistics of the columns too (always with triangle)
  bool is_double;  // x and y are double, else float
  Precision precision;
  Stored stored;       // how the columns' rows and values lie, and their gradients; triangle: kWide
  void* kept;          // products that the forward keeps and the backward reads, or null
  int64_t kept_count;  // room for so many, in the type of x
};

// [kStatistics, kClasses, count]; columns null unless `both`, and with triangle.
struct PairForwardOut {
  double* rows;
  double* columns;
};

// Gradients of value and total, [2, kClasses, count], and the statistics of the forward.
struct PairBackwardIn {
  const double *grad_rows, *grad_columns;
  const double *rows, *columns;
};

// Each may be null. dx in the type of x, dy as y is stored; they are written whole.
struct PairBackwardOut {
  void *dx, *dy;
  double* dscale;
  void *dx_bias, *dy_bias;
};

// Attention over one class of pairs: values [columns, width], stored as y is.
struct AttentionIn {
  const void* values;
  int64_t width;
  bool positives;
};

struct AttentionForwardOut {
  void* out;    // [rows, width] in the type of x
  double* lse;  // [rows]
};

struct AttentionBackwardIn {
  const void* grad_out;  // [rows, width]
  const double* shift;   // [rows] <grad_out, out> - grad_lse
  const double* lse;     // [rows]
};

struct PairKernels {
  // how many products would be kept of a room for `most`: whole strips of rows
  int64_t (*kept)(const PairProblem&, int64_t most);
  size_t (*forward_bytes)(const PairProblem&, int threads);
  void (*forward)(const PairProblem&, const PairForwardOut&, void* buffer, const Parallel&);
  size_t (*backward_bytes)(const PairProblem&, const PairBackwardOut&, int threads);
  void (*backward)(const PairProblem&, const PairBackwardIn&, const PairBackwardOut&, void* buffer,
                   const Parallel&);
  size_t (*attention_bytes)(const PairProblem&, const AttentionIn&, int threads);
  void (*attention)(const PairProblem&, const AttentionIn&, const AttentionForwardOut&,
                    void* buffer, const Parallel&);
  size_t (*attention_backward_bytes)(const PairProblem&, const AttentionIn&, const PairBackwardOut&,
                                     bool dvalues, int threads);
  void (*attention_backward)(const PairProblem&, const AttentionIn&, const AttentionBackwardIn&,
                             const PairBackwardOut&, void* dvalues, void* buffer, const Parallel&);
};

}  // namespace fused_losses
