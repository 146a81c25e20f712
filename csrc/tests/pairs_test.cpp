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
  std::vector<double> g[2] = {gradients(s, 0), gradients(s, 1)};
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
        if ((s.triangle || !s.both) && side) continue;
        const int64_t count = side ? m : n;
        const int k = c.class_of(i, j, side == 0, u, &z, &slope);
        if (k == 2) continue;
        const int64_t at = k * count + (side ? j : i);
        double df = std::exp(z - want[side][at]);
        if (s.reduction == Reduction::kRelu) df = z != z ? z : z > 0;
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
  std::snprintf(
      name, sizeof name, "%s n=%ld m=%ld d=%ld classes=%d%s%s%s%s%s%s%s reduction=%d scale=%g %d",
      kernels.capability, long(n), long(m), long(d), s.classes, s.triangle ? " triangle" : "",
      s.bias ? " bias" : "", s.left_out ? " left out" : "", s.window ? " window" : "",
      s.score == Score::kRoot ? " root" : "", s.nan ? " nan" : "", s.groups ? " groups" : "",
      int(s.reduction), s.scale, int(s.precision));
  const std::string at = name;
  // what a score's rounding moves grows as the score
  const double more = std::max(1.0, s.scale / 0.7);
  const double exact = more * (s.precision == Precision::kBFloat16 ? 3e-2 : 5e-6);
  const double bound = more * (s.precision == Precision::kFull ? 2e-5 : 4e-2);
  expect(worst_finite(got.rows, want[0]) < exact, at + ": rows");
  const bool columns = s.both && !s.triangle;
  if (columns) expect(worst_finite(got.columns, want[1]) < exact, at + ": columns");
  // a bfloat16 score may cross a window's bound or zero
  if (!(s.precision == Precision::kBFloat16 && (s.window || s.reduction == Reduction::kRelu))) {
    expect(worst_finite(got.dx, dx) < bound, at + ": dx");
    if (!s.triangle) expect(worst_finite(got.dy, dy) < bound, at + ": dy");
    if (p.rows.bias) expect(worst_finite(got.dx_bias, dx_bias) < bound, at + ": dx_bias");
    if (p.rows.bias && !s.triangle) {
      expect(worst_finite(got.dy_bias, dy_bias) < bound, at + ": dy_bias");
    }
    // the sum cancels: against the size of what was summed
    double size = 0;
    for (size_t k = 0; k < dx.size(); ++k) size += std::abs(dx[k] * c.x[k]);
    const double error = std::abs(got.dscale[0] - dscale[0]);
    expect(s.nan ? std::isnan(got.dscale[0]) : error < bound * (size + 1e-3), at + ": dscale");
  }
  const auto all_same_bits = [&](const Results& a, const Results& b) {
    return same_bits(a.rows, b.rows) && same_bits(a.columns, b.columns) && same_bits(a.dx, b.dx) &&
           same_bits(a.dy, b.dy) && same_bits(a.dx_bias, b.dx_bias) &&
           same_bits(a.dy_bias, b.dy_bias) && same_bits(a.dscale, b.dscale);
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
  if (n * m > 40000) return;
  for (unsigned each = 1; each < kAll; each *= 2) {
    for (const unsigned asked : {each, kAll - each}) {
      const Results some = run(kernels, c, g[0], g[1], 3, 0, asked);
      expect((!(asked & kDx) || same_bits(some.dx, got.dx)) &&
                 (!(asked & kDy) || same_bits(some.dy, got.dy)) &&
                 (!(asked & kDscale) || same_bits(some.dscale, got.dscale)) &&
                 (!(asked & kDxBias) || same_bits(some.dx_bias, got.dx_bias)) &&
                 (!(asked & kDyBias) || same_bits(some.dy_bias, got.dy_bias)),
             at + ": some gradients have other bits than all");
    }
  }
}

// log(1 + e^z) of one pair each, to a few roundings.
void check_softplus(const Kernels& kernels) {
  Case c({1, 65, 1, 0, false, false, false, false, Score::kLinear, Reduction::kSoftplus,
          Precision::kFull, kInfinity});
  c.x[0] = 1;
  c.p.scale = 1;
  c.p.rule[kNegative] = {1, 0, kInfinity};
  for (int64_t j = 0; j < 65; ++j) c.y[j] = float(j - 32) / 16;
  const Results got = run(kernels, c, {1, 1, 0, 0}, std::vector<double>(260, 1.0), 1);
  for (int64_t j = 0; j < 65; ++j) {
    const double want = std::log1p(std::exp(double(c.y[j])));
    const double value = got.columns[kNegative * 65 + j];
    expect(std::abs(value - want) < 6e-7 * want, "softplus of " + std::to_string(c.y[j]));
  }
}

void check_attention(const Kernels& kernels, const Shape& s, int64_t width, bool positives) {
  const Case c(s);
  const PairProblem& p = c.p;
  const int64_t n = s.n, m = s.m, d = s.d;
  const auto values = random(m * width, 1, 5), g_out = random(n * width, 1, 6);
  const auto g_lse = random(n, 1, 7);
  const Attended got = attend(kernels, c, values.data(), width, positives, g_out, g_lse, 3);
  const auto& [out, dx, dy, dv, dx_bias, dy_bias, lse, dscale] = got;

  std::vector<double> want(n * width), want_lse(n), want_dx(n * d), want_dy(m * d),
      want_dv(m * width), want_dx_bias(n), want_dy_bias(m);
  double want_dscale = 0, size = 0;
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
      weight[j] = weight[j] == 0 ? 0 : weight[j] / sum;
      for (int64_t e = 0; e < width; ++e) {
        want[i * width + e] += weight[j] * values[j * width + e];
        want_dv[j * width + e] += weight[j] * g_out[i * width + e];
        t[j] += double(g_out[i * width + e]) * values[j * width + e];
      }
      mean += weight[j] * t[j];
    }
    for (int64_t j = 0; j < m; ++j) {
      const double g = weight[j] == 0 ? 0 : weight[j] * (t[j] - mean + g_lse[i]) * slope[j];
      const double product = c.u(i, j) - (p.rows.bias ? c.x_bias[i] + c.y_bias[j] : 0);
      if (g != 0) want_dscale += g * product / p.scale, size += std::abs(g * product / p.scale);
      want_dx_bias[i] += g;
      want_dy_bias[j] += g;
      for (int64_t e = 0; e < d; ++e) {
        want_dx[i * d + e] += g * p.scale * c.y[j * d + e];
        want_dy[j * d + e] += g * p.scale * c.x[i * d + e];
      }
    }
  }
  char name[160];
  std::snprintf(name, sizeof name, "%s attention n=%ld m=%ld d=%ld width=%ld%s%s%s scale=%g %d",
                kernels.capability, long(n), long(m), long(d), long(width),
                positives ? " positives" : "", s.groups ? " groups" : "", s.nan ? " nan" : "",
                s.scale, int(s.precision));
  const std::string at = name;
  const double bound =
      std::max(1.0, s.scale / 0.7) * (s.precision == Precision::kFull ? 2e-5 : 4e-2);
  expect(worst_finite(out, want) < bound, at + ": out");
  expect(worst_finite(lse, want_lse) < bound, at + ": lse");
  // a bfloat16 score may cross a window's bound
  if (s.precision == Precision::kBFloat16 && s.window) return;
  expect(worst_finite(dx, want_dx) < bound, at + ": dx");
  // 0 times NaN reaches pairs that are left out
  expect(s.nan || worst_finite(dy, want_dy) < bound, at + ": dy");
  expect(worst_finite(dv, want_dv) < bound, at + ": dvalues");
  if (p.rows.bias) {
    expect(worst_finite(dx_bias, want_dx_bias) < bound, at + ": dx_bias");
    expect(s.nan || worst_finite(dy_bias, want_dy_bias) < bound, at + ": dy_bias");
  }
  const double error = std::abs(dscale[0] - want_dscale);
  expect(s.nan ? std::isnan(dscale[0]) : error < bound * (size + 1e-3), at + ": dscale");
  const Attended one = attend(kernels, c, values.data(), width, positives, g_out, g_lse, 1);
  expect(same_bits(out, one.out) && same_bits(lse, one.lse) && same_bits(dx, one.dx) &&
             same_bits(dy, one.dy) && same_bits(dv, one.dv) && same_bits(dscale, one.dscale),
         at + ": one thread and three give different bits");
  for (unsigned asked : {0u, unsigned(kDx), unsigned(kDy), unsigned(kDscale), kAll + 1u}) {
    const Attended some =
        attend(kernels, c, values.data(), width, positives, g_out, g_lse, 3, asked);
    expect((!(asked & kDx) || same_bits(some.dx, dx)) &&
               (!(asked & kDy) || same_bits(some.dy, dy)) &&
               (!(asked & kDscale) || same_bits(some.dscale, dscale)) &&
               (!(asked & kDvalues) || same_bits(some.dv, dv)),
           at + ": some gradients have other bits than all");
  }
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
  check_softplus(kernels);
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
    const auto plain = [&](int64_t n, int64_t m, int64_t d, int classes) {
      return Shape{n, m, d, classes, false, true, false, false, kLinear, kLse, q, kInfinity};
    };
    Shape s = plain(240, 1301, 9, 4);
    s.totals = 0;  // one exponential for both sides
    s.self = s.runs = true;
    check(kernels, s);
    s.groups = s.nan = true;
    check(kernels, s);
    s.both = s.runs = false;
    s.left_out = true;
    check(kernels, s);
    s = plain(70, 300, 33, 4);
    for (const int totals : {0, 1, 2, 4, 8}) {
      s.totals = totals;
      check(kernels, s);
    }
    s.far = 90;
    check(kernels, s);
    s.classes = 0;
    check(kernels, s);
    s = plain(240, 512, 5, 0);  // tiles that have codes for two pairs alone
    s.listed = true;
    check(kernels, s);
    s = plain(9, 13, 5, 2);
    s.reduction = kSoftplus;
    s.totals = 0;
    check(kernels, s);
    s = plain(203, 301, 210, 3);
    s.both = false;
    check(kernels, s);
    s.both = true;
    if (q == Precision::kFull) s.scale = 20;  // shifts of rows and columns far apart
    check(kernels, s);
    s.totals = 0;
    check(kernels, s);
    s = plain(300, 300, 20, 0);
    s.triangle = s.self = true;
    s.totals = 0;
    check(kernels, s);
    if (q == Precision::kFull) s.scale = 20;
    check(kernels, s);
    s.classes = 3;
    s.nan = true;
    check(kernels, s);
    s = plain(12300, 3, 3, 3);  // two blocks of rows forward, six backward
    check(kernels, s);
    s = plain(150, 90, 9, 2);
    s.reduction = kSoftplus;
    s.window = s.nan = s.left_out = true;
    check(kernels, s);
    s.reduction = kRelu;
    s.reach = 1.4;
    check(kernels, s);

    s = plain(1, 1, 1, 0);
    s.left_out = true;
    check_attention(kernels, s, 1, false);
    s = plain(200, 1201, 20, 0);
    s.left_out = true;
    check_attention(kernels, s, 33, false);
    s = plain(61, 130, 70, 3);
    s.left_out = true;
    check_attention(kernels, s, 200, true);
    s = plain(240, 1301, 33, 4);
    s.runs = true;
    check_attention(kernels, s, 5, true);
    check_attention(kernels, s, 5, false);
    s.runs = false;
    s.groups = s.self = s.window = true;
    check_attention(kernels, s, 17, false);
    s.nan = true;
    check_attention(kernels, s, 17, true);
    s = plain(150, 600, 10, 3);
    if (q == Precision::kFull) s.scale = 20;
    check_attention(kernels, s, 40, false);
    s = plain(2300, 20, 3, 3);  // two blocks of rows
    check_attention(kernels, s, 5, false);
  }
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
