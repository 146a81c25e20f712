// What a call of the top-k holds: candidates, packed queries, and what its threads have.
#pragma once

#include <thread>
#include <vector>

#include "../../topk.h"
#include "../pairs/tile.h"

namespace fused_losses::FL_ISA {

// key: larger is better, within error of the pair's exact one.
struct Candidate {
  double key;
  float error;
  int32_t index;
};

constexpr int64_t kTopkTileBytes = 256 << 10;  // of the bank in a tile
constexpr int64_t kTopkQueries = 8192;         // of a block at most
constexpr int64_t kTopkColumns = 1024;         // of a task of the triangle
constexpr int64_t kHeadTileBytes = 24 << 10;   // of first coordinates
constexpr int64_t kOpen = 256;                 // pairs that wait for their next coordinates, about
constexpr int64_t kAhead = 4;                  // candidates that are on their way into the caches
constexpr double kNarrowNorm = 1e-11;          // squares in float do not tell shorter rows from 0

// Rows that the screen reads are at hand when a candidate turns up: it is scored at once, and a
// heap holds the k best. What only codes were read of is scored late, for few: its row may be far
// away.
inline bool scores_late(const TopkProblem& p) { return p.codes.rows.data != nullptr; }
inline int64_t candidates_kept(const TopkProblem& p) {
  return scores_late(p) ? std::max(2 * p.k, p.k + 64) : p.k;
}

// A pair that the first coordinates leave open: query of the block, row of the bank, their product.
struct OpenPair {
  int32_t query, row;
  float product;
};

template <class P>
struct TopkPlan {
  using Word = typename P::Word;
  int64_t depth, tile, queries, kept;
  bool triangle;
  double* center;  // what rows are moved by, zeros where they are not
  // shared, of a block of queries
  Word* panels;
  double *beta, *floor;   // a key is alpha s + beta; the least that the k-th best can be
  double* square;         // |x - center|^2
  float* size;            // |x - center|, 1 where only the direction counts
  float* rest;            // [queries, levels, kStep] coordinates behind the panels'
  float* tails;           // [levels + 1, queries] at most what a query has beyond each level
  Candidate* candidates;  // [queries, kept]
  int32_t* count;
  char* lock;
  // shared, of the triangle: rows in the order of their labels, and whom of the later ones row c
  // meets: [from[c], to[c]), which grow with c
  int32_t *order, *from, *to;
  Word* left;  // null: rows are read in place
  float *multiplier, *offset;
  size_t shared_bytes, thread_bytes;
  char* buffer;

  struct Thread {
    float *limit, *row, *gathered, *multiplier, *offset, *slope, *extra, *sums;
    double *lower, *scratch;
    Word* rows;
    OpenPair* open;

    Thread(Arena& arena, const TopkPlan& plan, const TopkProblem& p) {
      limit = arena.take<float>(plan.queries);
      row = arena.take<float>(p.d);
      gathered = arena.take<float>(kPanel<P> * p.d);
      multiplier = arena.take<float>(plan.tile + P::kAtOnce);
      offset = arena.take<float>(plan.tile + P::kAtOnce);
      slope = arena.take<float>(plan.tile + P::kAtOnce);
      extra = arena.take<float>(plan.tile + P::kAtOnce);
      sums = arena.take<float>(P::kAtOnce * kPanel<P>);
      lower = arena.take<double>(plan.kept);
      scratch = arena.take<double>(p.d);
      rows = arena.take<Word>(plan.triangle || p.heads.first ? 0 : plan.tile * plan.depth);
      open = arena.take<OpenPair>(p.heads.first ? kOpen + P::kAtOnce * kPanel<P> : 0);
    }
  };

  TopkPlan(const TopkProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    const int64_t wide = p.heads.first ? p.heads.width : p.d;
    depth = words<P>(wide);
    kept = candidates_kept(p);
    const int64_t bytes = p.heads.first ? kHeadTileBytes : kTopkTileBytes;
    const int64_t fit = bytes / (std::max<int64_t>(wide, 1) * 4) / P::kAtOnce * P::kAtOnce;
    tile = std::clamp<int64_t>(fit, 24, 384);
    const int64_t padded = round_up(std::max<int64_t>(p.n, 1), kPanel<P>);
    const int64_t a_query = kept * int64_t(sizeof(Candidate));
    const int64_t affordable = int64_t(p.most_bytes) / a_query / kPanel<P> * kPanel<P>;
    triangle = p.symmetric && p.skip_self && !p.codes.rows.data && !p.heads.first && !p.y_scale &&
               p.x.type == p.y.type && padded <= affordable;
    queries = triangle ? padded : std::clamp(affordable, kPanel<P>, std::min(padded, kTopkQueries));
    Arena arena(base);
    center = arena.take<double>(p.d);
    panels = arena.take<Word>(queries * depth);
    beta = arena.take<double>(queries);
    floor = arena.take<double>(queries);
    square = arena.take<double>(queries);
    size = arena.take<float>(queries);
    rest = arena.take<float>(p.heads.first ? queries * p.heads.levels * Heads::kStep : 0);
    tails = arena.take<float>(p.heads.first ? queries * (p.heads.levels + 1) : 0);
    candidates = arena.take<Candidate>(queries * kept);
    count = arena.take<int32_t>(queries);
    lock = arena.take<char>(queries);
    order = arena.take<int32_t>(triangle ? queries : 0);
    from = arena.take<int32_t>(triangle ? queries : 0);
    to = arena.take<int32_t>(triangle ? queries : 0);
    left = arena.take<Word>(triangle ? p.n * depth : 0);
    multiplier = arena.take<float>(triangle ? queries : 0);
    offset = arena.take<float>(triangle ? queries : 0);
    shared_bytes = arena.used();
    Arena one(nullptr);
    Thread(one, *this, p);
    thread_bytes = one.used();
  }

  Thread thread(const TopkProblem& p, int index) const {
    Arena arena(buffer + shared_bytes + index * thread_bytes);
    return Thread(arena, *this, p);
  }
};

template <class P>
size_t topk_bytes(const TopkProblem& p, int threads) {
  const TopkPlan<P> plan(p, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

}  // namespace fused_losses::FL_ISA
