// The class rules of one instruction set against their formulas in double, on threads.
//
// usage: class_rules_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <algorithm>
#include <cstdlib>
#include <tuple>
#include <utility>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

struct Case {
  int64_t n, classes, d, centers, slots;
  ClassRule rule;
  bool bend = false, subset = false, compact = false, normalize = true;
  double softness = 0;
  double t = 3;
  bool through = false, lengths = false;
  Precision precision = Precision::kFull;
  double scale = 6;  // of a softmax
  int64_t tile = 0;
  int64_t period = 0;  // so many classes, again and again
  int64_t thirds = 0;  // of the products that are kept
  bool near = false;   // rows are a class's first centre, or its opposite
  bool whole = false;  // multiples of 1/4: products are exact, and thresholds are met
  bool sunk = false;   // each fourth row's scores are -inf
  bool blas = false;
};

// ---- the formulas -------------------------------------------------------------------------------

double sigmoid(double z) { return 1 / (1 + std::exp(-z)); }

template <class T>
struct Formula {
  const Case& s;
  const double* params;
  const std::vector<T>& values;

  int statistics() const {
    return s.rule == ClassRule::kSummedSoftmax || s.rule == ClassRule::kSphereFace2 ? 2 : 1;
  }
  bool lse(int k) const {
    return k == 0 && (s.rule == ClassRule::kSoftmax || s.rule == ClassRule::kSummedSoftmax);
  }
  double value(int64_t k, int64_t i) const { return values[k * s.n + i]; }

  double term(int k, double c, int64_t i) const {
    if (s.rule == ClassRule::kSFace) return weight(c) * c;
    if (s.rule == ClassRule::kSphereFace2) {
      const double z = score(c, i);
      return k ? sigmoid(z) : std::log1p(std::exp(-std::abs(z))) + std::max(z, 0.0);
    }
    if (!s.bend || c <= value(0, i)) return params[0] * c;
    return params[0] * (value(1, i) + value(2, i) * c + value(3, i) * c * c);
  }
  double slope(int k, double c, int64_t i) const {
    if (s.rule == ClassRule::kSFace) return weight(c);
    if (s.rule == ClassRule::kSphereFace2) {
      const double share = sigmoid(score(c, i));
      const double of_score =
          params[0] * (s.through ? 1 : s.t * std::pow(std::max(0.0, (c + 1) / 2), s.t - 1));
      return (k ? share * (1 - share) : share) * of_score;
    }
    if (!s.bend || c <= value(0, i)) return params[0];
    return params[0] * (value(2, i) + 2 * value(3, i) * c);
  }

 private:
  double weight(double c) const {
    return sigmoid(params[0] * (params[1] - std::acos(std::clamp(c, -1.0, 1.0))));
  }
  double score(double c, int64_t i) const {
    const double raised = 2 * std::pow(std::max(0.0, (c + 1) / 2), s.t) - 1;
    return params[0] * (raised + params[1]) + value(0, i);
  }
};

// A class's cosine of its centres', and what of its slope reaches each.
double pooled(const std::vector<double>& of, double softness, std::vector<double>* shares) {
  const auto best = std::max_element(of.begin(), of.end());
  shares->assign(of.size(), 0);
  if (softness == 0 || of.size() == 1) {
    (*shares)[best - of.begin()] = 1;
    return *best;
  }
  double whole = 0, mean = 0;
  for (const double c : of) whole += std::exp((c - *best) / softness);
  for (const double c : of) mean += std::exp((c - *best) / softness) / whole * c;
  for (size_t k = 0; k < of.size(); ++k) {
    const double share = std::exp((of[k] - *best) / softness) / whole;
    (*shares)[k] = share * (1 + (of[k] - mean) / softness);
  }
  return mean;
}

// ---- a case -------------------------------------------------------------------------------------

std::vector<double> params_of(const Case& s) {
  if (s.rule == ClassRule::kSFace) return {20, 1.23};
  if (s.rule == ClassRule::kSphereFace2) return {8, 0.4, s.t, s.through ? 1.0 : 0.0};
  return {s.scale};
}

template <class T>
void check(const Kernels& kernels, const Case& s) {
  const int64_t n = s.n, d = s.d, size = s.classes * s.centers, again = s.period * s.centers * d;
  auto x = drawn<T>(n * d, 1, 1), w = drawn<T>(size * d, 1, 2);
  for (int64_t at = again; again && at < size * d; ++at) w[at] = w[at - again];
  for (int64_t i = 0; i < n; ++i) {
    T square = 0;
    const T* from = s.near ? &w[i * 7 % s.classes * s.centers * d] : &x[i * d];
    for (int64_t e = 0; e < d; ++e) square += from[e] * from[e];
    const T by = s.near && i % 2 ? -std::sqrt(square) : std::sqrt(square);
    for (int64_t e = 0; e < d; ++e)
      x[i * d + e] = s.whole ? std::round(4 * x[i * d + e]) / 4 : from[e] / by;
  }
  for (T& v : w) v = s.whole ? std::round(v) : v;
  for (int64_t j = 0; j < size; ++j) {
    const float lengths[] = {1, 0, 1e-21f, 1e9f};
    const T by = s.lengths                ? lengths[j % 4]
                 : s.normalize || s.whole ? 1
                                          : 1 / std::sqrt(static_cast<T>(d));
    for (int64_t e = 0; e < d; ++e) w[j * d + e] *= by;
  }
  // a class whose centres are equal: the first one's is the gradient
  for (int64_t k = 1; k < s.centers; ++k) std::copy_n(&w[0], d, &w[k * d]);

  std::vector<int64_t> ids, rows;
  for (int64_t j = 0; j < s.classes; ++j) {
    if (s.subset && j % 3 == 1) continue;
    ids.push_back(j);
    for (int64_t k = 0; k < s.centers; ++k) rows.push_back(j * s.centers + k);
  }
  const auto taking = static_cast<int64_t>(ids.size());
  std::vector<ClassLabel> labels;
  std::vector<std::vector<bool>> own(n, std::vector<bool>(taking));
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t l = 0; l < s.slots && i % 5 != 3; ++l) {
      const int64_t at = (i * 7 + (l == 2 ? 0 : l * 5)) % taking;  // the third is the first again
      labels.push_back({at, i, l});
      own[i][at] = true;
    }
  }
  std::sort(labels.begin(), labels.end(), [](const ClassLabel& a, const ClassLabel& b) {
    return std::tie(a.position, a.row, a.slot) < std::tie(b.position, b.row, b.slot);
  });

  const auto params = params_of(s);
  std::vector<T> values;
  if (s.rule == ClassRule::kSphereFace2) values = drawn<T>(n, 1, 3);
  const auto sunk = [&](int64_t i) { return s.sunk && i % 4 == 1; };
  if (s.bend) {  // c + (c - t)^2 / 2 above t: whole in value and slope; or torn in both
    const T tears = s.whole ? 0.25 : 0;
    for (int k = 0; k < 4; ++k) {
      for (int64_t i = 0; i < n; ++i) {
        const T t = (s.whole ? T(0.25) : T(0.02)) * static_cast<T>(i % 7);
        const T low[] = {-9, -INFINITY, 0, 0}, bent[] = {t, t * t / 2 + tears, 1 - t + tears, 0.5};
        values.push_back(sunk(i) ? low[k] : bent[k]);
      }
    }
  }
  const Formula<T> formula = {s, params.data(), values};
  const int statistics = formula.statistics();

  ClassProblem c = {};
  Problem& p = c.rows;
  constexpr bool kDouble = sizeof(T) == 8;
  p.x = {x.data(), kDouble ? Type::kFloat64 : Type::kFloat32, d};
  p.w = {w.data(), p.x.type, d};
  p.n = n;
  p.d = d;
  p.k = taking * s.centers;
  p.ids = s.subset ? rows.data() : nullptr;
  p.normalize = s.normalize;
  p.precision = s.precision;
  p.group = s.centers;
  p.tile = s.tile;
  p.kept_classes = p.k * s.thirds / 3;
  std::vector<T> kept(p.kept_classes * round_up(n, kKeptPadding));
  p.kept = kept.data();
  if (s.blas) p.gemm = {gemm<float>, gemm<double>};
  c.rule = s.rule;
  std::copy(params.begin(), params.end(), c.params);
  c.values = values.empty() ? nullptr : values.data();
  c.value_rows = static_cast<int64_t>(values.size()) / n;
  c.softness = s.softness;
  c.labels = labels.data();
  c.label_count = static_cast<int64_t>(labels.size());
  c.slots = s.slots;

  auto g = drawn<T>(statistics * n, 1, 5);
  const auto g_targets = drawn<T>(n * s.slots, 1, 6);
  for (int64_t i = 0; i < n; ++i) g[i] = sunk(i) ? INFINITY : g[i];  // of which nothing is left
  std::vector<double> got(statistics * n);
  std::vector<T> merged(statistics * n), score(n), dx(n * d), dw(size * d);
  std::vector<int64_t> hardest(n);
  const int threads = 3;
  const size_t bytes = std::max(kernels.classes.forward_bytes(c, threads),
                                kernels.classes.backward_bytes(c, threads, true, true));
  void* buffer = std::aligned_alloc(64, round_up(bytes, 64));
  const Parallel parallel = {threads, on_threads};
  const auto run = [&] {
    kernels.classes.forward(c, {got.data(), hardest.data(), score.data()}, buffer, parallel);
    std::copy(got.begin(), got.end(), merged.begin());
    const ClassBackwardIn in = {g.data(), g_targets.data(), merged.data()};
    kernels.classes.backward(c, in, {dx.data(), dw.data(), nullptr, s.compact}, buffer, parallel);
  };
  if (s.sunk) {  // an infinite cosine is the highest, and so is its row's sum
    const T before = std::exchange(x[0], INFINITY);
    run();
    expect(got[0] == INFINITY && score[0] == INFINITY, "an infinite cosine");
    x[0] = before;
  }
  if (s.centers > 1 && !s.lengths && !s.subset && !s.softness) {
    // of a class with a NaN the centre that has it gets what there is of a gradient
    const int64_t at = (2 * s.centers + 1) * d;
    const T before = std::exchange(w[at], NAN);
    run();
    expect(dw[at - d] == 0 && dw[at] != dw[at], "a centre with a NaN");
    w[at] = before;
    const T entry = std::exchange(x[0], NAN);
    run();
    expect(dx[0] != dx[0] && dx[d] == dx[d], "a row with a NaN");
    x[0] = entry;
  }
  run();
  std::free(buffer);

  std::vector<double> norm(size, 1), want(statistics * n), cosine(n * taking);
  std::vector<double> shares(n * taking * s.centers), products(n * taking * s.centers);
  for (int64_t j = 0; s.normalize && j < size; ++j) {
    norm[j] = 0;
    for (int64_t e = 0; e < d; ++e) norm[j] += double(w[j * d + e]) * w[j * d + e];
    norm[j] = norm[j] == 0 ? INFINITY : std::sqrt(norm[j]);
  }
  int64_t wrong_hardest = 0;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> sums(statistics);
    double best = -INFINITY, top = -INFINITY;
    int64_t best_id = -1;
    for (int64_t j = 0; j < taking; ++j) {
      std::vector<double> of(s.centers), share;
      for (int64_t k = 0; k < s.centers; ++k) {
        const int64_t row = ids[j] * s.centers + k;
        for (int64_t e = 0; e < d; ++e) of[k] += double(x[i * d + e]) * w[row * d + e];
        of[k] /= norm[row];
      }
      const double at = cosine[i * taking + j] = pooled(of, s.softness, &share);
      std::copy(share.begin(), share.end(), &shares[(i * taking + j) * s.centers]);
      std::copy(of.begin(), of.end(), &products[(i * taking + j) * s.centers]);
      if (own[i][j]) continue;
      for (int k = 0; k < statistics; ++k) {
        const double term = formula.term(k, at, i);
        if (formula.lse(k) && term > top) sums[k] *= std::exp(std::exchange(top, term) - term);
        sums[k] += !formula.lse(k) ? term : term > -INFINITY ? std::exp(term - top) : 0;
      }
      if (at > best) {
        best = at;
        best_id = ids[j];
      }
    }
    for (int k = 0; k < statistics; ++k) {
      want[k * n + i] = formula.lse(k) && sums[k] > 0 ? top + std::log(sums[k])
                        : formula.lse(k)              ? -INFINITY
                                                      : sums[k];
    }
    wrong_hardest += hardest[i] != best_id;
  }
  std::vector<double> want_dx(n * d), want_dw(size * d), along(size);
  for (int64_t j = 0; j < taking; ++j) {
    for (int64_t i = 0; i < n; ++i) {
      const double at = cosine[i * taking + j];
      double of_cosine = 0;
      for (int k = 0; k < statistics && !own[i][j]; ++k) {
        if (formula.lse(k) && want[k * n + i] == -INFINITY) continue;
        const double share =
            formula.lse(k) ? std::exp(formula.term(k, at, i) - want[k * n + i]) : 1;
        of_cosine += g[k * n + i] * formula.slope(k, at, i) * share;
      }
      for (const ClassLabel& l : labels) {
        if (l.position == j && l.row == i) of_cosine += g_targets[i * s.slots + l.slot];
      }
      for (int64_t k = 0; k < s.centers; ++k) {
        const int64_t row = ids[j] * s.centers + k, to = s.compact ? j * s.centers + k : row;
        const int64_t pair = (i * taking + j) * s.centers + k;
        const double of = of_cosine * shares[pair];
        const double back = s.normalize ? products[pair] / norm[row] : 0;
        for (int64_t e = 0; e < d; ++e) {
          want_dx[i * d + e] += of * w[row * d + e] / norm[row];
          want_dw[to * d + e] += of * (x[i * d + e] - back * w[row * d + e]) / norm[row];
        }
      }
    }
  }
  if (s.lengths) {  // of comparable size
    for (int64_t j = 0; j < taking * s.centers; ++j) {
      const int64_t row = rows[j], to = s.compact ? j : row;
      for (int64_t e = 0; e < d; ++e) {
        if (norm[row] == INFINITY) expect(dw[to * d + e] == 0, "dw of a row of zeros");
        const double by = norm[row] == INFINITY ? 0 : norm[row];
        dw[to * d + e] = static_cast<T>(dw[to * d + e] * by);
        want_dw[to * d + e] *= by;
      }
    }
  }
  char name[250];
  std::snprintf(
      name, sizeof name,
      "%s rule=%d n=%ld classes=%ld d=%ld centers=%ld slots=%ld bend=%d subset=%d "
      "compact=%d softness=%g t=%g lengths=%d precision=%d near=%d whole=%d sunk=%d bytes=%d",
      kernels.capability, int(s.rule), long(n), long(s.classes), long(d), long(s.centers),
      long(s.slots), s.bend, s.subset, s.compact, s.softness, s.t, s.lengths, int(s.precision),
      s.near, s.whole, s.sunk, int(sizeof(T)));
  const std::string at = name;
  const bool narrow = s.precision == Precision::kBFloat16;
  const double bound = kDouble ? 1e-12 : narrow ? 2e-2 : 5e-6;
  for (size_t i = 0; i < want.size(); ++i) {
    if (want[i] != -INFINITY) continue;
    expect(got[i] == -INFINITY, at + ": a statistic of nothing");
    got[i] = want[i] = 0;
  }
  expect(worst(got, want) < bound, at + ": statistics");
  expect(narrow || wrong_hardest == 0, at + ": hardest");
  // in double a cosine's rounding times the scale
  const double full = kDouble ? 1e-11 : 2e-5;
  const double gradient_bound = s.precision == Precision::kFull ? full : 3e-2;
  expect(worst(dx, want_dx) < gradient_bound, at + ": dx");
  expect(worst(dw, want_dw) < gradient_bound, at + ": dw");
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  for (const ClassRule rule : {ClassRule::kSoftmax, ClassRule::kSummedSoftmax, ClassRule::kSFace,
                               ClassRule::kSphereFace2}) {
    const bool bends = rule == ClassRule::kSoftmax || rule == ClassRule::kSummedSoftmax;
    check<float>(kernels, {.n = 1, .classes = 7, .d = 3, .centers = 1, .slots = 1, .rule = rule});
    check<float>(kernels,
                 {.n = 37, .classes = 211, .d = 24, .centers = 3, .slots = 4, .rule = rule});
    check<float>(kernels, {.n = 64,
                           .classes = 300,
                           .d = 65,
                           .centers = 1,
                           .slots = 3,
                           .rule = rule,
                           .bend = bends,
                           .subset = true,
                           .compact = true,
                           .t = 2.6});
    check<float>(kernels, {.n = 300,
                           .classes = 130,
                           .d = 33,
                           .centers = 5,
                           .slots = 2,
                           .rule = rule,
                           .bend = bends,
                           .subset = true,
                           .softness = 0.2,
                           .through = true});
    check<float>(kernels, {.n = 33,
                           .classes = 500,
                           .d = 40,
                           .centers = 2,
                           .slots = 1,
                           .rule = rule,
                           .normalize = false,
                           .t = 1});
    check<float>(kernels, {.n = 40,
                           .classes = 90,
                           .d = 24,
                           .centers = 4,
                           .slots = 2,
                           .rule = rule,
                           .compact = true,
                           .lengths = true});
    // more centres than a tile has rows
    check<float>(
        kernels,
        {.n = 5, .classes = 3, .d = 8, .centers = 500, .slots = 1, .rule = rule, .softness = 0.5});
    // equal classes, in a thread's tiles and beyond; rows that are labels, cosines at both ends
    for (const double t : {1.0, 2.6}) {
      check<float>(kernels, {.n = 64,
                             .classes = 150,
                             .d = 16,
                             .centers = 1,
                             .slots = 3,
                             .rule = rule,
                             .t = t,
                             .tile = 24,
                             .period = 30,
                             .near = true});
    }
    check<float>(kernels, {.n = 260,
                           .classes = 100,
                           .d = 5,
                           .centers = 1,
                           .slots = 2,
                           .rule = rule,
                           .bend = bends,
                           .normalize = false,
                           .whole = true});
    // kept products, all and some; the host's
    check<float>(
        kernels,
        {.n = 64, .classes = 50, .d = 9, .centers = 2, .slots = 1, .rule = rule, .thirds = 3});
    check<float>(kernels, {.n = 600,
                           .classes = 41,
                           .d = 8,
                           .centers = 5,
                           .slots = 2,
                           .rule = rule,
                           .subset = true,
                           .tile = 30,
                           .thirds = 2});
    check<float>(
        kernels,
        {.n = 250, .classes = 40, .d = 9, .centers = 1, .slots = 1, .rule = rule, .blas = true});
    if (bends) {
      check<float>(kernels, {.n = 21,
                             .classes = 50,
                             .d = 8,
                             .centers = 1,
                             .slots = 1,
                             .rule = rule,
                             .bend = true,
                             .softness = 0.5,
                             .sunk = true});
    }
    // no other class; terms that double's exponential takes nowhere, of all threads and of one
    check<double>(kernels, {.n = 6, .classes = 1, .d = 3, .centers = 1, .slots = 1, .rule = rule});
    check<double>(
        kernels,
        {.n = 40, .classes = 4, .d = 3, .centers = 1, .slots = 1, .rule = rule, .scale = 3000});
    check<double>(kernels, {.n = 40,
                            .classes = 150,
                            .d = 24,
                            .centers = 1,
                            .slots = 2,
                            .rule = rule,
                            .scale = 3000,
                            .tile = 24,
                            .near = true});
    for (const Precision precision : {Precision::kMixed, Precision::kBFloat16}) {
      if (!kernels.bf16) break;
      check<float>(kernels, {.n = 70,
                             .classes = 131,
                             .d = 65,
                             .centers = 1,
                             .slots = 2,
                             .rule = rule,
                             .precision = precision});
      check<float>(kernels, {.n = 300,
                             .classes = 61,
                             .d = 40,
                             .centers = 3,
                             .slots = 2,
                             .rule = rule,
                             .subset = true,
                             .softness = 0.2,
                             .precision = precision});
    }
  }
  // so many and so long that tiles are as large as they may be
  check<float>(
      kernels,
      {.n = 3, .classes = 156, .d = 2800, .centers = 5, .slots = 1, .rule = ClassRule::kSoftmax});
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
