// MaxSim: query tokens in the lanes, document tokens go by, a running maximum in registers.
//
// A chunk of a document's tokens stays in L1 while the panels of query tokens go by. Few query
// tokens fill a narrow panel, against more document tokens at once. A product's sum goes along the
// tokens whatever the panel, and a score has one owner, which adds up in the order of the tokens:
// no bit depends on how many queries there are, nor on threads.
#pragma once

#include "../maxsim.h"
#include "pairs/tile.h"
#include "sums.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kQueryBytes = 256 << 10;  // of packed query tokens: they stay in L2
constexpr int64_t kChunkBytes = 16 << 10;   // of document tokens: they stay in L1
template <class P>
constexpr int64_t kChunkUnit = kInTiles<P> ? 48 : 24;  // a multiple of the rows of its forms
constexpr int64_t kRunTokens = 2048;                   // of documents in a task, at least
constexpr int64_t kTasks = 8;                          // a thread
constexpr int64_t kDocumentsAtOnce = 16;               // a cache line of the index

template <class P, class T>
struct MaxSimPlan {
  using Word = typename P::Word;
  int64_t depth, block_tokens, groups, chunk;
  size_t thread_bytes;
  char* buffer;

  struct Thread {
    Word* panels;  // of query tokens
    T* wide;       // a chunk, unless it lies in T
    Word* words;   // the same in words, unless words are elements
    T* best;       // a query token
    Code<T>* at;

    Thread(Arena& arena, const MaxSimPlan& plan, const MaxSimProblem& p) {
      panels = arena.take<Word>(plan.depth * plan.block_tokens);
      wide = arena.take<T>(p.stored == Stored::kWide ? 0 : plan.chunk * p.d);
      words = arena.take<Word>(P::kPair == 2 ? plan.chunk * plan.depth : 0);
      best = arena.take<T>(plan.block_tokens);
      at = arena.take<Code<T>>(plan.block_tokens);
    }
  };

  MaxSimPlan(const MaxSimProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    depth = words<P>(p.d);
    const int64_t row_bytes = std::max<int64_t>(depth, 1) * sizeof(Word);
    block_tokens = std::max<int64_t>(1, kQueryBytes / (row_bytes * kPanel<P>)) * kPanel<P>;
    chunk = std::max<int64_t>(1, kChunkBytes / row_bytes / kChunkUnit<P>) * kChunkUnit<P>;
    // whole queries, so that a score has one owner; a long query is a group of its own
    const int64_t each = ceil_div(p.query_tokens(), std::max<int64_t>(p.query_count, 1));
    groups = std::max<int64_t>(1, block_tokens / std::max<int64_t>(each, 1));
    Arena one(nullptr);
    Thread(one, *this, p);
    thread_bytes = one.used();
  }

  Thread thread(int index, const MaxSimProblem& p) const {
    Arena arena(buffer + index * thread_bytes);
    return Thread(arena, *this, p);
  }
};

template <class P, class T>
size_t maxsim_bytes(const MaxSimProblem& p, int threads) {
  return threads * MaxSimPlan<P, T>(p, nullptr).thread_bytes;
}

// How many document tokens at once meet a panel of so many vectors.
template <class P, int kWidth>
constexpr int kTall = kInTiles<P> || kWidth == kVectors ? P::kAtOnce : 8;

// As `multiply`, of a panel of kWidth vectors; `ahead` is on its way into the caches meanwhile.
template <class P, int kWidth, class Finish>
[[gnu::always_inline]] inline void multiply_narrow(const typename P::Word* const* a,
                                                   const typename P::Word* b, int64_t depth,
                                                   const char* ahead, Finish&& finish) {
  using Word = typename P::Word;
  constexpr int kHigh = kTall<P, kWidth>;
  Vector<typename P::Sum> sums[kHigh][kWidth] = {};
  for (int64_t k = 0; k < depth; ++k, b += kWidth * kLanes<Word>) {
    __builtin_prefetch(ahead + k * kHigh * sizeof(typename P::Sum) * P::kPair);
    typename P::Packed columns[kWidth];
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) columns[v] = load(b + v * kLanes<Word>);
#pragma GCC unroll 8
    for (int r = 0; r < kHigh; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kWidth; ++v) {
        sums[r][v] = P::multiply_add(sums[r][v], a[r][k], columns[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kHigh; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) finish(r, v, sums[r][v]);
  }
}

// Some tokens of a document, from its token `first` on.
template <class P>
struct TokenChunk {
  const typename P::Word* words;
  int64_t tokens, depth, first;
  const char* ahead;  // what comes after them in memory
};

// Raises the largest product of each query token of a panel with a document's tokens, and where.
template <class P, class T, int kWidth>
inline void panel_maxima(const TokenChunk<P>& chunk, const typename P::Word* panel, T* best_io,
                         Code<T>* at_io) {
  constexpr int kHigh = kTall<P, kWidth>;
  Vector<T> best[kWidth];
  Vector<Code<T>> at[kWidth];
  for (int v = 0; v < kWidth; ++v) {
    best[v] = load(best_io + v * kLanes<T>);
    at[v] = load(at_io + v * kLanes<T>);
  }
  for (int64_t i = 0; i < chunk.tokens; i += kHigh) {
    const typename P::Word* a[kHigh];
    for (int r = 0; r < kHigh; ++r) {
      a[r] = chunk.words + std::min(i + r, chunk.tokens - 1) * chunk.depth;
    }
    const int64_t last = chunk.tokens - i;
    const auto take = [&](int r, int v, Vector<T> sum) {
      if (r >= last) return;
      // the first of equals; a NaN stays
      const auto better = (sum > best[v]) | (sum != sum);
      best[v] = better ? sum : best[v];
      at[v] = better ? Vector<Code<T>>{} + static_cast<Code<T>>(chunk.first + i + r) : at[v];
    };
    if constexpr (kWidth == kVectors) {
      multiply<P, true>(a, 1, panel, chunk.depth, take);
#if defined(__AMX_BF16__)
    } else if constexpr (kInTiles<P>) {
      multiply_in_tiles<kWidth>(a, chunk.depth, 0, 1, panel, take);
#endif
    } else {
      const int64_t token_bytes = chunk.depth * P::kPair * sizeof(T);
      multiply_narrow<P, kWidth>(a, panel, chunk.depth, chunk.ahead + i * token_bytes, take);
    }
  }
  for (int v = 0; v < kWidth; ++v) {
    store(best_io + v * kLanes<T>, best[v]);
    store(at_io + v * kLanes<T>, at[v]);
  }
}

// Calls f.template operator()<kWidth>() with the vectors that so many query tokens fill.
template <class T, class F>
[[gnu::always_inline]] inline void with_width(int64_t tokens, F&& f) {
  if (tokens <= kLanes<T>) return f.template operator()<1>();
  if constexpr (kVectors == 4) {
    if (tokens <= 2 * kLanes<T>) return f.template operator()<2>();
    if (tokens <= 3 * kLanes<T>) return f.template operator()<3>();
  }
  f.template operator()<kVectors>();
}

// A group of queries [first, last) against documents [b0, b1).
template <class P, class T>
void maxsim_block(const MaxSimProblem& p, const MaxSimPlan<P, T>& plan, int64_t first, int64_t last,
                  int64_t b0, int64_t b1, T* scores, int32_t* index,
                  const typename MaxSimPlan<P, T>::Thread& own) {
  constexpr int64_t kWide = kPanel<P>;
  const int64_t d = p.d, count = p.document_count;
  const T* queries = static_cast<const T*>(p.queries);
  const int64_t row_bytes = d * (p.stored == Stored::kWide ? sizeof(T) : 2);
  const char* documents = static_cast<const char*>(p.documents);
  const int64_t start = p.query_offsets[first], end = p.query_offsets[last];
  // once without query tokens, too: documents are looked at
  for (int64_t t0 = start; t0 == start || t0 < end; t0 += plan.block_tokens) {
    const int64_t tokens = std::min(plan.block_tokens, end - t0);
    for (int64_t t = 0; t < tokens; t += kWide) {
      with_width<T>(tokens - t, [&]<int kWidth>() {
        pack_panel<P, kWidth * kLanes<T>>(queries + (t0 + t) * d, tokens - t, d,
                                          own.panels + t * plan.depth);
      });
    }
    for (int64_t b = b0; b < b1; ++b) {
      const int64_t from = p.document_offsets[b], length = p.document_offsets[b + 1] - from;
      std::fill(own.best, own.best + round_up(tokens, kWide), kNone<T>);
      std::fill(own.at, own.at + round_up(tokens, kWide), Code<T>(-1));
      bool finite = true;
      for (int64_t i = 0; i < length; i += plan.chunk) {
        const char* stored = documents + (from + i) * row_bytes;
        TokenChunk<P> chunk = {nullptr, std::min(plan.chunk, length - i), plan.depth, i, nullptr};
        chunk.ahead = stored + chunk.tokens * row_bytes;
        const T* rows = reinterpret_cast<const T*>(stored);
        if (p.stored != Stored::kWide) {
          read_rows(p.stored, p.documents, from + i, chunk.tokens, d, own.wide);
          rows = own.wide;
        }
        if (t0 == start) finite = finite && all_finite(rows, chunk.tokens * d);
        if constexpr (P::kPair == 2) {
          narrow_rows<P>(rows, chunk.tokens, d, own.words);
          chunk.words = own.words;
        } else {
          chunk.words = rows;
        }
        for (int64_t t = 0; t < tokens; t += kWide) {
          with_width<T>(tokens - t, [&]<int kWidth>() {
            panel_maxima<P, T, kWidth>(chunk, own.panels + t * plan.depth, own.best + t,
                                       own.at + t);
          });
        }
      }
      for (int64_t query = first; t0 == start && query < last; ++query) {
        scores[query * count + b] = finite ? T(0) : std::numeric_limits<T>::quiet_NaN();
      }
      int64_t query = first;
      for (int64_t k = 0; k < tokens; ++k) {
        const int64_t token = t0 + k;
        while (token >= p.query_offsets[query + 1]) ++query;
        index[token * count + b] = static_cast<int32_t>(own.at[k]);
        scores[query * count + b] += own.at[k] < 0 ? T(0) : own.best[k];
      }
    }
  }
  for (int64_t query = first; query < last; ++query) {
    const int64_t at = p.query_offsets[query];
    if (all_finite(queries + at * d, (p.query_offsets[query + 1] - at) * d)) continue;
    for (int64_t b = b0; b < b1; ++b) {
      const bool some = p.document_offsets[b] < p.document_offsets[b + 1];
      if (some) scores[query * count + b] = std::numeric_limits<T>::quiet_NaN();
    }
  }
}

template <class P, class T>
void maxsim_forward(const MaxSimProblem& p, void* scores, int32_t* index, void* buffer,
                    const Parallel& parallel) {
  const MaxSimPlan<P, T> plan(p, buffer);
  const int64_t count = p.document_count, total = p.document_tokens();
  const int64_t groups = ceil_div(p.query_count, plan.groups);
  // few groups: each meets the documents in runs of about as many tokens
  const int64_t wanted = ceil_div(kTasks * parallel.threads, std::max<int64_t>(groups, 1));
  const int64_t runs =
      parallel.threads == 1 ? 1 : std::clamp<int64_t>(total / kRunTokens, 1, wanted);
  const auto begin = [&](int64_t run) {
    const int64_t* offsets = p.document_offsets;
    if (run == runs) return count;
    return std::lower_bound(offsets, offsets + count, total / runs * run) - offsets;
  };
  on_tasks(parallel, groups * runs, [&](int thread, int64_t task) {
    const int64_t first = task / runs * plan.groups, run = task % runs;
    maxsim_block<P, T>(p, plan, first, std::min(first + plan.groups, p.query_count), begin(run),
                       begin(run + 1), static_cast<T*>(scores), index, plan.thread(thread, p));
  });
}

template <class T>
inline void add_scaled(T* to, const T* from, T by, int64_t d) {
  for (int64_t e = 0; e < d; ++e) to[e] += by * from[e];
}

// The same of a row that may lie in 16 bits.
template <class T>
inline void add_scaled(T* to, Stored stored, const void* from, int64_t row, T by, int64_t d) {
  if (stored == Stored::kWide) return add_scaled(to, static_cast<const T*>(from) + row * d, by, d);
  T part[kTurnedRows];
  const Type type = stored == Stored::kHalf ? Type::kFloat16 : Type::kBFloat16;
  for (int64_t e = 0; e < d; e += kTurnedRows) {
    const int64_t wide = std::min(kTurnedRows, d - e);
    read_row({from, type, 1}, row * d + e, wide, part);
    add_scaled(to + e, part, by, wide);
  }
}

template <class T>
void maxsim_backward(const MaxSimProblem& p, const void* grad_in, const int32_t* index,
                     void* dqueries_out, void* ddocuments_out, const Parallel& parallel) {
  const int64_t d = p.d, count = p.document_count, tokens = p.query_tokens();
  // few tokens are dealt out to all threads; each has one owner
  const int64_t most = ceil_div(tokens, kTasks * parallel.threads);
  const int64_t each = parallel.threads == 1 ? 64 : std::clamp<int64_t>(most, 1, 64);
  const T* grad = static_cast<const T*>(grad_in);
  const T* queries = static_cast<const T*>(p.queries);
  T* dqueries = static_cast<T*>(dqueries_out);
  T* ddocuments = static_cast<T*>(ddocuments_out);
  on_tasks(parallel, dqueries ? ceil_div(tokens, each) : 0, [&](int, int64_t task) {
    const int64_t first = task * each, last = std::min(first + each, tokens);
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
          add_scaled(dqueries + t * d, p.stored, p.documents, p.document_offsets[b] + at,
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
