// Scores of the top-k: the screen's, with a bound on their rounding, and exact ones in double.
#pragma once

#include "../sums.h"
#include "plan.h"

namespace fused_losses::FL_ISA {

inline float sum_of_squares(const float* x, int64_t d) {
  constexpr int64_t kStep = kLanes<float>;
  Floats sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * kStep <= d; e += 4 * kStep) {
    for (int u = 0; u < 4; ++u) {
      const Floats v = load(x + e + u * kStep);
      sums[u] += v * v;
    }
  }
  float rest = 0;
  for (; e < d; ++e) rest += x[e] * x[e];
  return sum<float>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// What a bank's row adds to a product to make it a score, s = m <x, row> + a, and by how much s may
// be wrong: |x| slope + extra.
struct RowTerms {
  float m, a, slope, extra;
};

// Of a row that float cannot judge: its score is inf or NaN, and every query scores it exactly.
constexpr RowTerms kUnscreened = {0, std::numeric_limits<float>::infinity(), 0, 0};

// The screen's rows: which matrix, moved by what, and their terms.
class Screened {
 public:
  Screened(const TopkProblem& p, const double* center, bool bf16)
      : p_(p),
        center_(center),
        rows_(p.codes.rows.data ? p.codes.rows : p.y),
        bound_(p.d, p.affinity == Affinity::kCosine, bf16) {
    scale_ = p.codes.rows.data ? p.codes.scale : p.y_scale;
  }

  bool in_place() const { return rows_.type == Type::kFloat32 && !center_; }
  const float* place(int64_t j) const {
    return static_cast<const float*>(rows_.data) + j * rows_.stride;
  }
  void read(int64_t j, float* out) const { read(rows_, j, out); }
  // Moved before it is rounded to float.
  void read(const Matrix& rows, int64_t j, float* out) const {
    if (rows.type == Type::kFloat64 && center_) {
      const double* from = static_cast<const double*>(rows.data) + j * rows.stride;
      for (int64_t e = 0; e < p_.d; ++e) out[e] = static_cast<float>(from[e] - center_[e]);
      return;
    }
    read_row(rows, j, p_.d, out);
    for (int64_t e = 0; center_ && e < p_.d; ++e) out[e] = static_cast<float>(out[e] - center_[e]);
  }

  RowTerms terms(int64_t j, const float* row) const {
    const double scale = scale_ ? scale_[j] : 1, d = p_.d;
    const double error = p_.codes.rows.data ? p_.codes.error[j] : 0;
    const double squared = sum_of_squares(row, p_.d) * scale * scale, norm = std::sqrt(squared);
    // squares below the normal numbers may have vanished
    const double most = std::sqrt(squared * (1 + (d + 8) * ScreenBound::kUnit) +
                                  2 * d * ScreenBound::kTiny * std::max(scale * scale, 1.0));
    if (!(most + error < ScreenBound::kLimit)) return kUnscreened;
    double m = scale, a = 0, slope = bound_.product * most + error, extra = 0;
    if (p_.affinity == Affinity::kSquaredDistance) {
      a = p_.largest ? 0.5 * squared : -0.5 * squared;
      extra = bound_.offset * 0.5 * most * most + error * (most + error);
    } else if (p_.affinity == Affinity::kCosine) {
      if (!(norm >= kNarrowNorm)) return is_zero(row, error) ? RowTerms{} : kUnscreened;
      m = scale / norm;
      slope = bound_.product + 2 * error / norm * (1 + d * ScreenBound::kUnit);
    }
    // what underflows: factors, products, sums and the score
    const double wide = std::max(std::abs(m), 1.0);
    slope += wide * std::sqrt(d) * ScreenBound::kTiny;
    extra += (wide * 2 * d + std::sqrt(d) * std::max(most, 1.0) + 4) * ScreenBound::kTiny;
    return {static_cast<float>(m), static_cast<float>(a), up(slope), up(extra)};
  }

  double judge() const { return bound_.judge; }

 private:
  static float up(double v) { return static_cast<float>(v * (1 + 1e-6)); }

  bool is_zero(const float* row, double error) const {
    return error == 0 && std::all_of(row, row + p_.d, [](float v) { return v == 0; });
  }

  const TopkProblem& p_;
  const double* center_;
  Matrix rows_;
  const float* scale_;
  ScreenBound bound_;
};

// <x, y> / (|x| |y|), exactly 1 for equal rows and the same for rows of integers in one direction.
inline double cosine_of(double product, double x_square, double y_square) {
  const double square = x_square * y_square;
  if (std::sqrt(x_square) <= kZeroNorm || std::sqrt(y_square) <= kZeroNorm) return 0 * product;
  const double cosine = square < 1e300
                            ? std::sqrt(product * product / square)
                            : std::abs(product) / std::sqrt(x_square) / std::sqrt(y_square);
  // a NaN stays
  return std::copysign(cosine > 1 ? 1.0 : cosine, product);
}

// Exact scores, larger is better.
class Scorer {
 public:
  Scorer(const TopkProblem& p, double* buffer) : p_(p), buffer_(buffer) {}

  // square: |x_i|^2, with cosines
  double operator()(int64_t i, int64_t j, double square) const {
    if (p_.x.type == Type::kFloat64) return against(row<double>(p_.x, i), j, square);
    return against(row<float>(p_.x, i), j, square);
  }

  void prefetch(int64_t j) const {
    constexpr int64_t kLines = 32;  // hardware goes on by itself
    const int64_t size = p_.y.type == Type::kFloat64 ? 8 : p_.y.type == Type::kFloat32 ? 4 : 2;
    const char* at = static_cast<const char*>(p_.y.data) + j * p_.y.stride * size;
    for (int64_t l = 0; l < std::min(kLines, ceil_div(p_.d * size, 64)); ++l) {
      __builtin_prefetch(at + l * 64);
    }
  }

 private:
  template <class T>
  static const T* row(const Matrix& m, int64_t i) {
    return static_cast<const T*>(m.data) + i * m.stride;
  }

  template <class X>
  double against(const X* x, int64_t j, double square) const {
    if (p_.y.type == Type::kFloat32) return score(x, row<float>(p_.y, j), square);
    if (p_.y.type == Type::kFloat64) return score(x, row<double>(p_.y, j), square);
    read_row(p_.y, j, p_.d, buffer_);
    for (int64_t e = 0; p_.y_scale && e < p_.d; ++e) buffer_[e] *= p_.y_scale[j];
    return score(x, static_cast<const double*>(buffer_), square);
  }

  template <class X, class Y>
  double score(const X* x, const Y* y, double square) const {
    double s;
    if (p_.affinity == Affinity::kSquaredDistance) {
      s = -sum_of<SquaredDifference>(x, y, p_.d);
    } else {
      s = sum_of<Product>(x, y, p_.d);
      if (p_.affinity == Affinity::kCosine) s = cosine_of(s, square, sum_of<Product>(y, y, p_.d));
    }
    return p_.largest == (p_.affinity == Affinity::kSquaredDistance) ? -s : s;
  }

  const TopkProblem& p_;
  double* buffer_;
};

// The bank's mean, by a sample, where moving by it makes rows much shorter; else null.
inline const double* choose_center(const TopkProblem& p, double* out, double* row) {
  std::fill(out, out + p.d, 0.0);
  if (p.affinity != Affinity::kSquaredDistance || p.y_scale || p.codes.rows.data || p.heads.first) {
    return nullptr;
  }
  constexpr int64_t kSample = 256;
  const int64_t step = std::max<int64_t>(1, p.m / kSample);
  double squares = 0, moved = 0;
  int64_t count = 0;
  for (int64_t j = 0; j < p.m; j += step) {
    read_row(p.y, j, p.d, row);
    const double square = sum_of<Product>(row, row, p.d);
    if (!std::isfinite(square)) continue;
    for (int64_t e = 0; e < p.d; ++e) out[e] += row[e];
    squares += square;
    ++count;
  }
  for (int64_t e = 0; e < p.d; ++e) {
    out[e] /= std::max<int64_t>(count, 1);
    moved += out[e] * out[e];
  }
  if (moved * count > 0.25 * squares) return out;
  std::fill(out, out + p.d, 0.0);
  return nullptr;
}

}  // namespace fused_losses::FL_ISA
