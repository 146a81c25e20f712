// The sweep over pairs of one instruction set against the formulas in double: statistics, their
// gradients, attention; on threads, awkward shapes; the same bits on any number of threads.
//
// usage: pairs_test [default|avx2|avx512|avx512_bf16]; exit code 77 where it cannot run.
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

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

Results run(const Kernels& kernels, const Case& c, const std::vector<double>& g_rows,
            const std::vector<double>& g_columns, int threads) {
  const PairProblem& p = c.p;
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

void check(const Kernels& kernels, const Shape& s) {
  const Case c(s);
  const PairProblem& p = c.p;
  const int64_t n = s.n, m = s.m, d = s.d;
  std::vector<double> g[2];
  for (int side = 0; side < 2; ++side) {
    const auto values = random(2 * kClasses * (side ? m : n), 1, 11 + side);
    g[side].assign(values.begin(), values.end());
  }
  if (s.triangle) g[1] = g[0];
  const Results got = run(kernels, c, g[0], g[1], 3);
  const Results one = run(kernels, c, g[0], g[1], 1);

  // statistics, side by side
  std::vector<double> want[2] = {std::vector<double>(kStatistics * kClasses * n),
                                 std::vector<double>(kStatistics * kClasses * m)};
  const bool lse = s.reduction == Reduction::kLse;
  const auto f = [&](double z) {
    if (lse) return std::exp(z);
    return s.reduction == Reduction::kRelu ? std::max(z, 0.0)
                                           : std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z)));
  };
  for (int side = 0; side < 2; ++side) {
    const int64_t count = side ? m : n;
    double* out = want[side].data();
    std::fill(out + kBest * kClasses * count, out + kStatistics * kClasses * count, -kInfinity);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        double z, slope;
        const int k = c.class_of(i, j, side == 0, c.u(i, j), &z, &slope);
        if (k == 2) continue;
        const int64_t at = k * count + (side ? j : i);
        out[kValue * kClasses * count + at] += f(z);
        out[kTotal * kClasses * count + at] += z;
        out[kCount * kClasses * count + at] += 1;
        double& best = out[kBest * kClasses * count + at];
        best = std::max(best, z);
      }
    }
    for (int64_t at = 0; lse && at < kClasses * count; ++at) out[at] = std::log(out[at]);
  }
  // gradients
  std::vector<double> dx(n * d), dy(m * d), dx_bias(n), dy_bias(m), dscale(1);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      double total = 0, z, slope;
      const double u = c.u(i, j);
      for (int side = 0; side < 2; ++side) {
        // each pair of a triangle is met twice, once as a row's
        if (s.triangle && side) continue;
        const int64_t count = side ? m : n;
        const int k = c.class_of(i, j, side == 0, u, &z, &slope);
        if (k == 2) continue;
        const int64_t at = k * count + (side ? j : i);
        double df = std::exp(z - want[side][at]);
        if (s.reduction == Reduction::kRelu) df = z > 0;
        if (s.reduction == Reduction::kSoftplus) df = 1 / (1 + std::exp(-z));
        total += slope * (g[side][at] * df + g[side][kClasses * count + at]);
      }
      for (int64_t e = 0; e < d; ++e) {
        dx[i * d + e] += p.scale * total * c.y[j * d + e];
        dy[j * d + e] += p.scale * total * c.x[i * d + e];
      }
      dx_bias[i] += total;
      dy_bias[j] += total;
      dscale[0] += total * (u - (p.rows.bias ? c.x_bias[i] + c.y_bias[j] : 0)) / p.scale;
    }
  }
  if (s.triangle) {
    for (size_t k = 0; k < dx.size(); ++k) dx[k] += dy[k];
    for (size_t k = 0; k < dx_bias.size(); ++k) dx_bias[k] += dy_bias[k];
  }
  char name[200];
  std::snprintf(name, sizeof name, "%s n=%ld m=%ld d=%ld classes=%d%s%s%s%s%s reduction=%d %d",
                kernels.capability, long(n), long(m), long(d), s.classes,
                s.triangle ? " triangle" : "", s.bias ? " bias" : "", s.left_out ? " left out" : "",
                s.window ? " window" : "", s.score == Score::kRoot ? " root" : "", int(s.reduction),
                int(s.precision));
  const std::string at = name;
  const double exact = s.precision == Precision::kBFloat16 ? 3e-2 : 5e-6;
  const double bound = s.precision == Precision::kFull ? 2e-5 : 4e-2;
  const auto compare = [&](const std::vector<double>& a, const std::vector<double>& b, int side) {
    std::vector<double> finite_a, finite_b;
    bool same = true;
    for (size_t k = 0; k < b.size(); ++k) {
      same = same && std::isfinite(a[k]) == std::isfinite(b[k]);
      if (!std::isfinite(b[k])) continue;
      finite_a.push_back(a[k]);
      finite_b.push_back(b[k]);
    }
    expect(same && worst(finite_a, finite_b) < exact, at + (side ? ": columns" : ": rows"));
  };
  compare(got.rows, want[0], 0);
  if (!s.triangle) compare(got.columns, want[1], 1);
  // a bfloat16 score may cross a window's bound or zero
  if (!(s.precision == Precision::kBFloat16 && (s.window || s.reduction == Reduction::kRelu))) {
    expect(worst(got.dx, dx) < bound, at + ": dx");
    if (!s.triangle) expect(worst(got.dy, dy) < bound, at + ": dy");
    if (p.rows.bias) expect(worst(got.dx_bias, dx_bias) < bound, at + ": dx_bias");
    if (p.rows.bias && !s.triangle) expect(worst(got.dy_bias, dy_bias) < bound, at + ": dy_bias");
    // the sum cancels: against the size of what was summed
    double size = 0;
    for (size_t k = 0; k < dx.size(); ++k) size += std::abs(dx[k] * c.x[k]);
    expect(std::abs(got.dscale[0] - dscale[0]) < bound * (size + 1e-3), at + ": dscale");
  }
  const auto same_bits = [](const auto& a, const auto& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  expect(same_bits(got.rows, one.rows) && same_bits(got.columns, one.columns) &&
             same_bits(got.dx, one.dx) && same_bits(got.dy, one.dy) &&
             same_bits(got.dx_bias, one.dx_bias) && same_bits(got.dscale, one.dscale),
         at + ": one thread and three give different bits");
}

void check_attention(const Kernels& kernels, int64_t n, int64_t m, int64_t d, int64_t width,
                     bool positives, Precision precision) {
  const Case c({n, m, d, positives ? 3 : 0, false, true, true, false, Score::kLinear,
                Reduction::kLse, precision, kInfinity});
  const PairProblem& p = c.p;
  const auto values = random(m * width, 1, 5), g_out = random(n * width, 1, 6);
  const auto g_lse = random(n, 1, 7);
  const AttentionIn in = {values.data(), width, positives};
  std::vector<float> out(n * width, NAN), dx(n * d, NAN), dy(m * d, NAN), dv(m * width, NAN);
  std::vector<double> lse(n, NAN), shift(n);
  const Parallel parallel = {3, on_threads};
  const PairBackwardOut back = {dx.data(), dy.data(), nullptr, nullptr, nullptr};
  const size_t bytes = std::max(kernels.pairs.attention_bytes(p, in, 3),
                                kernels.pairs.attention_backward_bytes(p, in, back, true, 3));
  void* buffer = std::aligned_alloc(64, (bytes + 127) / 64 * 64);
  kernels.pairs.attention(p, in, {out.data(), lse.data()}, buffer, parallel);
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = 0; e < width; ++e)
      shift[i] += double(g_out[i * width + e]) * out[i * width + e];
    shift[i] -= g_lse[i];
  }
  kernels.pairs.attention_backward(p, in, {g_out.data(), shift.data(), lse.data()}, back, dv.data(),
                                   buffer, parallel);
  std::free(buffer);

  std::vector<double> want(n * width), want_lse(n), want_dx(n * d), want_dy(m * d),
      want_dv(m * width);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> weight(m), slope(m), t(m);
    double sum = 0, mean = 0;
    for (int64_t j = 0; j < m; ++j) {
      double z;
      const int k = c.class_of(i, j, true, c.u(i, j), &z, &slope[j]);
      weight[j] = k == (positives ? kPositive : kNegative) ? std::exp(z) : 0;
      sum += weight[j];
    }
    want_lse[i] = std::log(sum);
    for (int64_t j = 0; j < m; ++j) {
      weight[j] = sum > 0 ? weight[j] / sum : 0;
      for (int64_t e = 0; e < width; ++e) {
        want[i * width + e] += weight[j] * values[j * width + e];
        want_dv[j * width + e] += weight[j] * g_out[i * width + e];
        t[j] += double(g_out[i * width + e]) * values[j * width + e];
      }
      mean += weight[j] * t[j];
    }
    for (int64_t j = 0; j < m; ++j) {
      const double g = weight[j] * (t[j] - mean + g_lse[i]) * slope[j] * p.scale;
      for (int64_t e = 0; e < d; ++e) {
        want_dx[i * d + e] += g * c.y[j * d + e];
        want_dy[j * d + e] += g * c.x[i * d + e];
      }
    }
  }
  char name[120];
  std::snprintf(name, sizeof name, "%s attention n=%ld m=%ld d=%ld width=%ld%s %d",
                kernels.capability, long(n), long(m), long(d), long(width),
                positives ? " positives" : "", int(precision));
  const std::string at = name;
  const double bound = precision == Precision::kFull ? 2e-5 : 4e-2;
  expect(worst(out, want) < bound, at + ": out");
  bool same = true;
  for (int64_t i = 0; i < n; ++i) {
    same = same && std::isfinite(lse[i]) == std::isfinite(want_lse[i]);
    if (!std::isfinite(want_lse[i])) lse[i] = want_lse[i] = 0;
  }
  expect(same && worst(lse, want_lse) < bound, at + ": lse");
  expect(worst(dx, want_dx) < bound, at + ": dx");
  expect(worst(dy, want_dy) < bound, at + ": dy");
  expect(worst(dv, want_dv) < bound, at + ": dvalues");
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  std::vector<Precision> precisions = {Precision::kFull};
  if (kernels.bf16) {
    precisions.push_back(Precision::kMixed);
    precisions.push_back(Precision::kBFloat16);
  }
  constexpr auto kLse = Reduction::kLse, kSoftplus = Reduction::kSoftplus, kRelu = Reduction::kRelu;
  constexpr auto kLinear = Score::kLinear, kRoot = Score::kRoot;
  for (const Precision q : precisions) {
    check(kernels, {1, 1, 1, 0, false, false, false, false, kLinear, kLse, q, kInfinity});
    check(kernels, {37, 53, 24, 3, false, true, false, false, kLinear, kLse, q, kInfinity});
    check(kernels, {64, 500, 65, 0, false, false, false, false, kLinear, kLse, q, kInfinity});
    check(kernels, {211, 1301, 33, 4, false, true, true, false, kLinear, kLse, q, kInfinity});
    check(kernels, {203, 100, 130, 5, false, false, true, true, kLinear, kLse, q, kInfinity});
    check(kernels, {400, 400, 16, 7, true, true, true, false, kLinear, kLse, q, kInfinity});
    check(kernels, {1203, 1203, 7, 7, true, false, false, false, kLinear, kLse, q, kInfinity});
    check(kernels, {193, 193, 12, 3, true, true, false, true, kLinear, kSoftplus, q, kInfinity});
    check(kernels, {130, 190, 40, 2, false, true, false, false, kLinear, kSoftplus, q, kInfinity});
    check(kernels, {90, 65, 8, 2, false, true, false, false, kLinear, kRelu, q, kInfinity});
    check(kernels, {90, 200, 8, 2, false, true, false, false, kRoot, kLse, q, kInfinity});
    check(kernels, {77, 77, 8, 3, true, true, false, true, kRoot, kRelu, q, kInfinity});
    check(kernels, {77, 210, 20, 3, false, true, false, false, kLinear, kLse, q, 1.4});
    check_attention(kernels, 1, 1, 1, 1, false, q);
    check_attention(kernels, 200, 1201, 20, 33, false, q);
    check_attention(kernels, 61, 130, 70, 130, true, q);
  }
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
