// The rotation of a bank's codes, of a query: signs and a Hadamard matrix, a round after another.
//
// primitives/topk/rotation.py is the bank's side. Where d is no power of two, rounds take the first
// and the last power of two of the entries in turn.
#pragma once

#include <cmath>
#include <cstdint>

namespace fused_losses::FL_ISA {

// x <- x H / sqrt(size), size a power of two: log2(size) additions an entry.
inline void hadamard(double* x, int64_t size) {
  for (int64_t half = 1; half < size; half *= 2) {
    for (int64_t at = 0; at < size; at += 2 * half) {
      for (int64_t e = at; e < at + half; ++e) {
        const double a = x[e], b = x[e + half];
        x[e] = a + b;
        x[e + half] = a - b;
      }
    }
  }
  const double by = 1 / std::sqrt(static_cast<double>(size));
  for (int64_t e = 0; e < size; ++e) x[e] *= by;
}

inline void rotate(const int8_t* signs, int64_t rounds, int64_t d, double* x) {
  int64_t size = 1;
  while (2 * size <= d) size *= 2;
  for (int64_t round = 0; d > 0 && round < rounds; ++round, signs += d) {
    for (int64_t e = 0; e < d; ++e) x[e] *= signs[e];
    hadamard(x + (round % 2 ? d - size : 0), size);
  }
}

}  // namespace fused_losses::FL_ISA
