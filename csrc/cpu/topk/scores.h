// Scores of the top-k: the screen's, with a bound on their rounding, and exact ones in double.
#pragma once

#include "plan.h"

namespace fused_losses::FL_ISA {

typedef float HalfFloats __attribute__((vector_size(FL_VECTOR_BYTES / 2)));

inline Vector<double> wide(const double* p) { return load(p); }
inline Vector<double> wide(const float* p) {
  HalfFloats v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vector<double>);
}

// sum f(a_e, b_e) in double, in an order that the operands do not change.
template <class A, class B, class F>
inline double sum_of(const A* a, const B* b, int64_t d, F&& f) {
  constexpr int64_t kStep = kLanes<double>;
  Vector<double> sums[4] = {};
  int64_t e = 0;
  for (; e + 4 * kStep <= d; e += 4 * kStep) {
    for (int u = 0; u < 4; ++u) sums[u] += f(wide(a + e + u * kStep), wide(b + e + u * kStep));
  }
  double rest = 0;
  for (; e < d; ++e) rest += f(double(a[e]), double(b[e]));
  return sum<double>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

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

// The screen's rows: which matrix, moved by what, and their terms.
class Screened {
 public:
  Screened(const TopkProblem& p, const float* center, bool bf16)
      : p_(p), center_(center), rows_(p.codes.rows.data ? p.codes.rows : p.y) {
    scale_ = p.codes.rows.data ? p.codes.scale : p.y_scale;
    const double unit = 0x1p-24;
    // both factors are rounded to 8 bits: (1 + 2^-8)^2 - 1
    each_ = float((2 * p.d + 16) * unit + (bf16 ? 2.01 * 0x1p-8 : 0));
  }

  bool in_place() const { return rows_.type == Type::kFloat32 && !center_; }
  const float* place(int64_t j) const {
    return static_cast<const float*>(rows_.data) + j * rows_.stride;
  }
  void read(int64_t j, float* out) const {
    read_row(rows_, j, p_.d, out);
    move(out);
  }
  void move(float* row) const {
    for (int64_t e = 0; center_ && e < p_.d; ++e) row[e] -= center_[e];
  }

  RowTerms terms(int64_t j, const float* row) const {
    const float scale = scale_ ? scale_[j] : 1.0f;
    const float error = p_.codes.rows.data ? p_.codes.error[j] : 0.0f;
    const float squared = sum_of_squares(row, p_.d) * scale * scale;
    const float norm = std::sqrt(squared);
    RowTerms t = {scale, 0, each_ * norm + error, 0};
    if (p_.affinity == Affinity::kSquaredDistance) {
      t.a = p_.largest ? 0.5f * squared : -0.5f * squared;
      t.extra = each_ * squared + error * (norm + error);
    } else if (p_.affinity == Affinity::kCosine) {
      const bool alive = !(norm <= float(kZeroNorm));
      t.m = alive ? scale / norm : 0.0f;
      t.slope = each_ + 2 * error * t.m / (scale != 0 ? scale : 1.0f);
      // squares below the normal numbers vanish: is it a row of zeros?
      bool zero = error == 0;
      for (int64_t e = 0; zero && e < p_.d; ++e) zero = row[e] == 0;
      if (!zero && norm < kNarrowNorm) t.slope = std::numeric_limits<float>::infinity();
    }
    return t;
  }

 private:
  const TopkProblem& p_;
  const float* center_;
  Matrix rows_;
  const float* scale_;
  float each_;
};

// Exact scores, larger is better.
class Scorer {
 public:
  Scorer(const TopkProblem& p, double* buffer) : p_(p), buffer_(buffer) {}

  double operator()(int64_t i, int64_t j) const {
    if (p_.x.type == Type::kFloat64) return against(row<double>(p_.x, i), j);
    return against(row<float>(p_.x, i), j);
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
  double against(const X* x, int64_t j) const {
    if (p_.y.type == Type::kFloat32) return score(x, row<float>(p_.y, j));
    if (p_.y.type == Type::kFloat64) return score(x, row<double>(p_.y, j));
    read_row(p_.y, j, p_.d, buffer_);
    for (int64_t e = 0; p_.y_scale && e < p_.d; ++e) buffer_[e] *= p_.y_scale[j];
    return score(x, static_cast<const double*>(buffer_));
  }

  template <class X, class Y>
  double score(const X* x, const Y* y) const {
    const auto product = [](auto a, auto b) { return a * b; };
    const auto difference = [](auto a, auto b) { return (a - b) * (a - b); };
    double s;
    if (p_.affinity == Affinity::kSquaredDistance) {
      s = -sum_of(x, y, p_.d, difference);
    } else {
      s = sum_of(x, y, p_.d, product);
      if (p_.affinity == Affinity::kCosine) {
        const double norm = std::sqrt(sum_of(y, y, p_.d, product));
        s = norm <= kZeroNorm ? 0.0 : s / norm;
      }
    }
    return p_.largest == (p_.affinity == Affinity::kSquaredDistance) ? -s : s;
  }

  const TopkProblem& p_;
  double* buffer_;
};

// The bank's mean, by a sample, where moving by it makes rows much shorter; else null.
inline const float* choose_center(const TopkProblem& p, float* out, float* row) {
  if (p.affinity != Affinity::kSquaredDistance || p.y_scale || p.codes.rows.data || p.m == 0) {
    return nullptr;
  }
  constexpr int64_t kSample = 256;
  const int64_t step = std::max<int64_t>(1, p.m / kSample);
  std::vector<double> mean(p.d);
  double squares = 0;
  int64_t count = 0;
  for (int64_t j = 0; j < p.m; j += step, ++count) {
    read_row(p.y, j, p.d, row);
    for (int64_t e = 0; e < p.d; ++e) {
      mean[e] += row[e];
      squares += double(row[e]) * row[e];
    }
  }
  double moved = 0;
  for (int64_t e = 0; e < p.d; ++e) {
    mean[e] /= count;
    moved += mean[e] * mean[e];
    out[e] = static_cast<float>(mean[e]);
  }
  return moved > 0.25 * squares / count ? out : nullptr;
}

}  // namespace fused_losses::FL_ISA
