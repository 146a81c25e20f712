// What distances_test.cpp compares with: each kind by its formula in long double, and its rows.
#pragma once

#include <cstdlib>
#include <cstring>
#include <limits>

#include "check.h"
#include "kernels.h"

namespace {

using namespace fused_losses;

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

}  // namespace
