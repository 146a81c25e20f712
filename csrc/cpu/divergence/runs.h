// Runs of classes as one row has them, in double: log sums, the mean gap, and what the Kullback-
// Leibler divergence has beyond it; two runs into one without a cancellation.
//
// With weights w = exp(a) of the leading side, d = a - b beside the other side and c the mean of d
// under w:   KL = log(1 + r),   r = sum w (exp(c - d) - 1 - (c - d)) / sum w >= 0.
#pragma once

#include <cmath>
#include <limits>

#include "../../rules/divergence.h"

namespace fused_losses::FL_ISA {

struct NumberMath {
  using Scalar = double;
  using Value = double;
};

inline double exp_excess(double h) {
  if (h > -0.5 && h < 0.5) return divergence_rules::exp_excess<NumberMath>(h);
  return std::expm1(h) - h;
}

// log(exp(a) + exp(b)) and the two shares of it.
struct LogSum {
  double sum, a, b;

  LogSum(double first, double second) {
    const bool turned = second > first;
    const double e = std::exp(turned ? first - second : second - first);
    sum = (turned ? second : first) + std::log1p(e);
    const double major = 1 / (1 + e), minor = e * major;
    a = turned ? minor : major;
    b = turned ? major : minor;
  }
};

constexpr double kNoClass = -std::numeric_limits<double>::infinity();
constexpr double kFarExcess = 1e30;  // beyond it, and at inf, r is not looked at
constexpr double kFarApart = 64;     // scores so far apart have their sums each of its own

// A mean, as the value of one class that has much of the weight and what the others make of it:
// of all of the weight but e it is that value to more digits than one number has.
struct Mean {
  double anchor = 0, offset = 0;

  double value() const { return anchor + offset; }

  // What of `mean` is beyond this one.
  double step_to(const Mean& mean) const { return (mean.anchor - anchor) + (mean.offset - offset); }

  // Of this one by `share`, and of `mean` by the rest.
  void join(double share, const Mean& mean, double rest) {
    const double apart = mean.anchor - anchor;
    if (share >= rest) {
      offset = share * offset + rest * (mean.offset + apart);
    } else {
      offset = share * (offset - apart) + rest * mean.offset;
      anchor = mean.anchor;
    }
  }
};

struct Run {
  double lead = kNoClass, other = kNoClass;  // log sum exp a, log sum exp b
  Mean center;                               // c
  double excess = 0;                         // r

  // The other side's log sum: by its distance from the leading one, which has more digits than the
  // two, unless the distance is longer than it is itself.
  double other_lse() const {
    const bool longer = std::abs(center.value()) > 4 * std::abs(other) + kFarApart;
    return lead == kNoClass || longer ? other : lead + (divergence() - center.value());
  }

  // The other side's log sum beyond the leading one.
  Mean between() const {
    const double value = divergence();
    if (value < 1 && std::abs(center.offset) < 1) return {-center.anchor, value - center.offset};
    return {lead == kNoClass ? 0 : other_lse() - lead, 0};
  }

  // log(1 + r) where r is out of range is not small: the difference serves.
  double divergence() const {
    if (lead == kNoClass) return 0;
    if (excess < kFarExcess) return std::log1p(excess < 0 ? 0 : excess);
    return other - lead + center.value();
  }

  // (1 + r) exp(h) - 1 - h, times a share whose logarithm is given.
  double moved(double share, double log_share, double h) const {
    if (excess < kFarExcess && h > -30 && h < 30) {
      return share * (excess * std::exp(h) + exp_excess(h));
    }
    const double more = excess < kFarExcess ? std::log1p(excess) : other - lead + center.value();
    return std::exp(log_share + h + more) - share * (1 + h);
  }

  void add(const Run& run) {
    if (run.lead == kNoClass) return;
    if (lead == kNoClass) {
      *this = run;
      return;
    }
    const LogSum leads(lead, run.lead), others(other, run.other);
    const double step = center.step_to(run.center), here = leads.b * step, there = -leads.a * step;
    excess =
        moved(leads.a, lead - leads.sum, here) + run.moved(leads.b, run.lead - leads.sum, there);
    center.join(leads.a, run.center, leads.b);
    lead = leads.sum;
    other = others.sum;
  }
};

// log sum exp(eps v) and the mean of u under its softmax.
struct PowerRun {
  double lse = kNoClass;
  Mean mean;

  void add(const PowerRun& run) {
    if (run.lse == kNoClass) return;
    if (lse == kNoClass) {
      *this = run;
      return;
    }
    const LogSum sums(lse, run.lse);
    mean.join(sums.a, run.mean, sums.b);
    lse = sums.sum;
  }
};

// The mean of slopes under shares of a softmax, of which only some are here.
struct SharedRun {
  double mass = 0;
  Mean mean;

  void add(const SharedRun& run) {
    if (run.mass == 0) return;
    const double all = mass + run.mass;
    mean.join(mass / all, run.mean, run.mass / all);
    mass = all;
  }
};

}  // namespace fused_losses::FL_ISA
