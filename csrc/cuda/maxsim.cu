// MaxSim on tiles of products (primitives/maxsim, backends/cuda_maxsim.py): query
// tokens are rows, document tokens columns, [rows, stride] float made by the library, still in L2.
//
// Where documents begin only the device knows, so a tile may cut the one at either end: `open_best`
// holds each row's largest product with the document that the last tile left open. Every gradient
// has one owner that adds it up in a fixed order: no atomics.
#include <limits>

#include "warp.h"

namespace fused_losses::cuda::maxsim {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kWide = 4;         // columns of a lane: 16 bytes of the tile
constexpr int kTileTokens = 32;  // document tokens of a block of the backward
constexpr int kStaged = 512;     // query tokens that such a block looks at together

// clang-format off
#define MAXIMA_FIELDS(F)                                                                        \
  F(float*, tile)              /* products, 16-byte aligned; a document's first column here gets \
                                  its row's largest product */                                  \
  F(int64_t, stride)           /* a multiple of kWide */                                        \
  F(const int64_t*, query_offsets)    /* [queries + 1] */                                       \
  F(const int64_t*, document_offsets) /* [documents + 1] */                                     \
  F(const int64_t*, first_query)      /* [1] the query of the first row */                      \
  F(const int64_t*, first_document)   /* [1] the document of the first column */                \
  F(float*, open_best)         /* [query tokens] */                                             \
  F(int32_t*, index)           /* [query tokens, documents] the chosen token of each, -1: none */ \
  F(float*, scores)            /* [queries, documents], 0 before the first tile */              \
  F(int64_t, queries) F(int64_t, documents)                                                     \
  F(int64_t, first_row) F(int64_t, row_end) F(int64_t, first_column) F(int64_t, column_end)
// clang-format on
FL_ARGUMENTS(MaximaArguments, MAXIMA_FIELDS)

// The largest so far and where: the first of equals, and the first NaN before all.
struct Best {
  float value = -std::numeric_limits<float>::infinity();
  int32_t at = 2147483647;

  FL_DEVICE void add(float v, int32_t where) {
    const bool broken = value != value, fresh = v != v;
    const bool same = broken ? fresh : v == value;
    if ((fresh && !broken) || (!broken && v > value) || (same && where < at)) {
      value = v;
      at = where;
    }
  }
};

// A warp goes along a row, document after document.
FL_KERNEL(kThreads) token_maxima(MaximaArguments a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  for (int64_t i = a.first_row + warp; i < a.row_end; i += int64_t(gridDim.x) * kWarps) {
    float* products = a.tile + (i - a.first_row) * a.stride;
    for (int64_t b = ld(a.first_document); b < a.documents; ++b) {
      const int64_t start = ld(a.document_offsets + b), end = ld(a.document_offsets + b + 1);
      if (start >= a.column_end) break;
      if (start == end) continue;
      const int64_t first = start > a.first_column ? start : a.first_column;
      const int64_t last = end < a.column_end ? end : a.column_end;
      Best best;
      __syncwarp();  // the store below may be to a pack that other lanes read
      // whole packs; what they hold of the neighbours is passed over
      const int64_t aligned = a.first_column + (first - a.first_column) / kWide * kWide;
      for (int64_t j = aligned + lane * kWide; j < last; j += kWarp * kWide) {
        const auto product = ld_pack(products + j - a.first_column);
        for (int c = 0; c < kWide; ++c) {
          // what is outside is worth nothing: a branch would split the pack's load
          const bool inside = j + c >= first && j + c < last;
          const Best none;
          best.add(inside ? product[c] : none.value, inside ? int32_t(j + c - start) : none.at);
        }
      }
      for (int apart = kWarp / 2; apart > 0; apart /= 2) {
        const float value = __shfl_xor_sync(kAllLanes, best.value, apart);
        best.add(value, __shfl_xor_sync(kAllLanes, best.at, apart));
      }
      __syncwarp();
      if (lane != 0) continue;
      int32_t* at = a.index + i * a.documents + b;
      if (start < a.first_column) best.add(ld(a.open_best + i), ld(at));
      st(at, best.at);
      if (end > a.column_end) {
        st(a.open_best + i, best.value);
      } else {
        st(products + first - a.first_column, best.value);
      }
    }
  }
}

// Sums of the maxima over a query's tokens of this tile, of documents that end in it.
FL_KERNEL(kThreads) token_sums(MaximaArguments a) {
  for (int64_t q = ld(a.first_query) + blockIdx.x; q < a.queries; q += gridDim.x) {
    const int64_t start = ld(a.query_offsets + q), end = ld(a.query_offsets + q + 1);
    if (start >= a.row_end) break;
    const int64_t first = start > a.first_row ? start : a.first_row;
    const int64_t last = end < a.row_end ? end : a.row_end;
    for (int64_t b = ld(a.first_document) + threadIdx.x; b < a.documents; b += kThreads) {
      const int64_t begin = ld(a.document_offsets + b), stop = ld(a.document_offsets + b + 1);
      if (begin >= a.column_end) break;
      if (begin == stop || stop > a.column_end || first >= last) continue;
      const int64_t column = begin > a.first_column ? begin - a.first_column : 0;
      float total = 0;
      for (int64_t i = first; i < last; ++i) {
        total += ld(a.tile + (i - a.first_row) * a.stride + column);
      }
      float* score = a.scores + q * a.documents + b;
      st(score, ld(score) + total);
    }
  }
}

// ---- gradients ---------------------------------------------------------------------------------

#define GRADIENT_FIELDS(F)                                                                 \
  F(const float*, grad)     /* [queries, documents] */                                     \
  F(const int32_t*, index)  /* [query tokens, documents] */                                \
  F(const int64_t*, owners) /* [query tokens] the query of each */                         \
  F(const void*, tokens)    /* [.., d] documents' for dqueries, queries' for ddocuments */ \
  F(int64_t, stride)                                                                       \
  F(const int64_t*, offsets)        /* [documents + 1] */                                  \
  F(const int64_t*, tile_documents) /* [tiles] the document of each; documents: none */    \
  F(const int64_t*, tile_ends)      /* [documents] tiles up to and with a document's */    \
  F(int64_t, tiles)                                                                        \
  F(void*, out) /* [.., d] dense */                                                        \
  F(int64_t, query_tokens) F(int64_t, documents) F(int64_t, d) F(int32_t, type)
FL_ARGUMENTS(MaxsimGradientArguments, GRADIENT_FIELDS)

// With the blocks of a processor named, ptxas does not spill to make room for more of them.

// Rows in packs where they are aligned, else element by element.
template <class T, bool kPacked>
struct Row {
  static constexpr int kEach = kPacked ? kPack<T> : 1;
  float sum[kEach] = {};

  FL_DEVICE static Pack<T, kEach> load(const T* row) {
    return ld(reinterpret_cast<const Pack<T, kEach>*>(row));
  }
  // chosen by a selection: a branch would make the sums of several rows an indexed array
  FL_DEVICE void add(const Pack<T, kEach>& v, float by, bool chosen = true) {
    FL_UNROLL
    for (int e = 0; e < kEach; ++e) {
      const float next = sum[e] + by * to_float(v[e]);
      sum[e] = chosen ? next : sum[e];
    }
  }
  FL_DEVICE void store(T* row) const {
    Pack<T, kEach> v;
    for (int e = 0; e < kEach; ++e) v[e] = from_float<T>(sum[e]);
    st(reinterpret_cast<Pack<T, kEach>*>(row), v);
  }
};

// A warp owns a query token: the rows that it chose, document after document.
template <class T, bool kPacked>
FL_KERNEL(kThreads, 4)
query_gradients(MaxsimGradientArguments a) {
  using Part = Row<T, kPacked>;
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  const T* documents = static_cast<const T*>(a.tokens);
  for (int64_t i = warp; i < a.query_tokens; i += int64_t(gridDim.x) * kWarps) {
    const float* grad = a.grad + ld(a.owners + i) * a.documents;
    const int32_t* index = a.index + i * a.documents;
    for (int64_t e = lane * Part::kEach; e < a.d; e += kWarp * Part::kEach) {
      Part part;
      FL_ROLLED  // enough warps fit to have rows in flight
          for (int64_t b = 0; b < a.documents; ++b) {
        const int32_t at = ld(index + b);
        if (at < 0) continue;
        const T* row = documents + (ld(a.offsets + b) + at) * a.stride;
        part.add(Part::load(row + e), ld(grad + b));
      }
      part.store(static_cast<T*>(a.out) + i * a.d + e);
    }
  }
}

struct Choices {
  int32_t at[kStaged];
  float grad[kStaged];
};

// A block owns kTileTokens tokens of a document, a warp one after the other: it looks through all
// query tokens' choices, which the block reads once.
template <class T, bool kPacked>
FL_KERNEL(kThreads, 4)
document_gradients(MaxsimGradientArguments a) {
  using Part = Row<T, kPacked>;
  FL_SHARED(Choices, shared);
  constexpr int kEach = kTileTokens / kWarps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T* queries = static_cast<const T*>(a.tokens);
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t b = ld(a.tile_documents + tile);
    if (b >= a.documents) break;
    const int64_t start = ld(a.offsets + b), length = ld(a.offsets + b + 1) - start;
    // tiles are counted from a document's last: its end is what is stored
    const int64_t behind = ld(a.tile_ends + b) - 1 - tile;
    const int64_t place = ((length + kTileTokens - 1) / kTileTokens - 1 - behind) * kTileTokens;
    for (int64_t e0 = 0; e0 < a.d; e0 += kWarp * Part::kEach) {
      const int64_t e = e0 + lane * Part::kEach;
      Part parts[kEach];
      for (int64_t t0 = 0; t0 < a.query_tokens; t0 += kStaged) {
        __syncthreads();
        for (int k = threadIdx.x; k < kStaged; k += kThreads) {
          const int64_t t = t0 + k;
          const int32_t at = t < a.query_tokens ? ld(a.index + t * a.documents + b) : -1;
          shared.at[k] = at;
          shared.grad[k] = at < 0 ? 0.0f : ld(a.grad + ld(a.owners + t) * a.documents + b);
        }
        __syncthreads();
        for (int k0 = 0; k0 < kStaged && t0 + k0 < a.query_tokens; k0 += kWarp) {
          // choices are places in the document, which int32 holds
          const int32_t own = static_cast<int32_t>(place) + warp * kEach;
          const int32_t mine = shared.at[k0 + lane] - own;
          unsigned who = __ballot_sync(kAllLanes, mine >= 0 && mine < kEach);
          for (; who != 0 && e < a.d; who &= who - 1) {
            const int k = k0 + __ffs(static_cast<int>(who)) - 1;
            const auto row = Part::load(queries + (t0 + k) * a.stride + e);
            const int32_t at = shared.at[k] - own;
            const float by = shared.grad[k];
            FL_UNROLL
            for (int r = 0; r < kEach; ++r) {
              parts[r].add(row, by, at == r);
            }
          }
        }
      }
      FL_UNROLL
      for (int r = 0; r < kEach; ++r) {
        const int64_t token = place + warp * kEach + r;
        if (token < length && e < a.d) {
          parts[r].store(static_cast<T*>(a.out) + (start + token) * a.d + e);
        }
      }
    }
  }
}

// ---- launches ----------------------------------------------------------------------------------

inline int64_t blocks_for(int64_t work) { return grid_of(work, 16); }

int run_maxima(const MaximaArguments& a, Stream stream) {
  const int64_t rows = a.row_end - a.first_row;
  const int error =
      launch(token_maxima, blocks_for((rows + kWarps - 1) / kWarps), kThreads, 0, stream, a);
  if (error) return error;
  return launch(token_sums, blocks_for(a.queries), kThreads, 0, stream, a);
}

template <class T>
bool in_packs(const MaxsimGradientArguments& a) {
  const T* rows = static_cast<const T*>(a.tokens);
  return packs(rows, a.stride) && packs(static_cast<const T*>(a.out), a.d);
}

int run_query_gradients(const MaxsimGradientArguments& a, Stream stream) {
  return with_float_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    const int64_t blocks = blocks_for((a.query_tokens + kWarps - 1) / kWarps);
    const auto kernel = in_packs<T>(a) ? query_gradients<T, true> : query_gradients<T, false>;
    return launch(kernel, blocks, kThreads, 0, stream, a);
  });
}

int run_document_gradients(const MaxsimGradientArguments& a, Stream stream) {
  return with_float_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = in_packs<T>(a) ? document_gradients<T, true> : document_gradients<T, false>;
    return launch(kernel, blocks_for(a.tiles), kThreads, 0, stream, a);
  });
}

FL_EXPORT(maxsim_maxima, MaximaArguments, MAXIMA_FIELDS, run_maxima)
FL_EXPORT(maxsim_query_gradients, MaxsimGradientArguments, GRADIENT_FIELDS, run_query_gradients)
FL_EXPORT(maxsim_document_gradients, MaxsimGradientArguments, GRADIENT_FIELDS,
          run_document_gradients)

}  // namespace fused_losses::cuda::maxsim
