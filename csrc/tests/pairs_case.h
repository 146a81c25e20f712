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
  double scale = 0.7;
  int totals = 15;  // 1: the rows' positives have a gradient, 2: negatives; 4, 8: the columns'
  bool both = true, self = false, groups = false;
  bool runs = false;    // labels that tiles are of one of
  bool nan = false;     // in one row
  bool listed = false;  // the last row's pairs around a tile's end are left out
  double far = 0;       // how far below all others a column's scores lie
};

// Gradients of values and totals of a side.
inline std::vector<double> gradients(const Shape& s, int side) {
  auto g = drawn<double>(2 * kClasses * (side ? s.m : s.n), 1, 11 + side);
  const auto totals = g.begin() + g.size() / 2, middle = totals + g.size() / 4;
  const int with = s.totals >> 2 * side;
  if (!(with & 1)) std::fill(totals, middle, 0.0);
  if (!(with & 2)) std::fill(middle, g.end(), 0.0);
  return g;
}

template <class V>
bool same_bits(const V& a, const V& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
}

// The error in relative L2 of what is finite; inf where they differ in what is.
template <class T>
double worst_finite(const std::vector<T>& got, const std::vector<double>& want) {
  std::vector<double> a, b;
  for (size_t k = 0; k < want.size(); ++k) {
    if (std::isfinite(got[k]) != std::isfinite(want[k])) return kInfinity;
    if (!std::isfinite(want[k])) continue;
    a.push_back(got[k]);
    b.push_back(want[k]);
  }
  return worst(a, b);
}

// The inputs of a case and the PairProblem that points to them.
struct Case {
  std::vector<float> x, y, x_bias, y_bias, x_window, y_window;
  std::vector<int32_t> x_labels, y_labels, ids, exclude, x_groups, y_groups;
  PairProblem p = {};

  explicit Case(const Shape& s) {
    const float spread = 2 / std::sqrt(std::sqrt(float(s.d)));
    x = random(s.n * s.d, spread, 1);
    if (s.nan) x[s.n * 5 / 9 * s.d] = NAN;
    y = s.triangle ? x : random(s.m * s.d, spread, 2);
    x_bias = random(s.n, 1, 3);
    y_bias = s.triangle ? x_bias : random(s.m, 1, 4);
    // u = -|x - y|^2 apart from a common shift: below zero, as the root wants it
    for (float& b : x_bias) b -= s.score == Score::kRoot ? 40 : 0;
    if (s.triangle) y_bias = x_bias;
    y_bias[s.m / 2] -= s.far;
    for (int64_t i = 0; i < s.n; ++i)
      x_labels.push_back(int32_t(i * 5 % 7 % std::max(1, s.classes)));
    for (int64_t j = 0; j < s.m; ++j) y_labels.push_back(int32_t(j / 9 % std::max(1, s.classes)));
    for (int64_t i = 0; i < s.n && s.runs; ++i) x_labels[i] = int32_t(i / 60);
    for (int64_t j = 0; j < s.m && s.runs; ++j) y_labels[j] = int32_t(j / 300);
    if (s.triangle) y_labels = x_labels;
    // tiles of one group and of several; rows in a group without columns
    for (int64_t i = 0; i < s.n; ++i)
      x_groups.push_back(int32_t(i < 64 ? 4 : i < 112 ? 9 : i / 64));
    for (int64_t j = 0; j < s.m; ++j) y_groups.push_back(int32_t(j / 256));
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
                          const std::vector<int32_t>& groups, const std::vector<float>& window) {
      return PairSide{v.data(),
                      count,
                      s.bias || s.score == Score::kRoot ? bias.data() : nullptr,
                      s.classes ? labels.data() : nullptr,
                      s.left_out ? ids.data() : nullptr,
                      s.groups ? groups.data() : nullptr,
                      s.window ? window.data() : nullptr,
                      nullptr};
    };
    p.rows = side(x, s.n, x_bias, x_labels, x_groups, x_window);
    p.columns = s.triangle ? p.rows : side(y, s.m, y_bias, y_labels, y_groups, y_window);
    p.d = s.d;
    p.scale = s.scale;
    p.skip_self = s.self;
    if (s.left_out && !s.triangle) {
      p.exclude = exclude.data();
      p.excluded = 2;
    }
    if (s.listed) {
      exclude.assign(2 * s.n, -1);
      exclude[2 * s.n - 2] = 256;
      exclude[2 * s.n - 1] = 255;
      p.exclude = exclude.data();
      p.excluded = 2;
    }
    p.score = s.score;
    p.rule[kPositive] = {-1.5, 0.3, 2 * s.reach};
    p.rule[kNegative] = {1.2, -0.2, s.reach};
    p.reduction = s.reduction;
    p.triangle = s.triangle;
    p.both = s.both;
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
    if ((p.triangle || p.skip_self) && i == j) return 2;
    if (p.rows.groups && p.rows.groups[i] != p.columns.groups[j]) return 2;
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

inline auto scratch(size_t bytes) {
  const size_t whole = (bytes + 63) / 64 * 64;
  auto* memory = static_cast<char*>(std::aligned_alloc(64, whole + 64));
  std::memset(memory, 0xff, whole);  // NaN everywhere
  return std::unique_ptr<char, void (*)(void*)>(memory, std::free);
}

// Of a backward's outputs, in their order.
enum Asked : unsigned { kDx = 1, kDy = 2, kDscale = 4, kDxBias = 8, kDyBias = 16, kAll = 31 };

// asked: a bit an output of the backward.
inline Results run(const Kernels& kernels, const Case& c, const std::vector<double>& g_rows,
                   const std::vector<double>& g_columns, int threads, int64_t kept = 0,
                   unsigned asked = kAll) {
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
  const auto given = [&](unsigned which, auto& v) { return asked & which ? v.data() : nullptr; };
  const bool one = p.triangle;
  const PairBackwardOut out = {given(kDx, r.dx), one ? nullptr : given(kDy, r.dy),
                               given(kDscale, r.dscale),
                               p.rows.bias ? given(kDxBias, r.dx_bias) : nullptr,
                               p.columns.bias && !one ? given(kDyBias, r.dy_bias) : nullptr};
  auto buffer = scratch(kernels.pairs.forward_bytes(p, threads));
  kernels.pairs.forward(p, {r.rows.data(), r.columns.data()}, buffer.get(), parallel);
  buffer = scratch(kernels.pairs.backward_bytes(p, out, threads));
  const PairBackwardIn in = {g_rows.data(), g_columns.data(), r.rows.data(), r.columns.data()};
  kernels.pairs.backward(p, in, out, buffer.get(), parallel);
  return r;
}

constexpr unsigned kDvalues = kAll + 1;

struct Attended {
  std::vector<float> out, dx, dy, dv, dx_bias, dy_bias;
  std::vector<double> lse, dscale = {0};
};

// Attention and its gradients; asked: as in `run`, and kDvalues.
inline Attended attend(const Kernels& kernels, const Case& c, const void* values, int64_t width,
                       bool positives, const std::vector<float>& g_out,
                       const std::vector<float>& g_lse, int threads,
                       unsigned asked = kAll | kDvalues) {
  const PairProblem& p = c.p;
  const int64_t n = p.rows.count, m = p.columns.count;
  const AttentionIn in = {values, width, positives};
  const Parallel parallel = {threads, on_threads};
  Attended r;
  const std::pair<std::vector<float>*, int64_t> sizes[] = {{&r.out, n * width}, {&r.dx, n * p.d},
                                                           {&r.dy, m * p.d},    {&r.dv, m * width},
                                                           {&r.dx_bias, n},     {&r.dy_bias, m}};
  for (const auto& [v, size] : sizes) v->assign(size, NAN);
  r.lse.assign(n, NAN);
  const auto given = [&](unsigned which, auto& v) { return asked & which ? v.data() : nullptr; };
  const PairBackwardOut back = {given(kDx, r.dx), given(kDy, r.dy), given(kDscale, r.dscale),
                                p.rows.bias ? given(kDxBias, r.dx_bias) : nullptr,
                                p.columns.bias ? given(kDyBias, r.dy_bias) : nullptr};
  auto buffer = scratch(kernels.pairs.attention_bytes(p, in, threads));
  kernels.pairs.attention(p, in, {r.out.data(), r.lse.data()}, buffer.get(), parallel);
  std::vector<double> shift(n);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = 0; e < width; ++e) {
      shift[i] += double(g_out[i * width + e]) * r.out[i * width + e];
    }
    shift[i] -= g_lse[i];
  }
  const bool dvalues = asked & kDvalues;
  buffer = scratch(kernels.pairs.attention_backward_bytes(p, in, back, dvalues, threads));
  kernels.pairs.attention_backward(p, in, {g_out.data(), shift.data(), r.lse.data()}, back,
                                   dvalues ? r.dv.data() : nullptr, buffer.get(), parallel);
  return r;
}
