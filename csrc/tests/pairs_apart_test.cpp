// Scores made of distances between rows that nearly meet, of one instruction set, against formulas
// of differences in double: statistics, gradients, attention; the same bits on any number of
// threads.
//
// usage: pairs_apart_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <cstdlib>
#include <cstring>
#include <memory>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kWidth = 0.05;  // of a cluster

struct Shape {
  int64_t n, m, d;
  bool triangle;
  Score score;
  Precision precision;
};

std::vector<float> rows_of(int64_t n, int64_t d, unsigned seed) {
  std::vector<float> x = random(n * d, kWidth / std::sqrt(2.0f * d), seed);
  // two clusters far from 0 and from one another; every seventh row twice
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t e = 0; e < d; ++e) {
      x[i * d + e] = i % 7 == 6 ? x[(i - 1) * d + e] : x[i * d + e] + (i % 7 < 3 ? 100 : -60);
    }
  }
  return x;
}

std::vector<float> half_norms(const std::vector<float>& x, int64_t n, int64_t d) {
  std::vector<float> out(n);
  for (int64_t i = 0; i < n; ++i) {
    double sum = 0;
    for (int64_t e = 0; e < d; ++e) sum += double(x[i * d + e]) * x[i * d + e];
    out[i] = float(-sum / 2);
  }
  return out;
}

struct Case {
  std::vector<float> x, y, x_half, y_half, x_bias, y_bias;
  std::vector<int32_t> x_labels, y_labels;
  PairProblem p = {};

  explicit Case(const Shape& s) {
    x = rows_of(s.n, s.d, 1);
    y = s.triangle ? x : rows_of(s.m, s.d, 2);
    x_half = half_norms(x, s.n, s.d);
    y_half = half_norms(y, s.m, s.d);
    // a root has none, lest its argument be above 0
    const float some = s.score == Score::kRoot ? 0 : 0.1f;
    for (int64_t i = 0; i < s.n; ++i) x_bias.push_back(some * float(i % 7));
    for (int64_t j = 0; j < s.m; ++j) y_bias.push_back(some * float(j % 5 - 3));
    for (int64_t i = 0; i < s.n; ++i) x_labels.push_back(int32_t(i / 5 % 3));
    for (int64_t j = 0; j < s.m; ++j) y_labels.push_back(int32_t(j / 5 % 3));
    p.rows = {x.data(), s.n,     x_bias.data(), x_labels.data(),
              nullptr,  nullptr, nullptr,       x_half.data()};
    p.columns = {y.data(), s.m,     y_bias.data(), y_labels.data(),
                 nullptr,  nullptr, nullptr,       y_half.data()};
    if (s.triangle) p.columns = p.rows;
    p.d = s.d;
    // u = -t |x - y|^2
    p.scale = 2 / (kWidth * kWidth);
    p.score = s.score;
    p.rule[kPositive] = {-0.7, 0.3, kInfinity};
    p.rule[kNegative] = {1.2, -0.2, kInfinity};
    p.reduction = Reduction::kSoftplus;
    p.triangle = s.triangle;
    p.both = true;
    p.apart = true;
    p.precision = s.precision;
  }

  double squared(int64_t i, int64_t j) const {
    double sum = 0;
    for (int64_t e = 0; e < p.d; ++e) {
      const double v = double(x[i * p.d + e]) - y[j * p.d + e];
      sum += v * v;
    }
    return sum;
  }

  double score(int64_t i, int64_t j) const {
    const auto bias = [](const PairSide& side, int64_t k) {
      return double(static_cast<const float*>(side.bias)[k]);
    };
    return -p.scale / 2 * squared(i, j) + bias(p.rows, i) + bias(p.columns, j);
  }

  // z of a pair's class and dz/du.
  PairClass term(int64_t i, int64_t j, double* z, double* slope) const {
    const double u = score(i, j);
    const bool is_root = p.score == Score::kRoot;
    const double s = is_root ? -std::sqrt(-u) : u, ds = !is_root ? 1 : u < 0 ? -0.5 / s : 0;
    const PairClass c = p.rows.labels[i] == p.columns.labels[j] ? kPositive : kNegative;
    *z = p.rule[c].factor * (s - p.rule[c].center);
    *slope = p.rule[c].factor * ds;
    return c;
  }
};

struct Buffer {
  explicit Buffer(size_t bytes) : data(std::aligned_alloc(64, (bytes + 127) / 64 * 64), std::free) {
    std::memset(data.get(), 0xff, (bytes + 127) / 64 * 64);  // NaN everywhere
  }
  std::unique_ptr<void, void (*)(void*)> data;
};

// The largest error against what it may be a fraction of.
template <class T>
double largest(const std::vector<T>& got, const std::vector<double>& want,
               const std::vector<double>& size) {
  double most = 0;
  for (size_t k = 0; k < want.size(); ++k) {
    const double error = std::abs(got[k] - want[k]);
    if (!(error <= most * (size[k] + 1e-30))) most = error / (size[k] + 1e-30);
  }
  return most;
}

void check(const Kernels& kernels, const Shape& s) {
  const Case c(s);
  const PairProblem& p = c.p;
  const int64_t n = s.n, m = s.m, d = s.d;
  std::vector<double> g_rows(2 * kClasses * n, 0), g_columns(2 * kClasses * m, 0);
  const auto first = random(2 * kClasses * n, 1, 3), second = random(2 * kClasses * m, 1, 4);
  g_rows.assign(first.begin(), first.end());
  g_columns.assign(second.begin(), second.end());

  // value and total of a class, [2, classes, count], with the sum of what was added
  std::vector<double> want(2 * kClasses * n), size(want.size()), dx(n * d), dx_size(n * d),
      dy(m * d), dy_size(m * d);
  double dscale = 0, dscale_size = 0;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      if (s.triangle && i == j) continue;
      double z, slope;
      const int64_t k = c.term(i, j, &z, &slope);
      const double f = std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z)));
      const double df = 1 / (1 + std::exp(-z));
      const int64_t row = k * n + i, column = k * m + j, r = kClasses * n, q = kClasses * m;
      want[row] += f;
      size[row] += f * (1 + std::abs(z));
      want[r + row] += z;
      size[r + row] += std::abs(z) + 1;
      double g = g_rows[row] * df + g_rows[r + row];
      double g_size = std::abs(g_rows[row]) * df * (1 + std::abs(z)) + std::abs(g_rows[r + row]);
      if (!s.triangle) {
        g += g_columns[column] * df + g_columns[q + column];
        g_size += std::abs(g_columns[column]) * df * (1 + std::abs(z));
        g_size += std::abs(g_columns[q + column]);
      }
      g *= slope;
      g_size *= std::abs(slope);
      const double square = c.squared(i, j), length = std::sqrt(square);
      dscale -= g * square / 2;
      dscale_size += g_size * square / 2;
      for (int64_t e = 0; e < d; ++e) {
        const double by = double(c.y[j * d + e]) - c.x[i * d + e];
        dx[i * d + e] += p.scale * g * by;
        dy[j * d + e] -= p.scale * g * by;
        dx_size[i * d + e] += p.scale * g_size * length;
        dy_size[j * d + e] += p.scale * g_size * length;
      }
    }
  }
  for (size_t k = 0; s.triangle && k < dx.size(); ++k) {
    dx[k] += dy[k];
    dx_size[k] += dy_size[k];
  }

  std::vector<double> rows[2], columns[2], scales[2] = {{0}, {0}};
  std::vector<float> got_dx[2], got_dy[2];
  for (int run = 0; run < 2; ++run) {
    const int threads = run ? 3 : 1;
    const Parallel parallel = {threads, on_threads};
    rows[run].assign(kStatistics * kClasses * n, NAN);
    columns[run].assign(kStatistics * kClasses * m, NAN);
    got_dx[run].assign(n * d, NAN);
    got_dy[run].assign(m * d, NAN);
    const PairBackwardOut out = {got_dx[run].data(), s.triangle ? nullptr : got_dy[run].data(),
                                 scales[run].data(), nullptr, nullptr};
    Buffer forward(kernels.pairs.forward_bytes(p, threads));
    kernels.pairs.forward(p, {rows[run].data(), columns[run].data()}, forward.data.get(), parallel);
    Buffer backward(kernels.pairs.backward_bytes(p, out, threads));
    const PairBackwardIn in = {g_rows.data(), g_columns.data(), rows[run].data(),
                               columns[run].data()};
    kernels.pairs.backward(p, in, out, backward.data.get(), parallel);
  }
  char name[160];
  std::snprintf(name, sizeof name, "%s apart n=%ld m=%ld d=%ld%s%s %d", kernels.capability, long(n),
                long(m), long(d), s.triangle ? " triangle" : "",
                s.score == Score::kRoot ? " root" : "", int(s.precision));
  const std::string at = name;
  // far pairs round in their products, by 16 or 4 times as much as their distances
  const double u = s.precision == Precision::kFull ? 6e-8 : 4e-3;
  const double bound = (d + 8.0) * u * (s.precision == Precision::kFull ? 16 : 4);
  rows[0].resize(want.size());
  expect(largest(rows[0], want, size) < bound, at + ": rows");
  expect(largest(got_dx[0], dx, dx_size) < bound, at + ": dx");
  if (!s.triangle) expect(largest(got_dy[0], dy, dy_size) < bound, at + ": dy");
  expect(std::abs(scales[0][0] - dscale) < bound * dscale_size, at + ": dscale");
  const auto same_bits = [](const auto& a, const auto& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  rows[1].resize(want.size());
  expect(same_bits(rows[0], rows[1]) && same_bits(columns[0], columns[1]) &&
             same_bits(got_dx[0], got_dx[1]) && same_bits(got_dy[0], got_dy[1]) &&
             same_bits(scales[0], scales[1]),
         at + ": one thread and three give different bits");
}

// Kept products, and gradients that are asked for alone, change no bits.
void check_bits(const Kernels& kernels, const Shape& s) {
  const Case c(s);
  PairProblem p = c.p;
  const int64_t n = s.n, m = s.m, d = s.d;
  const auto g_rows = drawn<double>(2 * kClasses * n, 1, 3);
  const auto g_columns = drawn<double>(2 * kClasses * m, 1, 4);
  const Parallel parallel = {3, on_threads};
  std::vector<double> rows(kStatistics * kClasses * n), columns(kStatistics * kClasses * m);
  std::vector<float> dx[2], dy[2];
  double dscale[2];
  const int64_t all = kernels.pairs.kept(p, std::numeric_limits<int64_t>::max());
  // 0: all; then one gradient, or all of products that are kept, as many as have room
  for (int run = 0; run < 6; ++run) {
    const int64_t most = run < 4 ? 0 : run == 4 ? all - 1 : all;
    p.kept_count = kernels.pairs.kept(p, most);
    std::vector<float> room(p.kept_count, NAN);
    p.kept = room.empty() ? nullptr : room.data();
    const int k = run > 0;
    dx[k].assign(n * d, NAN);
    dy[k].assign(m * d, NAN);
    dscale[k] = NAN;
    const bool whole = run == 0 || run > 3;
    const bool with[] = {whole || run == 1, !s.triangle && (whole || run == 2), whole || run == 3};
    const PairBackwardOut out = {with[0] ? dx[k].data() : nullptr, with[1] ? dy[k].data() : nullptr,
                                 with[2] ? &dscale[k] : nullptr, nullptr, nullptr};
    Buffer forward(kernels.pairs.forward_bytes(p, 3));
    kernels.pairs.forward(p, {rows.data(), columns.data()}, forward.data.get(), parallel);
    Buffer backward(kernels.pairs.backward_bytes(p, out, 3));
    const PairBackwardIn in = {g_rows.data(), g_columns.data(), rows.data(), columns.data()};
    kernels.pairs.backward(p, in, out, backward.data.get(), parallel);
    const auto same = [](const std::vector<float>* v) {
      return std::memcmp(v[0].data(), v[1].data(), v[0].size() * sizeof(float)) == 0;
    };
    expect(run == 0 || ((!with[0] || same(dx)) && (!with[1] || same(dy)) &&
                        (!with[2] || dscale[0] == dscale[1])),
           std::string(kernels.capability) + " apart: other bits, run " + std::to_string(run));
  }
}

void check_attention(const Kernels& kernels, const Shape& s, int64_t width) {
  const Case c(s);
  PairProblem p = c.p;
  p.rule[kNegative] = {1, 0, kInfinity};
  const int64_t n = s.n, m = s.m, d = s.d;
  const auto values = random(m * width, 1, 5), g_out = random(n * width, 1, 6);
  const AttentionIn in = {values.data(), width, false};
  std::vector<float> out(n * width, NAN), dx(n * d, NAN), dy(m * d, NAN), dv(m * width, NAN);
  std::vector<double> lse(n, NAN), shift(n);
  double dscale = 0;
  const Parallel parallel = {3, on_threads};
  const PairBackwardOut back = {dx.data(), dy.data(), &dscale, nullptr, nullptr};
  Buffer buffer(std::max(kernels.pairs.attention_bytes(p, in, 3),
                         kernels.pairs.attention_backward_bytes(p, in, back, true, 3)));
  kernels.pairs.attention(p, in, {out.data(), lse.data()}, buffer.data.get(), parallel);
  for (int64_t k = 0; k < n * width; ++k) shift[k / width] += double(g_out[k]) * out[k];
  kernels.pairs.attention_backward(p, in, {g_out.data(), shift.data(), lse.data()}, back, dv.data(),
                                   buffer.data.get(), parallel);

  std::vector<double> want(n * width), size(n * width), want_dx(n * d), dx_size(n * d),
      want_dy(m * d), dy_size(m * d);
  double want_dscale = 0, dscale_size = 0;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> weight(m), slope(m);
    double sum = 0, mean = 0;
    for (int64_t j = 0; j < m; ++j) {
      double z, ignored;
      const PairClass k = c.term(i, j, &z, &ignored);
      const double u = c.score(i, j);
      z = p.score == Score::kRoot ? -std::sqrt(-u) : u;
      slope[j] = p.score != Score::kRoot ? 1 : u < 0 ? -0.5 / z : 0;
      weight[j] = k == kNegative ? std::exp(z) : 0;
      sum += weight[j];
    }
    const auto along = [&](int64_t j) {
      double t = 0;
      for (int64_t e = 0; e < width; ++e) t += double(g_out[i * width + e]) * values[j * width + e];
      return t;
    };
    double most = 0;
    for (int64_t j = 0; j < m; ++j) {
      weight[j] = sum > 0 ? weight[j] / sum : 0;
      mean += weight[j] * along(j);
      most = std::max(most, std::abs(along(j)));
      for (int64_t e = 0; e < width; ++e) {
        want[i * width + e] += weight[j] * values[j * width + e];
        size[i * width + e] += 8 * weight[j] * std::abs(values[j * width + e]);
      }
    }
    for (int64_t j = 0; j < m; ++j) {
      const double g = weight[j] * (along(j) - mean) * slope[j];
      const double g_size = 8 * weight[j] * most * slope[j];
      const double square = c.squared(i, j), length = std::sqrt(square);
      want_dscale -= g * square / 2;
      dscale_size += g_size * square / 2;
      for (int64_t e = 0; e < d; ++e) {
        const double by = double(c.y[j * d + e]) - c.x[i * d + e];
        want_dx[i * d + e] += p.scale * g * by;
        want_dy[j * d + e] -= p.scale * g * by;
        dx_size[i * d + e] += p.scale * g_size * length;
        dy_size[j * d + e] += p.scale * g_size * length;
      }
    }
  }
  const std::string at = std::string(kernels.capability) + " apart attention " +
                         (s.score == Score::kRoot ? "root " : "") +
                         std::to_string(int(s.precision));
  const double u = s.precision == Precision::kFull ? 6e-8 : 4e-3;
  const double bound = (d + 8.0) * u * (s.precision == Precision::kFull ? 16 : 4);
  expect(largest(out, want, size) < bound, at + ": out");
  expect(largest(dx, want_dx, dx_size) < bound, at + ": dx");
  expect(largest(dy, want_dy, dy_size) < bound, at + ": dy");
  expect(std::abs(dscale - want_dscale) < bound * dscale_size, at + ": dscale");
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
  for (const Precision q : precisions) {
    for (const Score score : {Score::kLinear, Score::kRoot}) {
      check(kernels, {1, 1, 1, false, score, q});
      check(kernels, {37, 53, 24, false, score, q});
      check(kernels, {203, 1301, 33, false, score, q});
      check(kernels, {400, 400, 65, true, score, q});
      check_bits(kernels, {70, 300, 24, false, score, q});
      check_bits(kernels, {300, 300, 24, true, score, q});
      check(kernels, {1203, 1203, 7, true, score, q});
      check_attention(kernels, {61, 300, 40, false, score, q}, 33);
    }
  }
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
