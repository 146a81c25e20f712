// The matrix of distances of one instruction set against plain loops in long double: every kind in
// float and double, awkward shapes, equal rows, near rows far from the origin, zeros, NaN.
//
// usage: distances_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <limits>

#include "distances_reference.h"

namespace {

template <class T>
void check(const Kernels& kernels, const Case& c, Data data, int64_t n, int64_t m, int64_t d,
           Precision precision = Precision::kFull) {
  const bool is_double = sizeof(T) == 8, scaled = c.kind == Distance::kScaled;
  const auto x = rows<T>(c, data, n, d, 3), y = rows<T>(c, data, m, d, 4);
  std::vector<T> w;
  for (float v : random(scaled ? m * d : d, 1, 5)) w.push_back(static_cast<T>(std::abs(v)));
  const DistanceProblem p = {
      x.data(), y.data(), c.weighted ? w.data() : nullptr, n, m, d, c.kind, c.p, is_double,
      false,    precision};
  const std::string name = std::string(kernels.capability) + " " + c.name +
                           (is_double ? " double " : " float ") + std::to_string(n) + " x " +
                           std::to_string(m) + " d=" + std::to_string(d) + " data " +
                           std::to_string(static_cast<int>(data)) + " precision " +
                           std::to_string(static_cast<int>(precision));
  const bool exact = precision == Precision::kFull || !is_products(c) || is_double;
  const DistanceKernels& k = kernels.distances;
  const auto run = [&](int threads, Guarded& out) {
    const Guarded buffer(k.forward_bytes(p, threads));
    k.forward(p, out.as<void>(), buffer.as<void>(), {threads, on_threads});
  };
  const size_t bytes = n * m * sizeof(T);
  Guarded out(bytes), two(bytes), three(bytes);
  run(1, out), run(2, two), run(3, three);
  expect(out.same(two) && out.same(three), name + ": not the same bits on any number of threads");

  // forward, pair by pair
  const auto row_w = [&](int64_t j) { return w.data() + (scaled ? j * d : 0); };
  std::vector<Real> value(n * m);
  Real error = 0;
  bool zeros = true;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const Pair pair = distance(c, x.data() + i * d, y.data() + j * d, row_w(j), d);
      const Real got = out.as<T>()[i * m + j];
      value[i * m + j] = pair.distance;
      const Real of = std::abs(got - pair.distance) / (pair.scale + 1e-30L);
      if (!(of <= error)) error = of;
      const bool equal = std::equal(&x[i * d], &x[i * d] + d, &y[j * d]);
      if (equal && c.kind != Distance::kDot && got != 0) zeros = false;
    }
  }
  const Real forward_limit = !exact ? 0.1L : is_double ? 2e-14L : 6e-6L;
  expect(error <= forward_limit, name + ": distances " + text(error));
  expect(zeros, name + ": equal rows are apart");
  if (!has_gradient(c)) return;

  // backward, for a dense gradient and for one with a stride
  const auto seeds = random(n * m, 1, 6);
  for (const bool repeated : {false, true}) {
    if (repeated && n != 64) continue;
    std::vector<T> grad;
    for (int64_t e = 0; e < n * m; ++e) {
      // with `repeated` the gradient of row i is one number
      if (!repeated || e % m == 0) grad.push_back(static_cast<T>(seeds[e]));
    }
    const DistanceBackwardIn in = {grad.data(), repeated ? 1 : m, repeated ? 0 : 1, out.as<void>()};
    const bool weights = scaled || (c.weighted && c.kind == Distance::kCanberra);
    const size_t sizes[] = {n * d * sizeof(T), m * d * sizeof(T),
                            weights ? w.size() * sizeof(T) : 0};
    const auto back = [&](int threads, const Guarded& dx, const Guarded& dy, const Guarded& dw) {
      const DistanceBackwardOut to = {dx.as<void>(), dy.as<void>(),
                                      weights ? dw.as<void>() : nullptr};
      const Guarded buffer(k.backward_bytes(p, to, threads));
      k.backward(p, in, to, buffer.as<void>(), {threads, on_threads});
    };
    const Guarded dx(sizes[0]), dy(sizes[1]), dw(sizes[2]);
    back(1, dx, dy, dw);
    for (int threads : {2, 3}) {
      const Guarded other_dx(sizes[0]), other_dy(sizes[1]), other_dw(sizes[2]);
      back(threads, other_dx, other_dy, other_dw);
      expect(dx.same(other_dx) && dy.same(other_dy) && dw.same(other_dw),
             name + ": not the same bits of the gradient on any number of threads");
    }
    const Guarded only(sizes[1]);
    const DistanceBackwardOut to = {nullptr, only.as<void>(), nullptr};
    const Guarded buffer(k.backward_bytes(p, to, 1));
    k.backward(p, in, to, buffer.as<void>(), {1, on_threads});
    expect(dy.same(only), name + ": dy alone differs");

    std::vector<double> want_dx(n * d), want_dy(m * d), want_dw(sizes[2] / sizeof(T));
    std::vector<double> unused(d);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        add_gradient(c, &x[i * d], &y[j * d], row_w(j), d, value[i * m + j],
                     grad[repeated ? i : i * m + j], &want_dx[i * d], &want_dy[j * d],
                     !weights ? unused.data() : want_dw.data() + (scaled ? j * d : 0));
      }
    }
    const double limit = !exact || precision != Precision::kFull ? 0.05 : is_double ? 1e-12 : 1e-5;
    for (const auto& [what, got, want] :
         {std::tuple{"dx", dx.values<T>(), want_dx}, std::tuple{"dy", dy.values<T>(), want_dy},
          std::tuple{"dw", dw.values<T>(), want_dw}}) {
      const double apart = worst(got, want);
      expect(apart <= limit, name + ": " + what + " " + text(apart));
    }
  }
}

// Rows with a NaN have NaN distances, the others have none; kl of what only y lacks is infinite.
template <class T>
void check_special(const Kernels& kernels, const Case& c) {
  const int64_t n = 7, m = 70, d = 19;
  auto x = rows<T>(c, Data::kPlain, n, d, 3), y = rows<T>(c, Data::kPlain, m, d, 4);
  const T nan = std::numeric_limits<T>::quiet_NaN();
  x[2 * d + 5] = nan;
  y[66 * d + 18] = nan;
  std::vector<T> w(m * d, T(1));
  const bool kl = c.kind == Distance::kKl;
  if (kl) x[4 * d] = T(0.5), y[9 * d] = 0;
  const DistanceProblem p = {x.data(),
                             y.data(),
                             c.weighted ? w.data() : nullptr,
                             n,
                             m,
                             d,
                             c.kind,
                             c.p,
                             sizeof(T) == 8,
                             false,
                             Precision::kFull};
  const Guarded out(n * m * sizeof(T)), buffer(kernels.distances.forward_bytes(p, 2));
  kernels.distances.forward(p, out.as<void>(), buffer.as<void>(), {2, on_threads});
  bool fine = true;
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < m; ++j) {
      const T v = out.as<T>()[i * m + j];
      if ((v != v) != (i == 2 || j == 66)) fine = false;
      if (kl && i == 4 && j == 9 && v != std::numeric_limits<T>::infinity()) fine = false;
    }
  }
  expect(fine, std::string(kernels.capability) + " " + c.name + ": NaN");
}

void check_bits(const Kernels& kernels, int64_t n, int64_t m, int64_t d) {
  std::mt19937 engine(8);
  std::vector<uint8_t> x(n * d), y(m * d);
  for (auto& v : x) v = engine() % 3 == 0;
  for (auto& v : y) v = engine() % 3 == 0;
  if (n > 2) std::fill(x.begin() + 2 * d, x.begin() + 3 * d, 0);
  if (m > 1) std::fill(y.begin() + d, y.begin() + 2 * d, 0);
  std::vector<double> wide_x(x.begin(), x.end()), wide_y(y.begin(), y.end());
  for (const Case& c : {Case{"hamming", Distance::kHamming}, Case{"jaccard", Distance::kJaccard}}) {
    const DistanceProblem p = {x.data(), y.data(), nullptr,         n, m, d, c.kind, 2,
                               false,    true,     Precision::kFull};
    const Guarded out(n * m * sizeof(float)), buffer(kernels.distances.forward_bytes(p, 3));
    kernels.distances.forward(p, out.as<void>(), buffer.as<void>(), {3, on_threads});
    bool fine = true;
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < m; ++j) {
        const double* none = nullptr;
        const Real want = distance(c, &wide_x[i * d], &wide_y[j * d], none, d).distance;
        if (std::abs(out.as<float>()[i * m + j] - want) > 1e-7L) fine = false;
      }
    }
    expect(fine,
           std::string(kernels.capability) + " " + c.name + " of bits d=" + std::to_string(d));
  }
}

template <class T>
void check_all(const Kernels& kernels, const Case& c) {
  check<T>(kernels, c, Data::kPlain, 1, 1, 1);
  check<T>(kernels, c, Data::kPlain, 5, 63, 3);
  check<T>(kernels, c, Data::kPlain, 64, 65, 16);
  check<T>(kernels, c, Data::kSparse, 65, 64, 17);
  check<T>(kernels, c, Data::kPlain, 30, 200, 130);
  check<T>(kernels, c, Data::kPlain, 200, 5, 64);
  check<T>(kernels, c, Data::kPlain, 3, 66, 1000);
  if (c.kind != Distance::kKl && c.kind != Distance::kJensenShannon) {
    check<T>(kernels, c, Data::kFar, 40, 70, 33);
  }
  check_special<T>(kernels, c);
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  for (const Case& c : kCases) {
    check_all<float>(kernels, c);
    check_all<double>(kernels, c);
  }
  // more than a block of rows and of columns, and rows longer than a slice
  check<float>(kernels, kCases[2], Data::kPlain, 2200, 1030, 3);
  for (const Case& c : kCases) {
    const bool is_long = c.kind == Distance::kEuclidean || c.kind == Distance::kBraycurtis ||
                         c.kind == Distance::kCityblock || c.kind == Distance::kChebyshev;
    if (is_long) check<float>(kernels, c, Data::kPlain, 2, 3, 65536);
  }
  for (const Precision precision : {Precision::kMixed, Precision::kBFloat16}) {
    if (!kernels.bf16) continue;
    for (int c = 0; c < 3; ++c) {
      check<float>(kernels, kCases[c], Data::kPlain, 63, 200, 130, precision);
      check<float>(kernels, kCases[c], Data::kFar, 41, 67, 33, precision);
    }
  }
  check_bits(kernels, 1, 1, 1);
  check_bits(kernels, 5, 600, 64);
  check_bits(kernels, 40, 63, 131);
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
