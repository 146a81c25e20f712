// The sweep over pairs of one instruction set against the formulas in double: statistics, their
// gradients, attention; on threads, awkward shapes; the same bits on any number of threads.
//
// usage: pairs_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <cstdlib>

#include "pairs_case.h"

using namespace fused_losses;

namespace {

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
  const auto all_same_bits = [&](const Results& a, const Results& b) {
    return same_bits(a.rows, b.rows) && same_bits(a.columns, b.columns) && same_bits(a.dx, b.dx) &&
           same_bits(a.dy, b.dy) && same_bits(a.dx_bias, b.dx_bias) &&
           same_bits(a.dscale, b.dscale);
  };
  expect(all_same_bits(got, one), at + ": one thread and three give different bits");
  const int64_t all = kernels.pairs.kept(p, std::numeric_limits<int64_t>::max());
  expect(all >= (s.triangle ? n * (n - 1) / 2 : n * m), at + ": no room for all pairs");
  for (const int64_t most : {all - 1, all}) {
    const int64_t kept = kernels.pairs.kept(p, most);
    expect(kept <= most && (most < all || kept == all), at + ": more is kept than there is room");
    const Results again = run(kernels, c, g[0], g[1], 3, kept);
    expect(all_same_bits(got, again), at + ": kept products give different bits");
  }
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
