// Candidates of a query, which threads share behind a lock that is seldom taken.
#pragma once

#include "scores.h"

namespace fused_losses::FL_ISA {

// One thread's view of the candidates: what a score must reach to be one.
template <class P>
class Selector {
 public:
  Selector(const TopkProblem& p, const TopkPlan<P>& plan, double judge, int thread)
      : t(plan.thread(p, thread)), p_(p), plan_(plan), score_(p, t.scratch) {
    judge_ = p.affinity == Affinity::kSquaredDistance ? judge : 0;
    late_ = scores_late(p);
    alpha_ = p.affinity == Affinity::kSquaredDistance ? 2 : 1;
    inverse_ = 1 / alpha_;
  }

  // Of the triangle, whose limits allow for the largest terms; elsewhere each pair has its own.
  void grow(const RowTerms& terms) {
    slope_ = std::max(slope_, terms.slope);
    extra_ = std::max(extra_, terms.extra);
  }

  // The most that a score may be wrong by.
  float error(int64_t q) const { return plan_.size[q] * slope_ + extra_; }

  // The same of a key for what double rounds: the key itself, and |x|^2.
  double judge(int64_t q, double key) const {
    return judge_ > 0 ? judge_ * (std::abs(key) + std::abs(plan_.beta[q])) + kLeast * p_.d : 0;
  }

  // What a score must not be less than.
  void limit(int64_t q) const {
    const double floor = known(q);
    const double allowance = plan_.triangle ? error(q) * 1.000001 : 0;
    const double at = (floor - plan_.beta[q] - judge(q, floor)) * inverse_ - allowance;
    const float f = static_cast<float>(at);
    // rounded down, whichever way the conversion went
    t.limit[q] = f - std::abs(f) * 2e-7f;
  }

  bool allowed(int64_t i, int64_t j) const {
    if (p_.match != Match::kAny && (p_.x_labels[i] == p_.y_labels[j]) != (p_.match == Match::kSame))
      return false;
    if (p_.x_ids && p_.x_ids[i] == p_.y_ids[j]) return false;
    if (p_.skip_self && i == j) return false;
    for (int64_t e = 0; e < p_.excluded; ++e) {
      if (p_.exclude[i * p_.excluded + e] == j) return false;
    }
    return true;
  }

  // Query q of the block (row i of x) is offered row j of y, whose score is within e of s.
  void offer(int64_t q, int64_t i, int64_t j, float s, float e) {
    if (s + e < t.limit[q] || !allowed(i, j)) return;
    Candidate c = {0, 0, static_cast<int32_t>(j)};
    if (late_) {
      c.key = alpha_ * s + plan_.beta[q];
      c.error = static_cast<float>((alpha_ * e + judge(q, c.key)) * 1.00001);
    }
    if (!late_ || !(std::abs(c.key) < 3e38) || !(c.error < 3e38f)) {
      c.key = score_(i, j, plan_.square[q]);
      c.error = 0;
      if (c.key != c.key) return;
    }
    if (c.key + c.error < known(q)) return limit(q);
    const Lock lock(plan_.lock + q);
    Candidate* held = plan_.candidates + q * plan_.kept;
    int32_t& count = plan_.count[q];
    if (late_) {
      held[count++] = c;
      if (count == plan_.kept) compact(q, i);
    } else if (count < plan_.kept) {
      held[count++] = c;
      std::push_heap(held, held + count, better);
      if (count == plan_.kept) raise(q, held[0].key);
    } else if (better(c, held[0])) {
      replace_worst(held, count, c);
      raise(q, held[0].key);
    }
    limit(q);
  }

  // Row j of the bank is soon offered.
  void prefetch(int64_t j) const { score_.prefetch(j); }

  void compact(int64_t q, int64_t i) {
    Candidate* c = plan_.candidates + q * plan_.kept;
    int64_t n = plan_.count[q];
    if (n >= p_.k) {
      for (int64_t a = 0; a < n; ++a) t.lower[a] = c[a].key - c[a].error;
      std::nth_element(t.lower, t.lower + p_.k - 1, t.lower + n, std::greater<double>());
      raise(q, t.lower[p_.k - 1]);
      const double floor = known(q);
      n = std::remove_if(c, c + n, [&](const Candidate& a) { return a.key + a.error < floor; }) - c;
    }
    if (n > plan_.kept - plan_.kept / 4) {
      n = exact(c, n, q, i);
      if (n == p_.k) raise(q, c[n - 1].key);
    }
    plan_.count[q] = static_cast<int32_t>(n);
  }

  // Scores candidates exactly and keeps the k best, in their order.
  int64_t exact(Candidate* c, int64_t n, int64_t q, int64_t i) const {
    for (int64_t a = 0; a < n; ++a) {
      if (a + kAhead < n) score_.prefetch(c[a + kAhead].index);
      if (c[a].error == 0) continue;
      c[a].key = score_(i, c[a].index, plan_.square[q]);
      c[a].error = 0;
    }
    n = std::remove_if(c, c + n, [](const Candidate& a) { return a.key != a.key; }) - c;
    const int64_t most = std::min(n, p_.k);
    std::partial_sort(c, c + most, c + n, better);
    return most;
  }

  typename TopkPlan<P>::Thread t;

 private:
  static bool better(const Candidate& a, const Candidate& b) {
    return a.key > b.key || (a.key == b.key && a.index < b.index);
  }

  // The heap's first is the worst of it; c takes its place.
  static void replace_worst(Candidate* heap, int64_t n, const Candidate& c) {
    int64_t at = 0;
    for (int64_t child = 1; child < n; child = 2 * at + 1) {
      if (child + 1 < n && better(heap[child], heap[child + 1])) ++child;
      if (!better(c, heap[child])) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = c;
  }

  double known(int64_t q) const {
    double floor;
    __atomic_load(&plan_.floor[q], &floor, __ATOMIC_RELAXED);
    return floor;
  }

  // Under the lock.
  void raise(int64_t q, double lower) const {
    if (lower > known(q)) __atomic_store(&plan_.floor[q], &lower, __ATOMIC_RELAXED);
  }

  struct Lock {
    explicit Lock(char* at) : held(at) {
      for (int turn = 0; __atomic_test_and_set(held, __ATOMIC_ACQUIRE); ++turn) {
        if (turn > 100) std::this_thread::yield();
      }
    }
    ~Lock() { __atomic_clear(held, __ATOMIC_RELEASE); }
    Lock(const Lock&) = delete;
    char* held;
  };

  const TopkProblem& p_;
  const TopkPlan<P>& plan_;
  Scorer score_;
  bool late_;
  static constexpr double kLeast = std::numeric_limits<double>::min();
  double alpha_, inverse_, judge_;
  float slope_ = 0, extra_ = 0;
};

}  // namespace fused_losses::FL_ISA
