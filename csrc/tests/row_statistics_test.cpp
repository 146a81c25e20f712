// The kernels of one instruction set against the formulas in double, on threads, awkward shapes.
//
// usage: row_statistics_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <limits>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

struct Shape {
  int64_t n, c, d;
  bool normalize, bias, weighted, subset, keep;
  Precision precision = Precision::kFull;
  bool bend = false, compact = false, lengths = false;
  Type stored = Type::kFloat32;
  bool blas = false;
  bool whole = false;      // multiples of 1/4: products are exact, many are equal, and t is one
  bool confident = false;  // most targets are higher than all other classes
  bool masked = false;     // most biases are -inf
  float below = 0;         // of all biases
  int64_t group = 1;
};

// [4, n] t, p, q, r: c + (c - t)^2 / 8 above t, which no rounding of c tears; where `jump`, each
// second row adds 1/2 + c / 4 there, and its t lies in the widest gap between its products. Where
// `whole`, each row does, and its t is one of its products.
template <class T>
std::vector<T> bends(const std::vector<double>& raw, int64_t n, int64_t k, bool jump, bool whole) {
  std::vector<T> bend(4 * n);
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> sorted(raw.begin() + i * k, raw.begin() + (i + 1) * k);
    std::sort(sorted.begin(), sorted.end());
    const bool jumps = whole || (jump && i % 2);
    int64_t at = k / 2;
    for (int64_t j = 1; jumps && !whole && j < k; ++j) {
      const bool wider = j == 1 || sorted[j] - sorted[j - 1] > sorted[at] - sorted[at - 1];
      at = wider ? j : at;
    }
    const auto t = static_cast<T>(at && !whole ? (sorted[at] + sorted[at - 1]) / 2 : sorted[at]);
    bend[i] = t;
    bend[n + i] = t * t / 8 + (jumps ? T(0.5) : T(0));
    bend[2 * n + i] = 1 - t / 4 + (jumps ? T(0.25) : T(0));
    bend[3 * n + i] = T(0.125);
  }
  return bend;
}

template <class T>
void check(const Kernels& kernels, const Shape& s) {
  const int64_t n = s.n, c = s.c, d = s.d;
  auto x = drawn<T>(n * d, s.normalize ? 6 / std::sqrt(float(d)) : 0.3f, 1);
  auto w = drawn<T>(c * d, 1, 2);
  for (int64_t j = 0; s.lengths && j < c; ++j) {
    // zeros, numbers below the smallest normal one, and the rest of the range
    constexpr bool kDouble = sizeof(T) == 8;
    const double floats[] = {1, 0, 1e-42, 1e-36, 1e-21, 1e-9, 1e9, 1e21, 5e37};
    const double doubles[] = {1, 0, 1e-310, 1e-300, 1e-165, 1e-9, 1e9, 1e165, 1e305};
    for (int64_t e = 0; e < d; ++e) w[j * d + e] *= T((kDouble ? doubles : floats)[j % 9]);
  }
  if (s.whole) {
    for (T& v : x) v = std::round(v * 6) / 4;
    for (T& v : w) v = std::round(v);
  }
  auto bias = drawn<T>(c, 1, 3);
  for (int64_t j = 0; j < c; ++j)
    bias[j] = s.masked && j < c * 2 / 3 ? -INFINITY : bias[j] - s.below;
  const auto column = drawn<T>(c, 1, 4);
  auto g_lse = drawn<T>(n, 1, 5);
  const auto g_target = drawn<T>(n, 1, 6), g_weighted = drawn<T>(n, 0.1f, 7);
  std::vector<int64_t> ids;
  for (int64_t j = 0; j < c; ++j) {
    if (!s.subset || j % 3 != 1) ids.push_back(j);
  }
  const auto k = static_cast<int64_t>(ids.size());
  std::vector<int64_t> target(n, -1);  // position among ids
  std::vector<Target> targets;
  for (int64_t i = 0; i < n; ++i) {
    if (i % 5 == 3 || k == 0) continue;
    target[i] = (i * 7) % k;
    targets.push_back({target[i], i});
    for (int64_t e = 0; s.confident && e < d; ++e) x[i * d + e] += w[ids[target[i]] * d + e];
  }
  const bool narrow = s.stored == Type::kBFloat16;
  const auto x16 = narrow ? in_bf16(x) : std::vector<uint16_t>{};
  const auto w16 = narrow ? in_bf16(w) : std::vector<uint16_t>{};
  std::sort(targets.begin(), targets.end(), [](const Target& a, const Target& b) {
    return a.position != b.position ? a.position < b.position : a.row < b.row;
  });

  std::vector<double> norm(c, 1), raw(n * k);
  for (int64_t j = 0; s.normalize && j < c; ++j) {
    long double square = 0;  // of doubles at both ends of their range
    for (int64_t e = 0; e < d; ++e) square += static_cast<long double>(w[j * d + e]) * w[j * d + e];
    norm[j] = square == 0 ? INFINITY : static_cast<double>(std::sqrt(square));
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      double product = 0;
      for (int64_t e = 0; e < d; ++e) product += double(x[i * d + e]) * w[ids[j] * d + e];
      raw[i * k + j] = product / norm[ids[j]];
    }
  }
  const bool jump = s.precision != Precision::kBFloat16;
  const auto bend = s.bend ? bends<T>(raw, n, k, jump, s.whole) : std::vector<T>{};
  const auto bent = [&](int64_t i, double r) { return s.bend && r > bend[i]; };
  const auto psi = [&](int64_t i, double r) {
    return bent(i, r) ? bend[n + i] + bend[2 * n + i] * r + bend[3 * n + i] * r * r : r;
  };
  const auto slope = [&](int64_t i, double r) {
    return bent(i, r) ? bend[2 * n + i] + 2 * bend[3 * n + i] * r : 1;
  };

  const int64_t kept_classes = s.keep ? k * 2 / 3 : 0;
  std::vector<T> kept(kept_classes * round_up(n, kKeptPadding) + 1);
  Problem p = {{x.data(), s.stored, d},
               {w.data(), s.stored, d},
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
               {nullptr, nullptr},
               s.group};
  if (narrow) p.x.data = x16.data(), p.w.data = w16.data();
  if (s.blas) p.gemm = {gemm<float>, gemm<double>};
  std::vector<double> lse(n), got_target(n, NAN);
  std::vector<T> lse_in(n), weighted(n), score(n);
  std::vector<int64_t> hardest(n);
  const Parallel parallel = {3, on_threads};
  const auto room = [](size_t bytes) { return std::aligned_alloc(64, round_up(bytes, 64)); };
  void* buffer = room(kernels.rows.forward_bytes(p, 3));
  const ForwardOut out = {lse.data(), got_target.data(), s.weighted ? weighted.data() : nullptr,
                          hardest.data(), score.data()};
  kernels.rows.forward(p, out, buffer, parallel);
  std::free(buffer);
  std::copy(lse.begin(), lse.end(), lse_in.begin());
  const BackwardIn in = {g_lse.data(), g_target.data(), s.weighted ? g_weighted.data() : nullptr,
                         lse_in.data()};
  struct Gradients {
    std::vector<T> dx, dw, db;
  };
  const auto backward = [&](bool of_x, bool of_w) {
    Gradients g = {std::vector<T>(n * d), std::vector<T>(c * d), std::vector<T>(c)};
    auto dx16 = in_bf16(g.dx), dw16 = in_bf16(g.dw);
    void* const dx = narrow ? static_cast<void*>(dx16.data()) : g.dx.data();
    void* const dw = narrow ? static_cast<void*>(dw16.data()) : g.dw.data();
    const size_t bytes = round_up(kernels.rows.backward_bytes(p, 3, of_x, of_w), 64);
    void* memory = room(bytes);
    // what is in memory before is nothing to anyone
    if (of_x != of_w) std::fill_n(static_cast<T*>(memory), bytes / sizeof(T), T(-INFINITY));
    kernels.rows.backward(p, in, {of_x ? dx : nullptr, of_w ? dw : nullptr, g.db.data(), s.compact},
                          memory, parallel);
    std::free(memory);
    for (int64_t i = 0; narrow && i < n * d; ++i) g.dx[i] = std::bit_cast<float>(dx16[i] << 16);
    for (int64_t i = 0; narrow && i < c * d; ++i) g.dw[i] = std::bit_cast<float>(dw16[i] << 16);
    return g;
  };
  auto [dx, dw, db] = backward(true, true);
  const Gradients of_x = backward(true, false), of_w = backward(false, true);

  std::vector<double> want_lse(n), want_target(n), want_weighted(n), want_dx(n * d), want_dw(c * d),
      want_db(c);
  int64_t wrong_hardest = 0;
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0, best = -INFINITY;
    int64_t best_id = -1;
    std::vector<double> z(k);
    for (int64_t j = 0; j < k; ++j) {
      z[j] = psi(i, raw[i * k + j]) + (s.bias ? bias[ids[j]] : 0);
      if (j == target[i]) {
        want_target[i] = raw[i * k + j];
        continue;
      }
      want_weighted[i] += (s.weighted ? column[ids[j]] : 0) * z[j];
      if (z[j] > best) {
        best = z[j];
        best_id = ids[j];
      }
    }
    const double shift = best_id < 0 ? 0 : best;
    for (int64_t j = 0; j < k; ++j) sum += j == target[i] ? 0 : std::exp(z[j] - shift);
    want_lse[i] = shift + std::log(sum);
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
  const bool wide = s.stored == Type::kFloat64;
  const double loss_bound = wide ? 1e-12 : s.precision == Precision::kBFloat16 ? 2e-2 : 2e-6;
  // 2^-8: what gradients are rounded to
  const double gradient_bound = wide ? 1e-12 : !exact ? 1e-2 : narrow ? 0x1p-8 : 5e-6;
  char name[200];
  std::snprintf(name, sizeof name,
                "%s n=%ld c=%ld d=%ld%s%s%s%s%s%s%s%s%s%s%s%s stored=%d group=%ld precision=%d",
                kernels.capability, long(n), long(c), long(d), s.normalize ? " normalize" : "",
                s.bias ? " bias" : "", s.weighted ? " weighted" : "", s.subset ? " subset" : "",
                s.keep ? " keep" : "", s.bend ? " bend" : "", s.compact ? " compact" : "",
                s.lengths ? " lengths" : "", s.blas ? " blas" : "", s.whole ? " whole" : "",
                s.confident ? " confident" : "", s.masked ? " masked" : "", int(s.stored),
                long(s.group), int(s.precision));
  const std::string at = name;
  for (int64_t i = 0; i < n; ++i) {
    if (want_lse[i] != -INFINITY) continue;
    expect(lse[i] == -INFINITY, at + ": lse of no class");
    lse[i] = want_lse[i] = 0;
  }
  expect(worst(lse, want_lse) < loss_bound, at + ": lse");
  expect(worst(got_target, want_target) < loss_bound, at + ": target");
  if (s.weighted) expect(worst(weighted, want_weighted) < 10 * loss_bound, at + ": weighted_sum");
  expect(s.precision == Precision::kBFloat16 || wrong_hardest == 0, at + ": hardest");
  expect(of_x.dx == dx && of_w.dw == dw && of_x.db == db && of_w.db == db, at + ": one gradient");
  // with a NaN among the gradients, and an infinite entry of a class
  if (s.lengths) g_lse[0] = NAN, w[ids[8] * d] = INFINITY;
  const auto lost = s.lengths ? backward(true, true).dw : dw;
  for (int64_t j = 0; s.lengths && j < k; ++j) {
    // of comparable size; what 1/|w| takes out of range is infinite
    constexpr double kLeast = std::numeric_limits<T>::min();
    for (int64_t e = 0, id = ids[j]; e < d; ++e) {
      const int64_t i = (s.compact ? j : id) * d + e;
      if (norm[id] < kLeast) expect(std::abs(dw[i]) > 1e34, at + ": dw of a short row");
      if (norm[id] == INFINITY) expect(dw[i] == 0 && lost[i] == 0, at + ": dw of a row of zeros");
      if (j == 8) expect(lost[i] != lost[i], at + ": dw of an infinite row");
      const bool whole = norm[id] > kLeast && norm[id] < 0.1 / kLeast;
      dw[i] = whole ? static_cast<T>(dw[i] * norm[id]) : 0;
      want_dw[i] = whole ? want_dw[i] * norm[id] : 0;
    }
  }
  expect(worst(dx, want_dx) < gradient_bound, at + ": dx");
  expect(worst(dw, want_dw) < gradient_bound, at + ": dw");
  expect(worst(db, want_db) < gradient_bound, at + ": db");
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
    check<float>(kernels, {1, 7, 3, true, false, false, false, false, precision});
    check<float>(kernels, {37, 53, 24, true, false, false, false, true, precision});
    check<float>(kernels, {64, 500, 65, true, true, true, false, false, precision});
    check<float>(kernels, {300, 411, 128, true, true, false, true, true, precision});
    check<float>(kernels, {5, 1000, 513, false, true, true, true, true, precision});
    check<float>(kernels, {259, 97, 33, false, false, false, false, false, precision});
    check<float>(kernels, {3, 7, 5, true, false, false, false, false, precision, true, false});
    check<float>(kernels, {70, 500, 65, true, true, true, false, true, precision, true, true});
    check<float>(kernels, {300, 411, 40, true, true, false, true, true, precision, true, true});
    check<float>(kernels, {259, 97, 33, false, true, true, true, false, precision, true, false});
    check<float>(kernels, {33, 211, 24, true, false, false, true, false, precision, false, true});
    check<float>(kernels,
                 {40, 300, 24, true, true, true, false, true, precision, false, false, true});
    check<float>(kernels,
                 {300, 211, 33, true, false, false, true, false, precision, true, true, true});
    // ties, thresholds that are met, and targets that are the best class
    check<float>(kernels, {.n = 260,
                           .c = 1600,
                           .d = 4,
                           .weighted = true,
                           .keep = true,
                           .precision = precision,
                           .bend = true,
                           .whole = true});
    for (const int64_t c : {20, 411}) {
      check<float>(kernels, {.n = 300, .c = c, .d = 40, .precision = precision, .confident = true});
    }
    // whole blocks, rows in 16 bits, the host's products, groups that no block of rows fits
    check<float>(kernels, {.n = 256, .c = 99, .d = 24, .normalize = true, .precision = precision});
    for (const bool blas : {false, true}) {
      check<float>(kernels, {.n = 250,
                             .c = 131,
                             .d = 21,
                             .normalize = true,
                             .bias = true,
                             .precision = precision,
                             .stored = Type::kBFloat16,
                             .blas = blas});
      check<float>(kernels, {.n = 603,
                             .c = 205,
                             .d = 33,
                             .normalize = true,
                             .subset = blas,
                             .keep = true,
                             .precision = precision,
                             .lengths = true,
                             .blas = blas,
                             .group = 5});
    }
    check<float>(kernels, {.n = 9, .c = 800, .d = 7, .precision = precision, .group = 400});
    // no classes, one, none that counts at first, no elements
    check<float>(kernels, {.n = 3, .c = 0, .d = 4, .precision = precision});
    check<float>(kernels, {.n = 6, .c = 1, .d = 4, .normalize = true, .precision = precision});
    check<float>(kernels,
                 {.n = 70, .c = 300, .d = 9, .bias = true, .precision = precision, .masked = true});
    check<float>(kernels, {.n = 6, .c = 9, .d = 0, .bias = true, .precision = precision});
  }
  const Type wide = Type::kFloat64;
  for (const int64_t n : {40, 301}) {
    check<double>(kernels, {.n = n,
                            .c = 211,
                            .d = 24,
                            .normalize = true,
                            .bias = true,
                            .weighted = true,
                            .bend = true,
                            .lengths = true,
                            .stored = wide,
                            .blas = n > 256});
  }
  // lower than what double's exponential takes back
  check<double>(kernels, {.n = 6, .c = 9, .d = 5, .bias = true, .stored = wide, .below = 1000});
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
