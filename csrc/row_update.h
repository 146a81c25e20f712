// Optimiser steps on some rows of a table, in place, without torch (fused_losses/row_update.py).
#pragma once

#include "row_statistics.h"

namespace fused_losses {

// A matrix that changes; rows dense, stride in elements; data null: none.
struct RowTable {
  void* data;
  Type type;
  int64_t stride;
};

constexpr int kRowStates = 2;  // at most

// Arithmetic is in float, or in double where the tables are.
struct RowUpdate {
  RowTable weight, states[kRowStates];  // [*, width]
  const int64_t* rows;                  // [count], distinct
  Matrix grad;                          // [count, width]; data null: none
  int64_t count, width;
  bool stochastic;     // rounding of 16-bit tables, by a hash of key, row, table and column
  uint64_t key;        //
  int64_t row_offset;  // of row 0 in the whole table
};

// v = momentum v + share d, d = grad + weight_decay w; w -= lr v, or lr (d + momentum v)
struct SgdStep {
  double lr, momentum, share, weight_decay;
  bool nesterov, maximize;
};

// m += share1 (grad - m); v = beta2 v + share2 grad^2; w -= lr m / (sqrt(v) root + eps) + decay w
struct AdamwStep {
  double lr, share1, beta2, share2, root, eps, decay;
  bool maximize;
};

// s += grad^2; w -= lr grad / (sqrt(s + initial) + eps) + decay w
struct AdagradStep {
  double lr, eps, initial, decay;
  bool maximize;
};

struct RowUpdateKernels {
  void (*sgd)(const RowUpdate&, const SgdStep&, const Parallel&);
  void (*adamw)(const RowUpdate&, const AdamwStep&, const Parallel&);
  void (*adagrad)(const RowUpdate&, const AdagradStep&, const Parallel&);
  // w, v = w + a w + b v, c w + d v with the row's factors (a, b, c, d), [count, 4]
  void (*catch_up)(const RowUpdate&, const double* factors, const Parallel&);
};

}  // namespace fused_losses
