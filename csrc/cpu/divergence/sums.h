// The sums of a block of a tile pair over its classes, as runs of classes.
#pragma once

#include "runs.h"
#include "tiles.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kMostRows = kBlockRows + 64;  // of a block

// What stands of a tile, [class, row] at `ld`, to which a class's bias is added.
template <class T>
struct Scores {
  const T *at, *bias;
  int64_t ld;
  Vector<T> operator()(int64_t c, int64_t i) const { return load(at + c * ld + i) + bias[c]; }
};

// A class's scores on the side that leads and on the other, and what is between them.
template <class T>
struct Compared {
  Vector<T> lead, other, above;
};

template <class T>
inline Vector<T> zero_if_none(Vector<T> top) {
  const Vector<T> zero = {};
  return top <= kApart<T> * T(0.1) ? zero : top;
}

// What a sum of exponentials is shifted by, and the sum, of each side; the mean gap about which
// `first` and `second` are the sums of w x and of w (exp(-x) - 1 + x), w = exp(leading score -
// top). The mean gap is that of the class that leads, `anchor`, and `offset`.
template <class T>
struct TileSums {
  alignas(64) T top[kMostRows], sum[kMostRows], other_top[kMostRows], other_sum[kMostRows];
  alignas(64) T anchor[kMostRows], offset[kMostRows], first[kMostRows], second[kMostRows];
  alignas(64) T weights[kMostClasses * kLanes<T>];

  // scores(c, i) -> Compared<T>.
  template <class Score>
  void fold(const Score& scores, int64_t count, int64_t rows) {
    using Math = DivergenceMath<T>;
    const Vector<T> zero = {};
    for (int64_t i = 0; i < rows; i += kLanes<T>) {
      Vector<T> at;
      const Vector<T> most = highest(
          count, [&](int64_t c) { return scores(c, i).lead; },
          [&](int64_t c) { return scores(c, i).above; }, &at);
      Vector<T> total = zero, moment = zero, widest = zero;
      for (int64_t c = 0; c < count; ++c) {
        const Compared<T> of = scores(c, i);
        const Vector<T> w = exp(of.lead - most), gap = Math::magnitude(of.above);
        store(weights + c * kLanes<T>, w);
        total += w;
        moment += w * (of.above - at);
        widest = gap > widest ? gap : widest;
      }
      const Vector<T> more = total == zero ? zero : moment / total;
      Vector<T> linear = zero, rest = zero, other_most = most - (at + more);
      for (int64_t c = 0; c < count; ++c) {
        const Compared<T> of = scores(c, i);
        const Vector<T> x = (of.above - at) - more, w = load(weights + c * kLanes<T>);
        const auto near = divergence_rules::is_near<Math>(x, 0.5);
        const Vector<T> close = w * divergence_rules::exp_excess<Math>(near ? -x : zero);
        linear += w * x;
        rest += near ? close : exp(of.other - other_most) - w * (T(1) - x);
      }
      // sum w exp(-x), in which nothing cancels: it is total or more, and exp(t) > t
      Vector<T> other = total - linear + rest;
      // beside much longer scores it would have their digits
      if (!all_below(rest, T(kMostSecond)) || !all_below(widest, T(kFarApart))) {
        const auto of_other = [&](int64_t c) { return scores(c, i).other; };
        other_most = highest(count, of_other);
        other = zero;
        for (int64_t c = 0; c < count; ++c) other += exp(of_other(c) - other_most);
      }
      store(top + i, most);
      store(sum + i, total);
      store(other_top + i, other_most);
      store(other_sum + i, other);
      store(anchor + i, at);
      store(offset + i, more);
      store(first + i, linear);
      store(second + i, rest);
    }
  }

  Run run(int64_t i) const {
    if (sum[i] == 0) return {};
    const double total = sum[i], h = first[i] / total, less = exp_excess(h);
    Run run;
    run.lead = top[i] + std::log(total);
    run.other = other_top[i] + std::log(static_cast<double>(other_sum[i]));
    run.center = {anchor[i], offset[i] + h};
    // about the mean itself; a float's exp stops at exp(80)
    run.excess = std::exp(h) * (second[i] / total) + less - h * (less + h);
    if (second[i] > T(kMostSecond)) run.excess = std::numeric_limits<double>::infinity();
    return run;
  }

  // The highest score, and what belongs to it.
  template <class Score, class Beside>
  static Vector<T> highest(int64_t count, const Score& score, const Beside& beside,
                           Vector<T>* belongs) {
    Vector<T> most = broadcast(-std::numeric_limits<T>::infinity()), at = {};
    for (int64_t c = 0; c < count; ++c) {
      const Vector<T> v = score(c);
      const auto higher = v > most;
      most = higher ? v : most;
      at = higher ? beside(c) : at;
    }
    *belongs = at;
    return zero_if_none<T>(most);
  }

 private:
  static constexpr double kMostSecond = 1e32;

  template <class Score>
  static Vector<T> highest(int64_t count, const Score& score) {
    Vector<T> nothing;
    return highest(count, score, score, &nothing);
  }

  static bool all_below(Vector<T> v, T most) {
    bool all = true;
    for (int l = 0; l < kLanes<T>; ++l) all &= v[l] <= most;
    return all;
  }
};

}  // namespace fused_losses::FL_ISA
