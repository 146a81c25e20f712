// MaxSim: query tokens in the lanes, document tokens go by, a running maximum in registers.
#pragma once

#include "../maxsim.h"
#include "pairs/tile.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kQueryBytes = 256 << 10;  // of packed query tokens: they stay in L2
constexpr int64_t kDocumentsAtOnce = 16;    // a cache line of the index

template <class P, class T>
struct MaxSimPlan {
  using Word = typename P::Word;
  int64_t depth, block_tokens, groups;
  Word* left;  // document tokens in words, null: as they lie
  size_t shared_bytes, thread_bytes;
  char* buffer;

  MaxSimPlan(const MaxSimProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    depth = words<P>(p.d);
    const int64_t panel_bytes = std::max<int64_t>(depth, 1) * kPanel<P> * sizeof(Word);
    block_tokens = std::max<int64_t>(1, kQueryBytes / panel_bytes) * kPanel<P>;
    // whole queries, so that a score has one owner; a long query is a group of its own
    const int64_t each = ceil_div(p.query_tokens(), std::max<int64_t>(p.query_count, 1));
    groups = std::max<int64_t>(1, block_tokens / std::max<int64_t>(each, 1));
    Arena arena(base);
    left = arena.take<Word>(P::kPair == 2 ? p.document_tokens() * depth : 0);
    shared_bytes = arena.used();
    Arena one(nullptr);
    one.take<Word>(depth * block_tokens);
    thread_bytes = one.used();
  }
};

template <class P, class T>
size_t maxsim_bytes(const MaxSimProblem& p, int threads) {
  const MaxSimPlan<P, T> plan(p, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

// The largest product of a panel of query tokens with a document's tokens, and where.
template <class P, class T>
inline void panel_maxima(const typename P::Word* document, int64_t tokens, int64_t depth,
                         const typename P::Word* panel, T* best_out, Code<T>* at_out) {
  const Vector<T> none = Vector<T>{} + kNone<T>;
  Vector<T> best[kVectors];
  Vector<Code<T>> at[kVectors];
  for (int v = 0; v < kVectors; ++v) best[v] = none, at[v] = Vector<Code<T>>{} - 1;
  for (int64_t i = 0; i < tokens; i += kRows) {
    const typename P::Word* a[kRows];
    for (int r = 0; r < kRows; ++r) a[r] = document + std::min(i + r, tokens - 1) * depth;
    const int64_t last = tokens - i;
    multiply<P, true>(a, 1, panel, depth, [&](int r, int v, Vector<T> sum) {
      if (r >= last) return;
      // the first of equals; a NaN stays
      const auto better = (sum > best[v]) | (sum != sum);
      best[v] = better ? sum : best[v];
      at[v] = better ? Vector<Code<T>>{} + static_cast<Code<T>>(i + r) : at[v];
    });
  }
  for (int v = 0; v < kVectors; ++v) {
    store(best_out + v * kLanes<T>, best[v]);
    store(at_out + v * kLanes<T>, at[v]);
  }
}

template <class P, class T>
void maxsim_forward(const MaxSimProblem& p, void* scores_out, int32_t* index, void* buffer,
                    const Parallel& parallel) {
  using Word = typename P::Word;
  constexpr int64_t kWide = kPanel<P>;
  const MaxSimPlan<P, T> plan(p, buffer);
  const int64_t d = p.d, count = p.document_count;
  const T* queries = static_cast<const T*>(p.queries);
  const T* documents = static_cast<const T*>(p.documents);
  T* scores = static_cast<T*>(scores_out);
  const Word* left = plan.left;
  if constexpr (P::kPair == 2) {
    on_tasks(parallel, ceil_div(p.document_tokens(), 256), [&](int, int64_t task) {
      const int64_t i = task * 256, rows = std::min<int64_t>(256, p.document_tokens() - i);
      narrow_rows<P>(documents + i * d, rows, d, plan.left + i * plan.depth);
    });
  } else {
    left = documents;
  }
  on_tasks(parallel, ceil_div(p.query_count, plan.groups), [&](int thread, int64_t task) {
    Word* panels =
        reinterpret_cast<Word*>(plan.buffer + plan.shared_bytes + thread * plan.thread_bytes);
    const int64_t first = task * plan.groups;
    const int64_t last = std::min(first + plan.groups, p.query_count);
    std::fill(scores + first * count, scores + last * count, T(0));
    const int64_t end = p.query_offsets[last];
    for (int64_t t0 = p.query_offsets[first]; t0 < end; t0 += plan.block_tokens) {
      const int64_t tokens = std::min(plan.block_tokens, end - t0);
      for (int64_t t = 0; t < tokens; t += kWide) {
        pack_panel<P>(queries + (t0 + t) * d, tokens - t, d, panels + t * plan.depth);
      }
      for (int64_t b = 0; b < count; ++b) {
        const int64_t start = p.document_offsets[b];
        int64_t query = first;
        for (int64_t t = 0; t < tokens; t += kWide) {
          alignas(64) T best[kWide];
          alignas(64) Code<T> at[kWide];
          panel_maxima<P, T>(left + start * plan.depth, p.document_offsets[b + 1] - start,
                             plan.depth, panels + t * plan.depth, best, at);
          for (int64_t k = 0; k < std::min(kWide, tokens - t); ++k) {
            const int64_t token = t0 + t + k;
            while (token >= p.query_offsets[query + 1]) ++query;
            index[token * count + b] = static_cast<int32_t>(at[k]);
            scores[query * count + b] += at[k] < 0 ? T(0) : best[k];
          }
        }
      }
    }
  });
}

template <class T>
inline void add_scaled(T* to, const T* from, T by, int64_t d) {
  for (int64_t e = 0; e < d; ++e) to[e] += by * from[e];
}

template <class T>
void maxsim_backward(const MaxSimProblem& p, const void* grad_in, const int32_t* index,
                     void* dqueries_out, void* ddocuments_out, const Parallel& parallel) {
  constexpr int64_t kTokens = 64;
  const int64_t d = p.d, count = p.document_count, tokens = p.query_tokens();
  const T* grad = static_cast<const T*>(grad_in);
  const T* queries = static_cast<const T*>(p.queries);
  const T* documents = static_cast<const T*>(p.documents);
  T* dqueries = static_cast<T*>(dqueries_out);
  T* ddocuments = static_cast<T*>(ddocuments_out);
  on_tasks(parallel, dqueries ? ceil_div(tokens, kTokens) : 0, [&](int, int64_t task) {
    const int64_t first = task * kTokens, last = std::min(first + kTokens, tokens);
    std::fill(dqueries + first * d, dqueries + last * d, T(0));
    for (int64_t b0 = 0; b0 < count; b0 += kDocumentsAtOnce) {
      const int64_t b1 = std::min(b0 + kDocumentsAtOnce, count);
      int64_t query = std::upper_bound(p.query_offsets, p.query_offsets + p.query_count, first) -
                      p.query_offsets - 1;
      for (int64_t t = first; t < last; ++t) {
        while (t >= p.query_offsets[query + 1]) ++query;
        for (int64_t b = b0; b < b1; ++b) {
          const int64_t at = index[t * count + b];
          if (at < 0) continue;
          add_scaled(dqueries + t * d, documents + (p.document_offsets[b] + at) * d,
                     grad[query * count + b], d);
        }
      }
    }
  });
  on_tasks(parallel, ddocuments ? ceil_div(count, kDocumentsAtOnce) : 0, [&](int, int64_t task) {
    const int64_t b0 = task * kDocumentsAtOnce, b1 = std::min(b0 + kDocumentsAtOnce, count);
    std::fill(ddocuments + p.document_offsets[b0] * d, ddocuments + p.document_offsets[b1] * d,
              T(0));
    int64_t query = 0;
    for (int64_t t = 0; t < tokens; ++t) {
      while (t >= p.query_offsets[query + 1]) ++query;
      for (int64_t b = b0; b < b1; ++b) {
        const int64_t at = index[t * count + b];
        if (at < 0) continue;
        add_scaled(ddocuments + (p.document_offsets[b] + at) * d, queries + t * d,
                   grad[query * count + b], d);
      }
    }
  });
}

}  // namespace fused_losses::FL_ISA
