// Triplets by counting: few positives are compared with every negative, many are sorted.
#pragma once

#include "../triplets.h"
#include "pairs/tile.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kFewPositives = 24;
constexpr int64_t kTripletRows = 8;  // of a task

// One row: its negatives' scores (inf elsewhere), its positives' and where they stand.
template <class T>
struct TripletRow {
  T *far, *near, *reach;  // reach = near + margin
  double* before;         // sums of the first reaches
  int64_t *count, *at;    // triplets of each positive, its column
  int64_t positives = 0, negatives = 0;
  bool broken = false;  // a NaN among its pairs

  TripletRow(Arena& arena, int64_t columns) {
    far = arena.take<T>(round_up(columns, kLanes<T>));
    near = arena.take<T>(columns);
    reach = arena.take<T>(columns);
    before = arena.take<double>(columns + 1);
    count = arena.take<int64_t>(columns + 1);
    at = arena.take<int64_t>(columns);
  }

  void read(const TripletProblem& p, int64_t row) {
    constexpr T kFar = std::numeric_limits<T>::infinity();
    const T* score = static_cast<const T*>(p.score) + row * p.columns;
    const bool *positive = p.positive + row * p.columns, *negative = p.negative + row * p.columns;
    positives = negatives = 0;
    int64_t nan = 0;
    for (int64_t j = 0; j < p.columns; ++j) {
      far[j] = negative[j] ? score[j] : kFar;
      negatives += negative[j];
      nan += (negative[j] | positive[j]) & (score[j] != score[j]);
    }
    for (int64_t j = p.columns; j < round_up(p.columns, kLanes<T>); ++j) far[j] = kFar;
    for (int64_t j = 0; j < p.columns; ++j) {
      if (positive[j]) at[positives++] = j;
    }
    broken = nan > 0 && positives > 0 && negatives > 0;
    // without negatives there may be a NaN, which has no place in an order
    if (positives > kFewPositives && negatives > 0 && !broken) {
      std::sort(at, at + positives, [&](int64_t a, int64_t b) { return score[a] < score[b]; });
    }
    before[0] = 0;
    for (int64_t k = 0; k < positives; ++k) {
      near[k] = score[at[k]];
      reach[k] = near[k] + static_cast<T>(p.margin);
      // a positive at -inf is in no run that counts
      before[k + 1] = before[k] + (reach[k] == -std::numeric_limits<T>::infinity() ? 0 : reach[k]);
    }
    std::fill(count, count + positives + 1, 0);
  }
};

// Whether the first `count` of increasing values are < v (or <= v): how many are.
template <bool kEqual, class T>
inline int64_t how_many(const T* values, int64_t count, T v) {
  const T* first = values;
  while (count > 1) {
    const int64_t half = count / 2;
    const bool over = kEqual ? first[half - 1] <= v : first[half - 1] < v;
    first = over ? first + half : first;
    count -= half;
  }
  return first - values + (count == 1 && (kEqual ? *first <= v : *first < v));
}

// The sum and the number of a row's triplets; slope [columns] may be null.
template <class T>
inline std::pair<double, int64_t> count_few(const TripletProblem& p, TripletRow<T>& r, T* slope) {
  using Mask = Vector<Code<T>>;
  double total = 0;
  int64_t all = 0;
  for (int64_t k = 0; k < r.positives; ++k) {
    const Vector<T> near = Vector<T>{} + r.near[k], reach = Vector<T>{} + r.reach[k];
    Mask hits = {};
    Vector<T> sums[2] = {};
    int64_t turn = 0;
    for (int64_t j = 0; j < p.columns; j += kLanes<T>, turn ^= 1) {
      const Vector<T> far = load(r.far + j), loss = reach - far;
      Mask in = loss > Vector<T>{};
      if (p.kind == Triplet::kHard) in &= far <= near;
      if (p.kind == Triplet::kSemihard) in &= far > near;
      hits -= in;
      sums[turn] += in ? loss : Vector<T>{};
      if (slope) {
        // in is -1 where a triplet counts
        const Vector<T> old = load(slope + j);
        store(slope + j, in ? old - T(1) : old);
      }
    }
    int64_t count = 0;
    for (int l = 0; l < kLanes<T>; ++l) count += hits[l];
    r.count[k] = count;
    all += count;
    total += sum<T>(sums[0] + sums[1]);
  }
  return {total, all};
}

template <class T>
inline std::pair<double, int64_t> count_many(const TripletProblem& p, TripletRow<T>& r, T* slope) {
  double total = 0;
  int64_t all = 0;
  const int64_t n = r.positives;
  for (int64_t j = 0; j < p.columns; ++j) {
    const T far = r.far[j];
    if (!(far < std::numeric_limits<T>::infinity())) continue;
    // positives in order of score: those that reach beyond `far` come last
    int64_t from = how_many<true>(r.reach, n, far), to = n;
    if (p.kind != Triplet::kAll) {
      const int64_t nearer = how_many<false>(r.near, n, far);
      if (p.kind == Triplet::kHard) {
        from = std::max(from, nearer);
      } else {
        to = std::max(from, nearer);
      }
    }
    const int64_t count = to - from;
    if (count == 0) continue;
    total += r.before[to] - r.before[from] - count * double(far);
    all += count;
    ++r.count[from];
    --r.count[to];
    if (slope) slope[j] -= static_cast<T>(count);
  }
  for (int64_t k = 1; k < n; ++k) r.count[k] += r.count[k - 1];
  return {total, all};
}

template <class T>
size_t triplet_bytes(const TripletProblem& p, int threads) {
  Arena arena(nullptr);
  TripletRow<T>(arena, p.columns);
  arena.take<T>(round_up(p.columns, kLanes<T>));
  return threads * arena.used();
}

// Reads each row and hands it, counted, to f(row, its TripletRow, total, number, slope or null).
template <class T, class F>
void on_triplet_rows(const TripletProblem& p, bool slopes, void* buffer, const Parallel& parallel,
                     F&& f) {
  const size_t each = triplet_bytes<T>(p, 1);
  on_tasks(parallel, ceil_div(p.rows, kTripletRows), [&](int thread, int64_t task) {
    Arena arena(static_cast<char*>(buffer) + thread * each);
    TripletRow<T> r(arena, p.columns);
    const int64_t padded = round_up(p.columns, kLanes<T>);
    T* slope = arena.take<T>(padded);
    for (int64_t i = task * kTripletRows; i < std::min((task + 1) * kTripletRows, p.rows); ++i) {
      r.read(p, i);
      std::fill(slope, slope + padded, T(0));
      std::pair<double, int64_t> found = {0, 0};
      if (!r.broken) {
        T* wanted = slopes ? slope : nullptr;
        found =
            r.positives > kFewPositives ? count_many<T>(p, r, wanted) : count_few<T>(p, r, wanted);
      }
      f(i, r, found.first, found.second, slope);
    }
  });
}

template <class T>
void triplets_forward(const TripletProblem& p, double* statistics, void* buffer,
                      const Parallel& parallel) {
  on_triplet_rows<T>(p, false, buffer, parallel,
                     [&](int64_t i, const TripletRow<T>& r, double total, int64_t count, T*) {
                       statistics[2 * i] = r.broken ? NAN : total;
                       statistics[2 * i + 1] = static_cast<double>(count);
                     });
}

template <class T>
void triplets_backward(const TripletProblem& p, const void* grad_in, void* slope_out, void* buffer,
                       const Parallel& parallel) {
  const T* grad = static_cast<const T*>(grad_in);
  on_triplet_rows<T>(
      p, true, buffer, parallel, [&](int64_t i, const TripletRow<T>& r, double, int64_t, T* slope) {
        T* out = static_cast<T*>(slope_out) + i * p.columns;
        if (r.broken) {
          const bool *positive = p.positive + i * p.columns, *negative = p.negative + i * p.columns;
          for (int64_t j = 0; j < p.columns; ++j) out[j] = positive[j] || negative[j] ? NAN : 0;
          return;
        }
        for (int64_t k = 0; k < r.positives; ++k) slope[r.at[k]] += static_cast<T>(r.count[k]);
        for (int64_t j = 0; j < p.columns; ++j) out[j] = slope[j] * grad[i];
      });
}

}  // namespace fused_losses::FL_ISA
