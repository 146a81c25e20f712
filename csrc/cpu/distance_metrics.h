// The distances that are sums over coordinates: one struct a metric, with `add` for a coordinate of
// a pair and `finish` for a vector of pairs. A new metric is one more struct here.
#pragma once

#include "distance_math.h"

namespace fused_losses::FL_ISA {

// What a metric may read. kSums accumulators a pair, kAtOnce rows of x in registers, kFlags: rows
// with a NaN (kNonNegative: or a negative entry) are marked by it, kWeights: a weight a coordinate,
// kPanels = 2: each row of y has a row of weights.
template <class T>
struct Metric {
  static constexpr int kSums = 1, kAtOnce = kRows, kPanels = 1;
  static constexpr bool kFlags = false, kNonNegative = false, kWeights = false;
  const DistanceProblem* problem = nullptr;
  const T *row_flags = nullptr, *column_flags = nullptr;  // 0 or NaN

  const T* x(int64_t i) const { return static_cast<const T*>(problem->x) + i * problem->d; }
  const T* y(int64_t j) const { return static_cast<const T*>(problem->y) + j * problem->d; }
  Vector<T> flag(int64_t i, int64_t j) const { return row_flags[i] + load(column_flags + j); }
};

template <class T>
struct Cityblock : Metric<T> {
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T) const { s[0] += magnitude<T>(x - y); }
  Vector<T> finish(const Vector<T>* s, int64_t, int64_t) const { return s[0]; }
};

template <class T>
struct Chebyshev : Metric<T> {
  using Bits = Vector<Code<T>>;
  // as integers: the same order, and a NaN is the largest
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T) const {
    const Bits best = (Bits)s[0], apart = (Bits)magnitude<T>(x - y);
    s[0] = (Vector<T>)(best > apart ? best : apart);
  }
  Vector<T> finish(const Vector<T>* s, int64_t, int64_t) const { return s[0]; }
};

// sum |x - y|^p, and the root of it; kPower = 0: any p.
template <class T, int kPower>
struct Minkowski : Metric<T> {
  static constexpr int kAtOnce = kPower ? kRows : 2;
  Exponent<T> p, inverse;
  double exact;

  explicit Minkowski(double p_in) : p(p_in), inverse(1 / p_in), exact(p_in) {}

  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T) const {
    const Vector<T> apart = x - y;
    if constexpr (kPower == 3) {
      s[0] += apart * apart * magnitude<T>(apart);
    } else if constexpr (kPower == 4) {
      const Vector<T> square = apart * apart;
      s[0] += square * square;
    } else {
      s[0] += power<T>(magnitude<T>(apart), p);
    }
  }

  Vector<T> finish(const Vector<T>* s, int64_t i, int64_t j) const {
    // sums that came near to an end of the range are taken again, scaled
    const Vector<T> zero = {};
    constexpr T kLow = sizeof(T) == 4 ? T(1e-30) : T(1e-280), kHigh = T(1) / kLow;
    Vector<T> out;
    if constexpr (kPower == 4) {
      out = root(root(s[0]));
    } else {
      out = power<T>(s[0], inverse);
    }
    Lanes again = below(s[0], zero + kLow) | below(zero + kHigh, s[0]);
    for (; again; again &= again - 1) {
      const int lane = __builtin_ctz(again);
      if (j + lane < this->problem->m) out[lane] = pair(this->x(i), this->y(j + lane));
    }
    return out;
  }

 private:
  [[gnu::noinline]] T pair(const T* x, const T* y) const {
    double most = 0, total = 0;
    for (int64_t k = 0; k < this->problem->d; ++k) {
      const double apart = std::abs(static_cast<double>(x[k] - y[k]));
      if (!(apart <= most)) most = apart;
      if (most != most) return static_cast<T>(most);
    }
    if (most == 0 || most == std::numeric_limits<double>::infinity()) return static_cast<T>(most);
    for (int64_t k = 0; k < this->problem->d; ++k) {
      total += std::pow(std::abs(static_cast<double>(x[k] - y[k])) / most, exact);
    }
    return static_cast<T>(most * std::pow(total, 1 / exact));
  }
};

template <class T, bool kWeighted>
struct Canberra : Metric<T> {
  static constexpr int kAtOnce = 4;
  static constexpr bool kWeights = kWeighted;
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T w) const {
    const Vector<T> size = not_zero<T>(magnitude<T>(y) + std::abs(x));
    const Vector<T> apart = magnitude<T>(x - y);
    const Vector<T> share = kWeighted ? apart * w : apart;
    s[0] += share * reciprocal(size);
  }
  Vector<T> finish(const Vector<T>* s, int64_t, int64_t) const { return s[0]; }
};

template <class T>
struct Braycurtis : Metric<T> {
  static constexpr int kSums = 2, kAtOnce = 3;
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T) const {
    s[0] += magnitude<T>(x - y);
    s[1] += magnitude<T>(x + y);
  }
  Vector<T> finish(const Vector<T>* s, int64_t, int64_t) const {
    const Vector<T> zero = {};
    return (s[0] == zero) & (s[1] == zero) ? zero : s[0] / s[1];
  }
};

// The divisor of Braycurtis, which its gradient wants.
template <class T>
struct SumOfSizes : Metric<T> {
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T) const { s[0] += magnitude<T>(x + y); }
};

template <class T>
struct JensenShannon : Metric<T> {
  static constexpr int kAtOnce = 2;
  static constexpr bool kFlags = true, kNonNegative = true;
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T) const {
    const Vector<T> whole = x + y, r = reciprocal(not_zero<T>(whole));
    const Vector<T> t = magnitude<T>(x - y) * r, least = x < y ? Vector<T>{} + x : y;
    s[0] += whole * divergence(t, least * r * T(2));
  }
  Vector<T> finish(const Vector<T>* s, int64_t i, int64_t j) const {
    return root(s[0] * T(0.25)) + this->flag(i, j);
  }
};

template <class T>
struct KullbackLeibler : Metric<T> {
  static constexpr int kAtOnce = 2;
  static constexpr bool kFlags = true, kNonNegative = true;
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T) const {
    const Vector<T> zero = {};
    const T at_zero = x > 0 ? std::numeric_limits<T>::infinity() : T(0);
    const Vector<T> inverse = reciprocal(not_zero<T>(y));
    const Vector<T> term = x * log_of_ratio<T>((x - y) * inverse, x * inverse);
    s[0] += y == zero ? zero + at_zero : term;
  }
  Vector<T> finish(const Vector<T>* s, int64_t i, int64_t j) const {
    return s[0] + this->flag(i, j);
  }
};

template <class T, bool kWeighted>
struct Hamming : Metric<T> {
  static constexpr bool kFlags = true, kWeights = kWeighted;
  T total;
  explicit Hamming(T total_in) : total(total_in) {}
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T w) const {
    s[0] = y != x ? s[0] + (kWeighted ? w : T(1)) : s[0];
  }
  Vector<T> finish(const Vector<T>* s, int64_t i, int64_t j) const {
    return s[0] / total + this->flag(i, j);
  }
};

template <class T, bool kWeighted>
struct Jaccard : Metric<T> {
  static constexpr int kSums = 2, kAtOnce = 3;
  static constexpr bool kFlags = true, kWeights = kWeighted;
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T>, T w) const {
    const Vector<T> zero = {};
    const T one = kWeighted ? w : T(1);
    s[0] = y != x ? s[0] + one : s[0];
    s[1] = (y != zero) | (zero + x != zero) ? s[1] + one : s[1];
  }
  Vector<T> finish(const Vector<T>* s, int64_t i, int64_t j) const {
    const Vector<T> zero = {};
    return (s[1] == zero ? zero : s[0] / s[1]) + this->flag(i, j);
  }
};

template <class T>
struct Scaled : Metric<T> {
  static constexpr int kAtOnce = 4, kPanels = 2;
  void add(Vector<T>* s, T x, Vector<T> y, Vector<T> w, T) const {
    const Vector<T> apart = x - y;
    s[0] += apart * apart * w;
  }
  Vector<T> finish(const Vector<T>* s, int64_t, int64_t) const { return root(s[0]); }
};

// Calls f(metric) with the metric of a problem.
template <class T, class F>
inline auto with_metric(const DistanceProblem& p, F&& f) {
  const T* w = static_cast<const T*>(p.w);
  T total = static_cast<T>(p.d);
  if (w && p.kind == Distance::kHamming) {
    double sum = 0;
    for (int64_t k = 0; k < p.d; ++k) sum += w[k];
    total = static_cast<T>(sum);
  }
  switch (p.kind) {
    case Distance::kMinkowski:
      if (p.p == 3) return f(Minkowski<T, 3>(3));
      if (p.p == 4) return f(Minkowski<T, 4>(4));
      return f(Minkowski<T, 0>(p.p));
    case Distance::kChebyshev:
      return f(Chebyshev<T>{});
    case Distance::kCanberra:
      return w ? f(Canberra<T, true>{}) : f(Canberra<T, false>{});
    case Distance::kBraycurtis:
      return f(Braycurtis<T>{});
    case Distance::kJensenShannon:
      return f(JensenShannon<T>{});
    case Distance::kKl:
      return f(KullbackLeibler<T>{});
    case Distance::kHamming:
      return w ? f(Hamming<T, true>(total)) : f(Hamming<T, false>(total));
    case Distance::kJaccard:
      return w ? f(Jaccard<T, true>{}) : f(Jaccard<T, false>{});
    case Distance::kScaled:
      return f(Scaled<T>{});
    default:
      return f(Cityblock<T>{});
  }
}

}  // namespace fused_losses::FL_ISA
