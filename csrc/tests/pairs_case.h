// Cases of the sweep over pairs: inputs of a shape, and a run of its kernels.
#pragma once

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Shape {
  int64_t n, m, d;
  int classes;  // labels in [0, classes), 0: none
  bool triangle, bias, left_out, window;
  Score score;
  Reduction reduction;
  Precision precision;
  double reach;
};

// The inputs of a case and the PairProblem that points to them.
struct Case {
  std::vector<float> x, y, x_bias, y_bias, x_window, y_window;
  std::vector<int32_t> x_labels, y_labels, ids, exclude;
  PairProblem p = {};

  explicit Case(const Shape& s) {
    const float spread = 2 / std::sqrt(std::sqrt(float(s.d)));
    x = random(s.n * s.d, spread, 1);
    y = s.triangle ? x : random(s.m * s.d, spread, 2);
    x_bias = random(s.n, 1, 3);
    y_bias = s.triangle ? x_bias : random(s.m, 1, 4);
    // u = -|x - y|^2 apart from a common shift: below zero, as the root wants it
    for (float& b : x_bias) b -= s.score == Score::kRoot ? 40 : 0;
    if (s.triangle) y_bias = x_bias;
    for (int64_t i = 0; i < s.n; ++i)
      x_labels.push_back(int32_t(i * 5 % 7 % std::max(1, s.classes)));
    for (int64_t j = 0; j < s.m; ++j) y_labels.push_back(int32_t(j / 9 % std::max(1, s.classes)));
    if (s.triangle) y_labels = x_labels;
    for (int64_t k = 0; k < std::max(s.n, s.m); ++k) ids.push_back(int32_t(k * 11 % 61));
    for (int64_t i = 0; i < s.n; ++i) {
      exclude.push_back(int32_t(i * 3 % s.m));
      exclude.push_back(-1);
    }
    const float middle = s.score == Score::kRoot ? -6.5f : 0;
    for (int k = 0; k < 4; ++k) {
      // positives below a bound, negatives above one
      const float bound = k == 1 ? middle + 2 : k == 2 ? middle - 2 : k == 3 ? 1e9f : -1e9f;
      for (int64_t i = 0; i < s.n; ++i) x_window.push_back(bound + (k % 3 ? 0.01f * (i % 5) : 0));
      for (int64_t j = 0; j < s.m; ++j) y_window.push_back(bound - (k % 3 ? 0.01f * (j % 7) : 0));
    }
    const auto side = [&](const std::vector<float>& v, int64_t count,
                          const std::vector<float>& bias, const std::vector<int32_t>& labels,
                          const std::vector<float>& window) {
      return PairSide{v.data(),
                      count,
                      s.bias || s.score == Score::kRoot ? bias.data() : nullptr,
                      s.classes ? labels.data() : nullptr,
                      s.left_out ? ids.data() : nullptr,
                      nullptr,
                      s.window ? window.data() : nullptr,
                      nullptr};
    };
    p.rows = side(x, s.n, x_bias, x_labels, x_window);
    p.columns = s.triangle ? p.rows : side(y, s.m, y_bias, y_labels, y_window);
    p.d = s.d;
    p.scale = 0.7;
    if (s.left_out && !s.triangle) {
      p.exclude = exclude.data();
      p.excluded = 2;
    }
    p.score = s.score;
    p.rule[kPositive] = {-1.5, 0.3, kInfinity};
    p.rule[kNegative] = {1.2, -0.2, s.reach};
    p.reduction = s.reduction;
    p.triangle = s.triangle;
    p.both = true;
    p.precision = s.precision;
  }

  // The class of a pair (2: left out) as one side sees it, its u and z, dz/du.
  int class_of(int64_t i, int64_t j, bool from_row, double u, double* z, double* slope) const {
    double s = u, ds = 1;
    if (p.score == Score::kRoot) {
      s = u < 0 ? -std::sqrt(-u) : 0;
      ds = u < 0 ? 0.5 / std::sqrt(-u) : 0;
    }
    const bool positive = p.rows.labels && p.rows.labels[i] == p.columns.labels[j];
    const int c = positive ? kPositive : kNegative;
    const Rule& r = p.rule[c];
    double w = 1;
    if (r.reach != kInfinity) w = std::max(0.0, r.reach + (r.factor >= 0 ? s : -s));
    *z = r.factor * (s - r.center) * w;
    *slope = r.factor * w * ds;
    if (p.triangle && i == j) return 2;
    if (p.rows.ids && p.rows.ids[i] == p.columns.ids[j]) return 2;
    for (int64_t e = 0; e < p.excluded; ++e) {
      if (p.exclude[i * p.excluded + e] == j) return 2;
    }
    const PairSide& side = from_row ? p.rows : p.columns;
    if (side.window) {
      const float* at = static_cast<const float*>(side.window) + (from_row ? i : j);
      if (s <= at[2 * c * side.count] || s >= at[(2 * c + 1) * side.count]) return 2;
    }
    return c;
  }

  double u(int64_t i, int64_t j) const {
    double product = 0;
    for (int64_t e = 0; e < p.d; ++e) product += double(x[i * p.d + e]) * y[j * p.d + e];
    return p.scale * product + (p.rows.bias ? x_bias[i] : 0) + (p.columns.bias ? y_bias[j] : 0);
  }
};

struct Results {
  std::vector<double> rows, columns, dscale = {0};
  std::vector<float> dx, dy, dx_bias, dy_bias;
};

inline Results run(const Kernels& kernels, const Case& c, const std::vector<double>& g_rows,
                   const std::vector<double>& g_columns, int threads, int64_t kept = 0) {
  PairProblem p = c.p;
  std::vector<float> room(kept, NAN);
  p.kept = kept ? room.data() : nullptr;
  p.kept_count = kept;
  const int64_t n = p.rows.count, m = p.columns.count;
  const Parallel parallel = {threads, on_threads};
  Results r;
  r.rows.assign(kStatistics * kClasses * n, NAN);
  r.columns.assign(kStatistics * kClasses * m, NAN);
  r.dx.assign(n * p.d, NAN);
  r.dy.assign(m * p.d, NAN);
  r.dx_bias.assign(n, NAN);
  r.dy_bias.assign(m, NAN);
  const PairBackwardOut out = {r.dx.data(), p.triangle ? nullptr : r.dy.data(), r.dscale.data(),
                               p.rows.bias ? r.dx_bias.data() : nullptr,
                               p.columns.bias && !p.triangle ? r.dy_bias.data() : nullptr};
  const auto scratch = [](size_t bytes) {
    const size_t whole = (bytes + 63) / 64 * 64;
    auto* memory = static_cast<char*>(std::aligned_alloc(64, whole + 64));
    std::memset(memory, 0xff, whole);  // NaN everywhere
    return std::unique_ptr<char, void (*)(void*)>(memory, std::free);
  };
  auto buffer = scratch(kernels.pairs.forward_bytes(p, threads));
  kernels.pairs.forward(p, {r.rows.data(), r.columns.data()}, buffer.get(), parallel);
  buffer = scratch(kernels.pairs.backward_bytes(p, out, threads));
  const PairBackwardIn in = {g_rows.data(), g_columns.data(), r.rows.data(), r.columns.data()};
  kernels.pairs.backward(p, in, out, buffer.get(), parallel);
  return r;
}
