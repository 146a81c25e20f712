// The kernels of one instruction set against the formulas in double, on threads, awkward shapes.
//
// usage: row_statistics_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <algorithm>
#include <cstdlib>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

struct Shape {
  int64_t n, c, d;
  bool normalize, bias, weighted, subset, keep;
  Precision precision;
  bool bend = false, compact = false, lengths = false;
};

// [4, n] t, p, q, r: c + (c - t)^2 / 8 above t, which no rounding of c tears; where `jump`, each
// second row adds 1/2 there, and its t lies in the widest gap between its products.
std::vector<float> bends(const std::vector<double>& raw, int64_t n, int64_t k, bool jump) {
  std::vector<float> bend(4 * n);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> sorted(raw.begin() + i * k, raw.begin() + (i + 1) * k);
    std::sort(sorted.begin(), sorted.end());
    const bool jumps = jump && i % 2;
    int64_t at = k / 2;
    for (int64_t j = 1; jumps && j < k; ++j) {
      const bool wider = j == 1 || sorted[j] - sorted[j - 1] > sorted[at] - sorted[at - 1];
      at = wider ? j : at;
    }
    const auto t = static_cast<float>(at ? (sorted[at] + sorted[at - 1]) / 2 : sorted[0]);
    bend[i] = t;
    bend[n + i] = t * t / 8 + (jumps ? 0.5f : 0.0f);
    bend[2 * n + i] = 1 - t / 4;
    bend[3 * n + i] = 0.125f;
  }
  return bend;
}

void check(const Kernels& kernels, const Shape& s) {
  const int64_t n = s.n, c = s.c, d = s.d;
  const auto x = random(n * d, s.normalize ? 6 / std::sqrt(float(d)) : 0.3f, 1);
  auto w = random(c * d, 1, 2);
  for (int64_t j = 0; s.lengths && j < c; ++j) {
    // zeros, numbers below the smallest normal one, and the rest of the range
    const float lengths[] = {1, 0, 1e-42f, 1e-36f, 1e-21f, 1e-9f, 1e9f, 1e21f, 5e37f};
    for (int64_t e = 0; e < d; ++e) w[j * d + e] *= lengths[j % 9];
  }
  const auto bias = random(c, 1, 3), column = random(c, 1, 4);
  const auto g_lse = random(n, 1, 5), g_target = random(n, 1, 6), g_weighted = random(n, 0.1f, 7);
  std::vector<int64_t> ids;
  for (int64_t j = 0; j < c; ++j) {
    if (!s.subset || j % 3 != 1) ids.push_back(j);
  }
  const auto k = static_cast<int64_t>(ids.size());
  std::vector<int64_t> target(n, -1);  // position among ids
  std::vector<Target> targets;
  for (int64_t i = 0; i < n; ++i) {
    if (i % 5 == 3) continue;
    target[i] = (i * 7) % k;
    targets.push_back({target[i], i});
  }
  std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) {
    return a.position != b.position ? a.position < b.position : a.row < b.row;
  });

  std::vector<double> norm(c, 1), raw(n * k);
  for (int64_t j = 0; s.normalize && j < c; ++j) {
    norm[j] = 0;
    for (int64_t e = 0; e < d; ++e) norm[j] += double(w[j * d + e]) * w[j * d + e];
    norm[j] = norm[j] == 0 ? INFINITY : std::sqrt(norm[j]);
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      double product = 0;
      for (int64_t e = 0; e < d; ++e) product += double(x[i * d + e]) * w[ids[j] * d + e];
      raw[i * k + j] = product / norm[ids[j]];
    }
  }
  const auto bend = bends(raw, n, k, s.precision != Precision::kBFloat16);
  const auto bent = [&](int64_t i, double r) { return s.bend && r > bend[i]; };
  const auto psi = [&](int64_t i, double r) {
    return bent(i, r) ? bend[n + i] + bend[2 * n + i] * r + bend[3 * n + i] * r * r : r;
  };
  const auto slope = [&](int64_t i, double r) {
    return bent(i, r) ? bend[2 * n + i] + 2 * bend[3 * n + i] * r : 1;
  };

  const int64_t kept_classes = s.keep ? k * 2 / 3 : 0;
  std::vector<float> kept(kept_classes * round_up(n, kKeptPadding) + 1);
  const Problem p = {{x.data(), Type::kFloat32, d},
                     {w.data(), Type::kFloat32, d},
                     n,
                     d,
                     k,
                     s.subset ? ids.data() : nullptr,
                     s.bias ? bias.data() : nullptr,
                     s.weighted ? column.data() : nullptr,
                     s.bend ? bend.data() : nullptr,
                     targets.data(),
                     static_cast<int64_t>(targets.size()),
                     s.normalize,
                     s.weighted,
                     s.precision,
                     kept.data(),
                     kept_classes,
                     {nullptr, nullptr}};
  std::vector<double> lse(n), got_target(n);
  std::vector<float> lse_float(n), weighted(n), score(n), dx(n * d), dw(c * d), db(c);
  std::vector<int64_t> hardest(n);
  const Parallel parallel = {3, on_threads};
  const size_t bytes =
      std::max(kernels.rows.forward_bytes(p, 3), kernels.rows.backward_bytes(p, 3, true, true));
  void* buffer = std::aligned_alloc(64, round_up(bytes, 64));
  const ForwardOut out = {lse.data(), got_target.data(), s.weighted ? weighted.data() : nullptr,
                          hardest.data(), score.data()};
  kernels.rows.forward(p, out, buffer, parallel);
  std::copy(lse.begin(), lse.end(), lse_float.begin());
  const BackwardIn in = {g_lse.data(), g_target.data(), s.weighted ? g_weighted.data() : nullptr,
                         lse_float.data()};
  kernels.rows.backward(p, in, {dx.data(), dw.data(), db.data(), s.compact}, buffer, parallel);
  std::free(buffer);

  std::vector<double> want_lse(n), want_target(n), want_weighted(n), want_dx(n * d), want_dw(c * d),
      want_db(c);
  int64_t wrong_hardest = 0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0, best = -INFINITY;
    int64_t best_id = -1;
    for (int64_t j = 0; j < k; ++j) {
      const double z = psi(i, raw[i * k + j]) + (s.bias ? bias[ids[j]] : 0);
      if (j == target[i]) {
        want_target[i] = raw[i * k + j];
        continue;
      }
      sum += std::exp(z);
      want_weighted[i] += (s.weighted ? column[ids[j]] : 0) * z;
      if (z > best) {
        best = z;
        best_id = ids[j];
      }
    }
    want_lse[i] = std::log(sum);
    wrong_hardest += hardest[i] != best_id;
  }
  for (int64_t j = 0; j < k; ++j) {
    const int64_t id = ids[j], row = s.compact ? j : id;
    std::vector<double> dwhat(d);
    double along = 0;
    for (int64_t i = 0; i < n; ++i) {
      const double z = psi(i, raw[i * k + j]) + (s.bias ? bias[id] : 0);
      double g = g_lse[i] * std::exp(z - want_lse[i]);
      if (s.weighted) g += double(g_weighted[i]) * column[id];
      if (j == target[i]) {
        g = g_target[i];
      } else {
        want_db[id] += g;
        g *= slope(i, raw[i * k + j]);
      }
      along += g * raw[i * k + j];
      for (int64_t e = 0; e < d; ++e) {
        want_dx[i * d + e] += g * w[id * d + e] / norm[id];
        dwhat[e] += g * x[i * d + e];
      }
    }
    for (int64_t e = 0; e < d; ++e) {
      const double projected = s.normalize ? along * w[id * d + e] / norm[id] : 0;
      want_dw[row * d + e] = (dwhat[e] - projected) / norm[id];
    }
  }
  const bool exact = s.precision == Precision::kFull;
  const double loss_bound = s.precision == Precision::kBFloat16 ? 2e-2 : 2e-6;
  const double gradient_bound = exact ? 5e-6 : 1e-2;
  char name[200];
  std::snprintf(name, sizeof name, "%s n=%ld c=%ld d=%ld%s%s%s%s%s%s%s%s precision=%d",
                kernels.capability, long(n), long(c), long(d), s.normalize ? " normalize" : "",
                s.bias ? " bias" : "", s.weighted ? " weighted" : "", s.subset ? " subset" : "",
                s.keep ? " keep" : "", s.bend ? " bend" : "", s.compact ? " compact" : "",
                s.lengths ? " lengths" : "", int(s.precision));
  const std::string at = name;
  expect(k == 1 || worst(lse, want_lse) < loss_bound, at + ": lse");
  expect(worst(got_target, want_target) < loss_bound, at + ": target");
  if (s.weighted) expect(worst(weighted, want_weighted) < 10 * loss_bound, at + ": weighted_sum");
  expect(s.precision == Precision::kBFloat16 || wrong_hardest == 0, at + ": hardest");
  for (int64_t j = 0; s.lengths && j < k; ++j) {
    // of comparable size; what 1/|w| takes out of float's range is infinite
    for (int64_t e = 0, id = ids[j]; e < d; ++e) {
      const int64_t i = (s.compact ? j : id) * d + e;
      if (norm[id] < 1e-38) expect(std::abs(dw[i]) > 1e34, at + ": dw of a short row");
      if (norm[id] == INFINITY) expect(dw[i] == 0, at + ": dw of a row of zeros");
      const bool whole = norm[id] > 1e-38 && norm[id] < 1e37;
      dw[i] = whole ? static_cast<float>(dw[i] * norm[id]) : 0;
      want_dw[i] = whole ? want_dw[i] * norm[id] : 0;
    }
  }
  if (k > 1) {
    expect(worst(dx, want_dx) < gradient_bound, at + ": dx");
    expect(worst(dw, want_dw) < gradient_bound, at + ": dw");
    expect(worst(db, want_db) < gradient_bound, at + ": db");
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
  for (const Precision precision : precisions) {
    check(kernels, {1, 7, 3, true, false, false, false, false, precision});
    check(kernels, {37, 53, 24, true, false, false, false, true, precision});
    check(kernels, {64, 500, 65, true, true, true, false, false, precision});
    check(kernels, {300, 411, 128, true, true, false, true, true, precision});
    check(kernels, {5, 1000, 513, false, true, true, true, true, precision});
    check(kernels, {259, 97, 33, false, false, false, false, false, precision});
    check(kernels, {3, 7, 5, true, false, false, false, false, precision, true, false});
    check(kernels, {70, 500, 65, true, true, true, false, true, precision, true, true});
    check(kernels, {300, 411, 40, true, true, false, true, true, precision, true, true});
    check(kernels, {259, 97, 33, false, true, true, true, false, precision, true, false});
    check(kernels, {33, 211, 24, true, false, false, true, false, precision, false, true});
    check(kernels, {40, 300, 24, true, true, true, false, true, precision, false, false, true});
    check(kernels, {300, 211, 33, true, false, false, true, false, precision, true, true, true});
  }
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
