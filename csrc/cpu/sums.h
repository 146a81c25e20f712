// Of rows: sums over two of them in double, in an order that the operands do not change; whether
// one is finite.
#pragma once

#include <utility>

#include "vector.h"

namespace fused_losses::FL_ISA {

typedef float HalfFloats __attribute__((vector_size(FL_VECTOR_BYTES / 2)));

inline Vector<double> wide(const double* p) { return load(p); }
inline Vector<double> wide(const float* p) {
  HalfFloats v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vector<double>);
}

// One rounding where the CPU has it, whatever else is made of the loop: the sum of a row's products
// with itself and that with an equal row are the same number.
inline double add_product(double sum, double a, double b) {
#if defined(__FP_FAST_FMA)
  return __builtin_fma(a, b, sum);
#else
  return sum + a * b;
#endif
}

struct Product {
  template <class T>
  static std::pair<T, T> factors(T a, T b) {
    return {a, b};
  }
};

struct SquaredDifference {
  template <class T>
  static std::pair<T, T> factors(T a, T b) {
    return {a - b, a - b};
  }
};

// The sum in double over e of both factors' product, in an order that the operands do not change.
template <class F, class A, class B>
inline double sum_of(const A* a, const B* b, int64_t d) {
  constexpr int64_t kStep = kLanes<double>;
  Vector<double> sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * kStep <= d; e += 4 * kStep) {
    for (int u = 0; u < 4; ++u) {
      const auto [f, g] = F::factors(wide(a + e + u * kStep), wide(b + e + u * kStep));
      sums[u] += f * g;
    }
  }
  double rest = 0;
  for (; e < d; ++e) {
    const auto [f, g] = F::factors(double(a[e]), double(b[e]));
    rest = add_product(rest, f, g);
  }
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// Whether no entry is NaN or inf.
template <class T>
inline bool all_finite(const T* x, int64_t n) {
  constexpr int64_t kStep = kLanes<T>;
  Vector<T> sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * kStep <= n; e += 4 * kStep) {
    for (int u = 0; u < 4; ++u) sums[u] += load(x + e + u * kStep) * T(0);
  }
  T rest = 0;
  for (; e < n; ++e) rest += x[e] * T(0);
  return sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest == 0;
}

}  // namespace fused_losses::FL_ISA
