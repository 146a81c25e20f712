// The distances that are sums over coordinates: the rules of ../rules/distances.h on vectors.
#pragma once

#include "../../rules/distances.h"
#include "math.h"

namespace fused_losses::FL_ISA {

// A rule as the CPU runs it: kAtOnce rows of x in registers, kPanels = 2: each row of y has a row
// of weights.
template <class T, class Rule, int kRowsAtOnce = kRows>
struct Metric : Rule {
  static constexpr int kAtOnce = kRowsAtOnce, kPanels = Rule::kRowWeights ? 2 : 1;
  const DistanceProblem* problem = nullptr;
  const T *row_flags = nullptr, *column_flags = nullptr;  // 0 or NaN

  const T* x(int64_t i) const { return static_cast<const T*>(problem->x) + i * problem->d; }
  const T* y(int64_t j) const { return static_cast<const T*>(problem->y) + j * problem->d; }

  Vector<T> finish(const Vector<T>* s, int64_t i, int64_t j) const {
    const Vector<T> found = Rule::finish(s);
    if constexpr (Rule::kFlags) return found + (row_flags[i] + load(column_flags + j));
    return found;
  }
};

template <class T>
using Cityblock = Metric<T, distance_rules::Cityblock<DistanceMath<T>>>;
template <class T>
using Chebyshev = Metric<T, distance_rules::Chebyshev<DistanceMath<T>>>;
template <class T, bool kWeighted>
using Canberra = Metric<T, distance_rules::Canberra<DistanceMath<T>, kWeighted>, 4>;
template <class T>
using Braycurtis = Metric<T, distance_rules::Braycurtis<DistanceMath<T>>, 3>;
template <class T>
using SumOfSizes = Metric<T, distance_rules::SumOfSizes<DistanceMath<T>>>;
template <class T>
using JensenShannon = Metric<T, distance_rules::JensenShannon<DistanceMath<T>>, 2>;
template <class T>
using KullbackLeibler = Metric<T, distance_rules::KullbackLeibler<DistanceMath<T>>, 2>;
template <class T, bool kWeighted>
using Hamming = Metric<T, distance_rules::Hamming<DistanceMath<T>, kWeighted>>;
template <class T, bool kWeighted>
using Jaccard = Metric<T, distance_rules::Jaccard<DistanceMath<T>, kWeighted>, 3>;
template <class T>
using Scaled = Metric<T, distance_rules::Scaled<DistanceMath<T>>, 4>;
template <class T>
using Squares = Metric<T, distance_rules::Squares<DistanceMath<T>>>;

template <class T, int kPower>
struct Minkowski
    : Metric<T, distance_rules::Minkowski<DistanceMath<T>, kPower>, kPower == 0 ? 2 : int(kRows)> {
  using Rule = distance_rules::Minkowski<DistanceMath<T>, kPower>;
  double exact;

  explicit Minkowski(double p) : Metric<T, Rule, kPower == 0 ? 2 : int(kRows)>{Rule(p)}, exact(p) {}

  Vector<T> finish(const Vector<T>* s, int64_t i, int64_t j) const {
    // sums that came near to an end of the range are taken again, scaled
    const Vector<T> zero = {};
    Vector<T> out = Rule::finish(s);
    Lanes again = below(s[0], zero + Rule::kLow) | below(zero + Rule::kHigh, s[0]);
    for (; again; again &= again - 1) {
      const int lane = __builtin_ctz(again);
      if (j + lane < this->problem->m) out[lane] = pair(this->x(i), this->y(j + lane));
    }
    return out;
  }

 private:
  [[gnu::noinline]] T pair(const T* x, const T* y) const {
    return static_cast<T>(distance_rules::scaled_minkowski<double>(
        this->problem->d, exact,
        [&](int64_t k) { return std::abs(static_cast<double>(x[k] - y[k])); }));
  }
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
      return w ? f(Hamming<T, true>{{{}, total}}) : f(Hamming<T, false>{{{}, total}});
    case Distance::kJaccard:
      return w ? f(Jaccard<T, true>{}) : f(Jaccard<T, false>{});
    case Distance::kScaled:
      return f(Scaled<T>{});
    default:
      return f(Cityblock<T>{});
  }
}

}  // namespace fused_losses::FL_ISA
