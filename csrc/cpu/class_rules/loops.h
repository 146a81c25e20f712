// The rules (../../rules/classes.h) along a class's row of cosines, chosen once a call.
#pragma once

#include "../../class_rules.h"
#include "../../rules/classes.h"
#include "../distances/math.h"

namespace fused_losses::FL_ISA {

constexpr int kMostStatistics = 2;

// acos to 2 units in the last place, of floats in [-1, 1]; NaN stays.
inline Floats arc_cosine(Floats c) {
  const Floats zero = {}, size = magnitude<float>(c);
  const auto far = size > 0.5f;
  // asin(s) from s^2 <= 1/4: near 1 of the half angle
  const Floats z = far ? (1.0f - size) * 0.5f : size * size;
  const Floats s = far ? square_root<float>(z) : size;
  Floats y = zero + 4.2163199048e-2f;
  y = y * z + 2.4181311049e-2f;
  y = y * z + 4.5470025998e-2f;
  y = y * z + 7.4953002686e-2f;
  y = y * z + 1.6666752422e-1f;
  const Floats asine = (y * z) * s + s;
  const Floats positive = far ? asine + asine : 1.57079632679f - asine;
  return c < zero ? 3.14159265359f - positive : positive;
}

inline Vector<double> arc_cosine(Vector<double> c) {
  for (int i = 0; i < kLanes<double>; ++i) c[i] = std::acos(c[i]);
  return c;
}

template <class T>
struct ClassMath : PairMath<T> {
  FL_RULE static Vector<T> acos(Vector<T> c) { return arc_cosine(c); }
  FL_RULE static Vector<T> power(Vector<T> v, double p) {
    return distance_rules::power<DistanceMath<T>>(v, distance_rules::Exponent<T>(p));
  }
};

// The rows [row0, row0 + rows) of one class: their cosines, and keep: null, or 0 at its labels.
template <class T>
struct CosineRow {
  const T* cosine;
  const T* keep;
  int64_t row0, rows;
};

// What a rule reads besides, each [kMostStatistics or kValues][padded]; unread ones are null.
template <class T>
struct RuleRows {
  T *values, *merged, *grads;
  int64_t padded;
};

// Loops over rows for one rule; `block` separates what they write of two statistics.
template <class T>
struct RuleLoops {
  int statistics;
  const bool* lse;
  // top[s][i] = max(top[s][i], term s), of those with an lse
  void (*peak)(const double* params, const RuleRows<T>&, const CosineRow<T>&, T* top,
               int64_t block);
  // sums[s][i] += exp(term s - top[s][i]), or the term
  void (*add)(const double* params, const RuleRows<T>&, const CosineRow<T>&, const T* top, T* sums,
              int64_t block);
  // g[i] = dL/dcosine, 0 at labels
  void (*slope)(const double* params, const RuleRows<T>&, const CosineRow<T>&, T* g);
};

template <class T, class Rule>
inline void load_values(const RuleRows<T>& r, int64_t row, Vector<T>* v) {
  for (int64_t k = 0; k < Rule::kValues; ++k) v[k] = load(r.values + k * r.padded + row);
}

template <class T, class Rule>
void rule_peak(const double* params, const RuleRows<T>& r, const CosineRow<T>& at, T* top,
               int64_t block) {
  const Rule rule(params);
  for (int64_t i = 0; i < at.rows; i += kLanes<T>) {
    Vector<T> v[4], terms[kMostStatistics];
    load_values<T, Rule>(r, at.row0 + i, v);
    rule.terms(load(at.cosine + i), v, terms);
    for (int s = 0; s < Rule::kStatistics; ++s) {
      if (!Rule::kLse[s]) continue;
      const Vector<T> best = load(top + s * block + i);
      auto higher = terms[s] > best;
      if (at.keep) higher &= load(at.keep + i) > T(0);
      store(top + s * block + i, higher ? terms[s] : best);
    }
  }
}

template <class T, class Rule>
void rule_add(const double* params, const RuleRows<T>& r, const CosineRow<T>& at, const T* top,
              T* sums, int64_t block) {
  const Rule rule(params);
  for (int64_t i = 0; i < at.rows; i += kLanes<T>) {
    Vector<T> v[4], terms[kMostStatistics];
    load_values<T, Rule>(r, at.row0 + i, v);
    rule.terms(load(at.cosine + i), v, terms);
    for (int s = 0; s < Rule::kStatistics; ++s) {
      Vector<T> term = terms[s];
      if (Rule::kLse[s]) term = exp(term - load(top + s * block + i));
      if (at.keep) term = load(at.keep + i) > T(0) ? term : Vector<T>{};
      store(sums + s * block + i, load(sums + s * block + i) + term);
    }
  }
}

template <class T, class Rule>
void rule_slope(const double* params, const RuleRows<T>& r, const CosineRow<T>& at, T* g) {
  const Rule rule(params);
  for (int64_t i = 0; i < at.rows; i += kLanes<T>) {
    const int64_t row = at.row0 + i;
    Vector<T> v[4], terms[kMostStatistics], slopes[kMostStatistics], total = {};
    load_values<T, Rule>(r, row, v);
    const Vector<T> c = load(at.cosine + i);
    rule.slopes(c, v, slopes);
    if (Rule::kLse[0]) rule.terms(c, v, terms);
    for (int s = 0; s < Rule::kStatistics; ++s) {
      Vector<T> part = load(r.grads + s * r.padded + row) * slopes[s];
      if (Rule::kLse[s]) part *= exp(terms[s] - load(r.merged + s * r.padded + row));
      total += part;
    }
    if (at.keep) total = load(at.keep + i) > T(0) ? total : Vector<T>{};
    store(g + i, total);
  }
}

template <class T, class Rule>
inline RuleLoops<T> loops_of_rule() {
  return {Rule::kStatistics, Rule::kLse, rule_peak<T, Rule>, rule_add<T, Rule>,
          rule_slope<T, Rule>};
}

template <class T>
inline RuleLoops<T> loops_of(const ClassProblem& p) {
  using Math = ClassMath<T>;
  namespace rules = class_rules;
  const bool bent = p.values;
  switch (p.rule) {
    case ClassRule::kSFace:
      return loops_of_rule<T, rules::SFace<Math>>();
    case ClassRule::kSphereFace2:
      return loops_of_rule<T, rules::SphereFace2<Math>>();
    case ClassRule::kSummedSoftmax:
      return bent ? loops_of_rule<T, rules::Softmax<Math, true, true>>()
                  : loops_of_rule<T, rules::Softmax<Math, false, true>>();
    default:
      return bent ? loops_of_rule<T, rules::Softmax<Math, true, false>>()
                  : loops_of_rule<T, rules::Softmax<Math, false, false>>();
  }
}

// [count, n] of the caller in rows of `padded`, zero past n; null stays.
template <class T>
inline T* take_rows(Arena& arena, const void* from, int64_t count, int64_t n, int64_t padded) {
  T* rows = arena.take<T>(count * padded);
  if (!from) return nullptr;
  for (int64_t k = 0; arena.base() && k < count; ++k) {
    const T* row = static_cast<const T*>(from) + k * n;
    std::copy(row, row + n, rows + k * padded);
    std::fill(rows + k * padded + n, rows + (k + 1) * padded, T(0));
  }
  return rows;
}

// Calls body(j, keep, begin, end) for each class of a tile and its labels [begin, end); keep is
// null, or 0 at those of their rows that lie in the block.
template <class T, class Body>
inline void each_labelled_class(const ClassProblem& p, int64_t first, int64_t count, int64_t row0,
                                int64_t rows, T* keep, Body&& body) {
  const ClassLabel* all = p.labels + p.label_count;
  const auto before = [](const ClassLabel& l, int64_t at) { return l.position < at; };
  const ClassLabel* next = std::lower_bound(p.labels, all, first, before);
  for (int64_t j = 0; j < count; ++j) {
    const ClassLabel* begin = next;
    bool marked = false;
    for (; next != all && next->position == first + j; ++next) {
      const int64_t i = next->row - row0;
      if (i < 0 || i >= rows) continue;
      keep[i] = 0;
      marked = true;
    }
    body(j, marked ? keep : nullptr, begin, next);
    for (const ClassLabel* l = begin; marked && l != next; ++l) {
      const int64_t i = l->row - row0;
      if (i >= 0 && i < rows) keep[i] = 1;
    }
  }
}

}  // namespace fused_losses::FL_ISA
