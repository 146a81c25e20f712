// The matrix of distances of one instruction set against plain loops in long double: every kind in
// float and double, awkward shapes, equal rows, near rows far from the origin, zeros, NaN.
//
// usage: distances_test [default|avx2|avx512|avx512_bf16]; exit code 77 where it cannot run.
#include <cstdlib>
#include <cstring>
#include <limits>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

using Real = long double;

struct Case {
  const char* name;
  Distance kind;
  double p = 2;
  bool weighted = false;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();
const Case kCases[] = {
    {"dot", Distance::kDot},
    {"sqeuclidean", Distance::kSquared},
    {"euclidean", Distance::kEuclidean},
    {"cityblock", Distance::kCityblock},
    {"minkowski 0.7", Distance::kMinkowski, 0.7},
    {"minkowski 1", Distance::kMinkowski, 1},
    {"minkowski 2", Distance::kMinkowski, 2},
    {"minkowski 2.5", Distance::kMinkowski, 2.5},
    {"minkowski 3", Distance::kMinkowski, 3},
    {"minkowski 4", Distance::kMinkowski, 4},
    {"minkowski 40", Distance::kMinkowski, 40},
    {"minkowski inf", Distance::kMinkowski, kInfinity},
    {"chebyshev", Distance::kChebyshev},
    {"canberra", Distance::kCanberra},
    {"canberra weighted", Distance::kCanberra, 2, true},
    {"braycurtis", Distance::kBraycurtis},
    {"jensenshannon", Distance::kJensenShannon},
    {"kl", Distance::kKl},
    {"hamming", Distance::kHamming},
    {"hamming weighted", Distance::kHamming, 2, true},
    {"jaccard", Distance::kJaccard},
    {"jaccard weighted", Distance::kJaccard, 2, true},
    {"scaled", Distance::kScaled, 2, true},
};

bool has_gradient(const Case& c) {
  return c.kind != Distance::kHamming && c.kind != Distance::kJaccard;
}

bool is_products(const Case& c) {
  return c.kind == Distance::kDot || c.kind == Distance::kSquared ||
         c.kind == Distance::kEuclidean || (c.kind == Distance::kMinkowski && c.p == 2);
}

std::string text(Real error) {
  char out[32];
  std::snprintf(out, sizeof out, "%.2Lg", error);
  return out;
}

Real sign(Real v) { return (v > 0) - (v < 0); }

// One pair by the formula. `scale` is what the rounding of the sums is relative to.
struct Pair {
  Real distance, scale;
};

template <class T>
Pair distance(const Case& c, const T* x, const T* y, const T* w, int64_t d) {
  Real a = 0, b = 0, size = 0;
  for (int64_t k = 0; k < d; ++k) {
    const Real u = x[k], v = y[k], apart = std::abs(u - v), both = std::abs(u) + std::abs(v);
    const Real weight = c.weighted ? Real(w[k]) : 1;
    switch (c.kind) {
      case Distance::kDot:
        a += u * v, size += std::abs(u * v);
        break;
      case Distance::kSquared:
      case Distance::kEuclidean:
      case Distance::kScaled:
        a += apart * apart * weight;
        break;
      case Distance::kMinkowski:
        if (c.p == kInfinity) {
          a = std::max(a, apart);
        } else {
          a += std::pow(apart, Real(c.p));
        }
        break;
      case Distance::kChebyshev:
        a = std::max(a, apart);
        break;
      case Distance::kCanberra:
        a += both > 0 ? weight * apart / both : 0;
        break;
      case Distance::kBraycurtis:
        a += apart, b += std::abs(u + v);
        break;
      case Distance::kJensenShannon: {
        const Real m = (u + v) / 2;
        a += (u > 0 ? u * std::log(u / m) : 0) + (v > 0 ? v * std::log(v / m) : 0);
        break;
      }
      case Distance::kKl: {
        const Real term = u > 0 ? (v > 0 ? u * std::log(u / v) : Real(kInfinity)) : 0;
        a += term, size += std::abs(term) + u;
        break;
      }
      case Distance::kHamming:
        a += weight * (u != v), b += weight;
        break;
      case Distance::kJaccard:
        a += weight * (u != v), b += weight * (u != 0 || v != 0);
        break;
      default:
        a += apart;
    }
  }
  switch (c.kind) {
    case Distance::kDot:
    case Distance::kKl:
      return {a, size};
    case Distance::kEuclidean:
    case Distance::kScaled:
      return {std::sqrt(a), std::sqrt(a)};
    case Distance::kJensenShannon:
      a = std::sqrt(std::max<Real>(a, 0) / 2);
      return {a, a};
    case Distance::kMinkowski:
      if (c.p != kInfinity) a = std::pow(a, 1 / Real(c.p));
      return {a, a};
    case Distance::kBraycurtis:
    case Distance::kHamming:
    case Distance::kJaccard:
      a = a == 0 ? 0 : a / b;
      return {a, a};
    default:
      return {a, a};
  }
}

// Adds g times the gradient of one pair's distance `value`.
template <class T>
void add_gradient(const Case& c, const T* x, const T* y, const T* w, int64_t d, Real value, Real g,
                  double* dx, double* dy, double* dw) {
  Real sizes = 0, best = -1;
  int64_t at = 0;
  for (int64_t k = 0; k < d; ++k) {
    const Real u = x[k], v = y[k];
    sizes += std::abs(u + v);
    // the largest as the kernels round it, so that both choose the same coordinate
    const Real apart = std::abs(x[k] - y[k]);
    if (apart > best) best = apart, at = k;
  }
  const bool largest =
      c.kind == Distance::kChebyshev || (c.kind == Distance::kMinkowski && c.p == kInfinity);
  for (int64_t k = 0; k < d; ++k) {
    const Real u = x[k], v = y[k], apart = u - v, both = std::abs(u) + std::abs(v);
    const Real weight = c.weighted ? Real(w[k]) : 1;
    Real of_x = 0, of_y = 0;
    if (largest) {
      of_x = k == at ? sign(apart) : 0, of_y = -of_x;
    } else if (c.kind == Distance::kDot) {
      of_x = v, of_y = u;
    } else if (c.kind == Distance::kSquared) {
      of_x = 2 * apart, of_y = -of_x;
    } else if (c.kind == Distance::kEuclidean || c.kind == Distance::kScaled) {
      of_x = value == 0 ? 0 : apart * weight / value, of_y = -of_x;
      if (c.kind == Distance::kScaled && value != 0) dw[k] += g * apart * apart / (2 * value);
    } else if (c.kind == Distance::kCityblock) {
      of_x = sign(apart), of_y = -of_x;
    } else if (c.kind == Distance::kMinkowski) {
      if (value != 0 && apart != 0) {
        of_x = sign(apart) * std::pow(std::abs(apart) / value, Real(c.p) - 1);
      }
      of_y = -of_x;
    } else if (c.kind == Distance::kCanberra && both > 0) {
      const Real square = both * both;
      of_x = weight * (sign(apart) * both - std::abs(apart) * sign(u)) / square;
      of_y = weight * (-sign(apart) * both - std::abs(apart) * sign(v)) / square;
      if (c.weighted) dw[k] += g * std::abs(apart) / both;
    } else if (c.kind == Distance::kBraycurtis && sizes > 0) {
      of_x = (sign(apart) - value * sign(u + v)) / sizes;
      of_y = (-sign(apart) - value * sign(u + v)) / sizes;
    } else if (c.kind == Distance::kJensenShannon && value != 0) {
      of_x = u > 0 ? std::log(2 * u / (u + v)) / (4 * value) : 0;
      of_y = v > 0 ? std::log(2 * v / (u + v)) / (4 * value) : 0;
    } else if (c.kind == Distance::kKl && u > 0) {
      of_x = std::log(u / v) + 1, of_y = -u / v;
    }
    dx[k] += g * of_x;
    dy[k] += g * of_y;
  }
}

enum class Data { kPlain, kFar, kSparse };

// Rows for a case: with equal rows on both sides, zero rows, and clusters far from the origin.
template <class T>
std::vector<T> rows(const Case& c, Data data, int64_t n, int64_t d, unsigned seed) {
  const auto noise = random(n * d, 1, seed), centers = random(4 * d, 50, 99);
  const bool shares = c.kind == Distance::kJensenShannon || c.kind == Distance::kKl;
  const bool discrete = !has_gradient(c) || data == Data::kSparse;
  std::vector<T> out(n * d);
  for (int64_t i = 0; i < n; ++i) {
    Real total = 0;
    for (int64_t k = 0; k < d; ++k) {
      T& v = out[i * d + k];
      v = static_cast<T>(noise[i * d + k]) * static_cast<T>(1.1);
      if (data == Data::kFar) v = centers[i % 4 * d + k] + v * static_cast<T>(0.01);
      if (discrete) v = std::round(v);
      if (shares) {
        v = std::abs(v);
        // without zeros in y kl has no infinities, which have a check of their own
        if (c.kind == Distance::kKl && seed % 2 == 0) v += static_cast<T>(0.01);
        total += v;
      }
    }
    for (int64_t k = 0; k < d && total > 0; ++k) out[i * d + k] /= static_cast<T>(total);
    // row 1 of either side is the same
    if (i == 1) {
      for (int64_t k = 0; k < d; ++k) out[d + k] = static_cast<T>(shares ? T(1) / d : T(k % 3));
    }
    if (i == 3 && !shares) std::fill(out.begin() + i * d, out.begin() + (i + 1) * d, T(0));
  }
  return out;
}

// Memory of exactly so many bytes, full of NaN, with a guard behind it.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    data_ = static_cast<unsigned char*>(std::aligned_alloc(64, (bytes + 64 + 63) / 64 * 64));
    std::memset(data_, 0xff, bytes + 64);
  }
  ~Guarded() {
    for (int i = 0; i < 64; ++i) {
      if (data_[bytes_ + i] != 0xff) {
        expect(false, "a write past the end of " + std::to_string(bytes_) + " bytes");
        break;
      }
    }
    std::free(data_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }
  bool same(const Guarded& other) const { return !std::memcmp(data_, other.data_, bytes_); }
  template <class T>
  std::vector<T> values() const {
    return std::vector<T>(as<T>(), as<T>() + bytes_ / sizeof(T));
  }

 private:
  size_t bytes_;
  unsigned char* data_;
};

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
