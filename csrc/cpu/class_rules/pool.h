// A class's cosine from the products of its centres, and the way back.
#pragma once

#include "loops.h"

namespace fused_losses::FL_ISA {

// The products of one class: `centers` rows, ld apart, each times its inverse.
template <class T>
struct Centers {
  const T* products;
  int64_t ld;
  const T* inverse;
  int64_t centers, rows;
  T sharpness;  // 1 / softness, 0: the best one

  Vector<T> cosine(int64_t k, int64_t i) const { return load(products + k * ld + i) * inverse[k]; }
};

template <class T>
inline T sharpness_of(const ClassProblem& c) {
  return c.softness > 0 ? static_cast<T>(1 / c.softness) : T(0);
}

// cosine[i] of the class; in place of the first centre's products is fine. A NaN of one is one of
// the class. top, total: of a soft pool what its shares are formed by.
template <class T>
inline void pool_centers(const Centers<T>& of, T* cosine, T* top, T* total) {
  for (int64_t i = 0; i < of.rows; i += kLanes<T>) {
    Vector<T> best = of.cosine(0, i);
    for (int64_t k = 1; k < of.centers; ++k) {
      const Vector<T> c = of.cosine(k, i);
      best = (c > best) | (c != c) ? c : best;
    }
    if (of.sharpness > 0 && of.centers > 1) {
      Vector<T> whole = {}, mean = {};
      for (int64_t k = 0; k < of.centers; ++k) {
        const Vector<T> c = of.cosine(k, i), e = exp((c - best) * of.sharpness);
        whole += e;
        mean += e * c;
      }
      if (top) store(top + i, best);
      if (total) store(total + i, whole);
      best = mean / whole;
    }
    store(cosine + i, best);
  }
}

// What of dL/dcosine reaches one centre after the other.
template <class T>
class PoolGradient {
 public:
  // cosine [rows] is of the class
  PoolGradient(const Centers<T>& of, T* cosine) : of_(of), cosine_(cosine) {
    pool_centers(of, cosine, top_, total_);
    if (of.centers > 1) std::fill_n(free_, of.rows, T(1));
  }

  // g_out[i] = dL/dproduct of centre k, in order of k; returns sum_i of it times the cosine.
  T centre(int64_t k, const T* g, T* g_out) {
    Vector<T> along = {};
    const T inverse = of_.inverse[k];
    for (int64_t i = 0; i < of_.rows; i += kLanes<T>) {
      const Vector<T> c = of_.cosine(k, i), pooled = load(cosine_ + i);
      Vector<T> share = load(g + i);
      if (of_.centers > 1)
        share = of_.sharpness > 0 ? soft(i, c, pooled, share) : best(i, c, share);
      along += share * c;
      store(g_out + i, share * inverse);
    }
    return sum<T>(along);
  }

 private:
  Vector<T> soft(int64_t i, Vector<T> c, Vector<T> pooled, Vector<T> g) const {
    const Vector<T> share = exp((c - load(top_ + i)) * of_.sharpness) / load(total_ + i);
    return g * share * (T(1) + (c - pooled) * of_.sharpness);
  }
  // the first of equal ones
  Vector<T> best(int64_t i, Vector<T> c, Vector<T> g) {
    const Vector<T> pooled = load(cosine_ + i), free = load(free_ + i), zero = {};
    const auto hit = ((c == pooled) | ((c != c) & (pooled != pooled))) & (free > zero);
    store(free_ + i, hit ? zero : free);
    return hit ? g : zero;
  }

  static constexpr int64_t kMost = kBlockRows + 64;
  Centers<T> of_;
  T* cosine_;
  alignas(64) T top_[kMost], total_[kMost], free_[kMost];
};

}  // namespace fused_losses::FL_ISA
