// The k best columns of each row: products screen, candidates are scored again in double.
//
// Queries lie in the lanes, packed once a block; the bank's rows go by, as they lie where that is
// possible. A score that cannot reach the k-th best so far costs a comparison and nothing else.
// The threads share the candidates of a query, behind a lock that is seldom taken. The result does
// not depend on who saw what first: it is the exact one.
#pragma once

#include "heads.h"

namespace fused_losses::FL_ISA {

// The triangle's rows by their labels, and where each one's partners stand.
template <class P>
void order_rows(const TopkProblem& p, const TopkPlan<P>& plan) {
  const int32_t n = static_cast<int32_t>(p.n);
  for (int32_t q = 0; q < n; ++q) {
    plan.order[q] = q;
    plan.from[q] = q + 1;
    plan.to[q] = n;
  }
  if (p.match == Match::kAny) return;
  std::sort(plan.order, plan.order + n, [&](int32_t a, int32_t b) {
    return p.x_labels[a] < p.x_labels[b] || (p.x_labels[a] == p.x_labels[b] && a < b);
  });
  for (int32_t q = n - 1, end = n; q >= 0; --q) {
    if (q + 1 < n && p.x_labels[plan.order[q]] != p.x_labels[plan.order[q + 1]]) end = q + 1;
    (p.match == Match::kSame ? plan.to : plan.from)[q] = end;
  }
}

template <class P>
void topk(const TopkProblem& p, const TopkOut& out, void* buffer, const Parallel& parallel) {
  const TopkPlan<P> plan(p, buffer);
  std::vector<double> row(p.d);
  const Screened screen(p, choose_center(p, plan.center, row.data()), P::kPair == 2);
  if (plan.triangle) {
    order_rows(p, plan);
  }
  for (int64_t first = 0; first < p.n; first += plan.queries) {
    const int64_t count = std::min(plan.queries, p.n - first);
    if (p.heads.first) {
      pack_heads<P>(p, plan, first, count, parallel);
    } else {
      pack_queries<P>(p, plan, screen, first, count, parallel);
    }
    std::vector<Selector<P>> selectors;
    selectors.reserve(parallel.threads);
    for (int i = 0; i < parallel.threads; ++i) {
      selectors.emplace_back(p, plan, screen.judge(), i);
    }
    if (plan.triangle) {
      topk_triangle<P>(p, plan, screen, selectors, parallel);
    } else {
      for (Selector<P>& s : selectors) {
        std::fill(s.t.limit + count, s.t.limit + plan.queries,
                  std::numeric_limits<float>::infinity());
      }
      if (p.heads.first) {
        topk_heads<P>(p, plan, first, count, selectors, parallel);
      } else {
        topk_rectangle<P>(p, plan, screen, first, count, selectors, parallel);
      }
    }
    constexpr int64_t kQueriesAtOnce = 64;
    on_tasks(parallel, ceil_div(count, kQueriesAtOnce), [&](int thread, int64_t task) {
      const int64_t end = std::min((task + 1) * kQueriesAtOnce, count);
      for (int64_t q = task * kQueriesAtOnce; q < end; ++q) {
        const int64_t i = first + (plan.triangle ? plan.order[q] : q);
        Candidate* held = plan.candidates + q * plan.kept;
        const auto beaten = [&](const Candidate& c) { return c.key + c.error < plan.floor[q]; };
        const int64_t kept = std::remove_if(held, held + plan.count[q], beaten) - held;
        const int64_t found = selectors[thread].exact(held, kept, q, i);
        const double by = p.largest ? 1 : -1;
        for (int64_t a = 0; a < p.k; ++a) {
          const bool real = a < found;
          const double key = real ? by * held[a].key : NAN;
          out.keys[i * p.k + a] = key == 0 ? 0 : key;  // no -0
          out.index[i * p.k + a] = real ? held[a].index : -1;
        }
      }
    });
  }
}

}  // namespace fused_losses::FL_ISA
