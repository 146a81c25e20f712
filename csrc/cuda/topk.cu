// The k best columns of each row (backends/cuda_topk.py): a screen, and its judge.
//
// The screen is the epilogue of a library product: a tile of products in L2 becomes keys
// m_j <x_i, y_j> + a_j, and whatever beats the worst that a row has kept joins its list, which lies
// in global memory between tiles. A key and its column are one integer, larger for a larger key
// and, of equals, for a lower column: all differ, so that no order of threads changes a list.
// The judge scores chosen columns, or every one, in double from the rows themselves.
#include "warp.h"

namespace fused_losses::cuda::topk {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kBlocks = 4;  // of a multiprocessor: left alone, ptxas spills to fit more
constexpr int32_t kTypeDouble = 4;

enum Kind : int32_t { kDot, kCosine, kSquaredDistance };
enum Match : int32_t { kAny, kSame, kDifferent };

// What leaves a pair out.
#define PAIR_FIELDS(F)                                       \
  F(const int32_t*, x_labels) /* null unless match counts */ \
  F(const int32_t*, y_labels)                                \
  F(const int32_t*, x_ids) /* null: none */                  \
  F(const int32_t*, y_ids)                                   \
  F(const int32_t*, exclude) /* [n, excluded] columns */     \
  F(int64_t, excluded)                                       \
  F(int32_t, match)                                          \
  F(bool, skip_self)

template <class Arguments>
FL_DEVICE bool allowed(const Arguments& a, int64_t i, int64_t j) {
  if (a.skip_self && i == j) return false;
  if (a.x_labels && (ld(a.x_labels + i) == ld(a.y_labels + j)) != (a.match == kSame)) return false;
  if (a.x_ids && ld(a.x_ids + i) == ld(a.y_ids + j)) return false;
  FL_ROLLED
  for (int64_t e = 0; e < a.excluded; ++e) {
    if (ld(a.exclude + i * a.excluded + e) == j) return false;
  }
  return true;
}

// ---- lists in shared memory, best first --------------------------------------------------------

struct WarpTeam {
  static constexpr int kSize = kWarp;
  FL_DEVICE static int rank() { return threadIdx.x % kWarp; }
  FL_DEVICE static void sync() { __syncwarp(); }
};

struct BlockTeam {
  static constexpr int kSize = kThreads;
  FL_DEVICE static int rank() { return threadIdx.x; }
  FL_DEVICE static void sync() { __syncthreads(); }
};

FL_DEVICE bool before(int64_t a, int64_t b) { return a > b; }

// One step of a bitonic network over n entries; runs of `run` alternate in direction.
template <class Team, class Entry>
FL_DEVICE void exchange(Entry* v, int n, int apart, int run) {
  FL_ROLLED
  for (int t = Team::rank(); t < n / 2; t += Team::kSize) {
    const int i = 2 * t - (t & (apart - 1)), j = i + apart;
    const Entry a = v[i], b = v[j];
    if (before(b, a) == ((i & run) == 0)) v[i] = b, v[j] = a;
  }
  Team::sync();
}

// n: a power of two
template <class Team, class Entry>
FL_DEVICE void sort(Entry* v, int n) {
  FL_ROLLED
  for (int run = 2; run <= n; run *= 2) {
    FL_ROLLED
    for (int apart = run / 2; apart > 0; apart /= 2) exchange<Team>(v, n, apart, run);
  }
}

// list [n] = the n best of itself and fresh [count], both sorted; n: a power of two.
template <class Team, class Entry>
FL_DEVICE void merge(Entry* list, int n, const Entry* fresh, int count) {
  FL_ROLLED
  for (int t = Team::rank(); t < n && t < count; t += Team::kSize) {
    if (before(fresh[t], list[n - 1 - t])) list[n - 1 - t] = fresh[t];
  }
  Team::sync();
  // rising, then falling
  FL_ROLLED
  for (int apart = n / 2; apart > 0; apart /= 2) exchange<Team>(list, n, apart, n);
}

// ---- the screen's keys -------------------------------------------------------------------------

constexpr float kInfinity = __builtin_huge_valf();
constexpr float kLowest = -3.4028234663852886e38f;       // the least finite float
constexpr int64_t kNoKey = -0x7f800001ll * (1ll << 32);  // -inf at the column past all others

FL_DEVICE int64_t packed(float key, int64_t column) {
  int32_t bits = __float_as_int(key == 0 ? 0.0f : key);  // -0 is 0
  bits ^= bits >> 31 & 0x7fffffff;
  return static_cast<int64_t>(uint64_t(uint32_t(bits)) << 32 | (0xffffffffu - uint32_t(column)));
}

FL_DEVICE float key_of(int64_t entry) {
  int32_t bits = static_cast<int32_t>(entry >> 32);
  return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff));
}

#define SCREEN_FIELDS(F)                                                 \
  PAIR_FIELDS(F)                                                         \
  F(const float*, product)    /* [rows, stride], a tile; 16-byte rows */ \
  F(const float*, multiplier) /* [columns], null: 1 */                   \
  F(const float*, offset)     /* [columns], null: 0 */                   \
  F(int64_t*, best)           /* [n, parts, keep] */                     \
  F(int64_t*, keys)           /* [rows, stride]; in the place of best */ \
  F(int64_t, stride)                                                     \
  F(int64_t, rows)                                                       \
  F(int64_t, columns)                                                    \
  F(int64_t, first_row) /* of the tile among all */                      \
  F(int64_t, first)     /* column, likewise */                           \
  F(int64_t, span)      /* columns of a part, a multiple of 4 */         \
  F(int32_t, parts)                                                      \
  F(int32_t, keep)                                                       \
  F(int32_t, slots) /* a power of two, `keep` or more */
FL_ARGUMENTS(ScreenArguments, SCREEN_FIELDS)

constexpr int kNeighbours = 4;                  // of a thread, 16 bytes
constexpr int kStep = 2 * kNeighbours * kWarp;  // columns of a warp at a time
constexpr int kFew = 4;                         // candidates that registers hold
constexpr int kWaiting = 64;                    // of a warp, before they are sorted in

// Keys of four neighbours; NaN counts as inf, what is below the finite numbers as the least.
FL_DEVICE void load_keys(const ScreenArguments& a, const float* row, int64_t c, int64_t end,
                         float* z) {
  if (c >= end) {
    for (int e = 0; e < kNeighbours; ++e) z[e] = -kInfinity;
    return;
  }
  const auto product = ld_pack(row + c);
  Pack<float, kNeighbours> m, o;
  if (a.multiplier) m = ld_pack(a.multiplier + c);
  if (a.offset) o = ld_pack(a.offset + c);
  for (int e = 0; e < kNeighbours; ++e) {
    float v = product[e];
    if (a.multiplier) v *= m[e];
    if (a.offset) v += o[e];
    v = v != v ? kInfinity : v < kLowest ? kLowest : v;
    z[e] = c + e < end ? v : -kInfinity;
  }
}

// A part of a row, for one warp.
struct ScreenPart {
  const float* product;
  int64_t* best;
  int64_t row, begin, end;

  FL_DEVICE ScreenPart(const ScreenArguments& a, int64_t item) {
    // what lies in a tile counts in 32 bits
    const int r = int(item) / a.parts, part = int(item) % a.parts;
    row = a.first_row + r;
    product = a.product + int64_t(r) * a.stride;
    best = a.best + (row * a.parts + part) * a.keep;
    begin = part * a.span;
    end = begin + a.span < a.columns ? begin + a.span : a.columns;
  }
};

// The column of this lane's e-th key.
FL_DEVICE int64_t column_of(int64_t step, int e) {
  const int lane = threadIdx.x % kWarp;
  return step + kNeighbours * lane + e % kNeighbours + e / kNeighbours * (kStep / 2);
}

// kStep columns, all loads under way at once.
FL_DEVICE void load_step(const ScreenArguments& a, const ScreenPart& p, int64_t step, float* z) {
  load_keys(a, p.product, column_of(step, 0), p.end, z);
  load_keys(a, p.product, column_of(step, kNeighbours), p.end, z + kNeighbours);
}

// Lists of up to kFew: each lane keeps those of its columns in registers.
FL_KERNEL(kThreads, kBlocks) best_of_few(ScreenArguments a) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t item = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; item < a.rows * a.parts;
       item += warps) {
    const ScreenPart p(a, item);
    int64_t mine[kFew] = {kNoKey, kNoKey, kNoKey, kNoKey};
    if (lane < a.keep) mine[0] = ld(p.best + lane);
    const int64_t worst = __shfl_sync(kAllLanes, mine[0], a.keep - 1);
    float low = key_of(worst);
    bool changed = false;
    for (int64_t step = p.begin; step < p.end; step += kStep) {
      float z[2 * kNeighbours];
      load_step(a, p, step, z);
      for (int e = 0; e < 2 * kNeighbours; ++e) {
        const int64_t at = column_of(step, e);
        if (z[e] < low || at >= p.end) continue;
        const int64_t column = a.first + at, key = packed(z[e], column);
        if (key <= worst || key <= mine[kFew - 1] || !allowed(a, p.row, column)) continue;
        changed = true;
        mine[kFew - 1] = key;
        for (int s = kFew - 1; s > 0; --s) {
          const int64_t upper = mine[s - 1], lower = mine[s];
          mine[s - 1] = lower > upper ? lower : upper;
          mine[s] = lower > upper ? upper : lower;
        }
        const float own = key_of(mine[kFew - 1]);
        low = own > low ? own : low;
      }
    }
    if (!__any_sync(kAllLanes, changed)) continue;
    int64_t found = kNoKey;
    FL_ROLLED
    for (int s = 0; s < a.keep; ++s) {
      const int64_t top = warp_reduce(mine[0], [](int64_t u, int64_t v) { return u > v ? u : v; });
      if (lane == s) found = top;
      if (mine[0] != top) continue;
      for (int t = 0; t < kFew - 1; ++t) mine[t] = mine[t + 1];
      mine[kFew - 1] = kNoKey;
    }
    if (lane < a.keep) st(p.best + lane, found);
  }
}

// Longer lists: in shared memory, with room for keys that wait to be sorted in.
FL_KERNEL(kThreads, kBlocks) best_of_many(ScreenArguments a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t* const list = reinterpret_cast<int64_t*>(dynamic_shared()) + warp * (a.slots + kWaiting);
  int64_t* const waiting = list + a.slots;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t item = int64_t(blockIdx.x) * kWarps + warp; item < a.rows * a.parts; item += warps) {
    const ScreenPart p(a, item);
    FL_ROLLED
    for (int s = lane; s < a.slots; s += kWarp) list[s] = s < a.keep ? ld(p.best + s) : kNoKey;
    __syncwarp();
    int64_t worst = list[a.keep - 1];
    float low = key_of(worst);
    int count = 0;
    bool changed = false;
    const auto sort_in = [&] {
      FL_ROLLED
      for (int s = count + lane; s < kWaiting; s += kWarp) waiting[s] = kNoKey;
      __syncwarp();
      sort<WarpTeam>(waiting, kWaiting);
      merge<WarpTeam>(list, a.slots, waiting, kWaiting);
      worst = list[a.keep - 1];
      low = key_of(worst);
      count = 0;
      changed = true;
    };
    for (int64_t step = p.begin; step < p.end; step += kStep) {
      float z[2 * kNeighbours];
      load_step(a, p, step, z);
      bool hit = false;
      for (int e = 0; e < 2 * kNeighbours; ++e) hit |= z[e] >= low;
      if (!__any_sync(kAllLanes, hit)) continue;
      for (int e = 0; e < 2 * kNeighbours; ++e) {
        const int64_t at = column_of(step, e), column = a.first + at, key = packed(z[0], column);
        const bool joins = at < p.end && key > worst && allowed(a, p.row, column);
        const unsigned who = __ballot_sync(kAllLanes, joins);
        if (joins) waiting[count + __popc(who & ((1u << lane) - 1))] = key;
        count += __popc(who);
        // moved along, not indexed: registers have no addresses
        for (int s = 0; s < 2 * kNeighbours - 1; ++s) z[s] = z[s + 1];
        if (count > kWaiting - kWarp) sort_in();
      }
    }
    if (count > 0) sort_in();
    if (changed) {
      FL_ROLLED
      for (int s = lane; s < a.keep; s += kWarp) st(p.best + s, list[s]);
    }
    __syncwarp();
  }
}

// Every key of the tile, for lists that no kernel holds.
FL_KERNEL(kThreads) every_key(ScreenArguments a) {
  const int64_t packs = (a.columns + kNeighbours - 1) / kNeighbours;
  for (int64_t t = int64_t(blockIdx.x) * kThreads + threadIdx.x; t < a.rows * packs;
       t += int64_t(gridDim.x) * kThreads) {
    const int64_t r = int(t) / int(packs), c = int(t) % int(packs) * kNeighbours;
    float z[kNeighbours];
    load_keys(a, a.product + r * a.stride, c, a.columns, z);
    for (int e = 0; e < kNeighbours && c + e < a.columns; ++e) {
      const int64_t column = a.first + c + e;
      const bool real = allowed(a, a.first_row + r, column);
      st(a.keys + r * a.stride + c + e, real ? packed(z[e], column) : kNoKey);
    }
  }
}

int run_topk_screen(const ScreenArguments& a, Stream stream) {
  if (a.keys) {
    const int64_t blocks = grid_of((a.rows * a.columns + 4 * kThreads - 1) / (4 * kThreads), 16);
    return launch(every_key, blocks, kThreads, 0, stream, a);
  }
  const int64_t blocks = grid_of((a.rows * a.parts + kWarps - 1) / kWarps, 16);
  if (a.keep <= kFew) return launch(best_of_few, blocks, kThreads, 0, stream, a);
  const size_t shared = sizeof(int64_t) * kWarps * (a.slots + kWaiting);
  return launch(best_of_many, blocks, kThreads, shared, stream, a);
}
FL_EXPORT(topk_screen, ScreenArguments, SCREEN_FIELDS, run_topk_screen)

// ---- rows in double ----------------------------------------------------------------------------

FL_DEVICE double to_double(double v) { return v; }
FL_DEVICE double to_double(int8_t v) { return v; }
template <class T>
FL_DEVICE double to_double(T v) {
  return to_float(v);
}

// f(T{}) for any type that rows come in.
template <class F>
int with_row_type(int32_t type, F&& f) {
  if (type == kTypeInt8) return f(int8_t{});
  if (type == kTypeDouble) return f(double{});
  return with_float_type(type, f);
}

FL_DEVICE double load_element(const void* row, int32_t type, int64_t k) {
  switch (type) {
    case kTypeBf16:
      return to_double(ld(static_cast<const Bf16*>(row) + k));
    case kTypeHalf:
      return to_double(ld(static_cast<const Half*>(row) + k));
    case kTypeDouble:
      return ld(static_cast<const double*>(row) + k);
    default:
      return to_double(ld(static_cast<const float*>(row) + k));
  }
}

// How many lanes share a row: as many as have a pack of it.
template <class T>
int sharing(int64_t d) {
  int group = 1;
  while (group < kWarp && int64_t(group) * kPack<T> < d) group *= 2;
  return group;
}

// f(element, its place if the shares of all lanes lay side by side, value) for a lane's share of a
// row: a pack, then the group's next; zeros past the end. The same whether rows are aligned or not.
template <class T, class F>
FL_DEVICE void for_share(const T* row, int64_t d, int group, int part, bool aligned, F f) {
  constexpr int kWide = kPack<T>;
  int64_t place = part;
  for (int64_t k = int64_t(part) * kWide; k < d; k += int64_t(group) * kWide) {
    Pack<T, kWide> v;
    if (aligned && k + kWide <= d) {
      v = ld_pack(row + k);
    } else {
      for (int e = 0; e < kWide; ++e) v[e] = k + e < d ? ld(row + k + e) : T{};
    }
    for (int e = 0; e < kWide; ++e) f(k + e, place + e * group, to_double(v[e]));
    place += int64_t(kWide) * group;
  }
}

// Every lane of a group gets the sum of the group's.
FL_DEVICE double group_sum(double v, int group) {
  FL_ROLLED
  for (int apart = group / 2; apart > 0; apart /= 2) v += __shfl_xor_sync(kAllLanes, v, apart);
  return v;
}

// 1 / |v|, 0 for a row of zeros.
FL_DEVICE double inverse_length(double square) {
#if defined(__CUDA_ARCH__)
  const double inverse = rsqrt(square);  // a root and a quotient call functions, which spill
#else
  const double inverse = 1 / std::sqrt(square);
#endif
  return square <= 1e-24 ? 0.0 : inverse;
}

// ---- what the screen needs of the bank's rows --------------------------------------------------

#define BANK_FIELDS(F)                                               \
  F(const void*, y)       /* [rows, d] */                            \
  F(const float*, center) /* [d], null: 0 */                         \
  F(const float*, scale)  /* [rows], null: 1 */                      \
  F(float*, multiplier)   /* [rows], null: not asked; as the next */ \
  F(float*, offset)                                                  \
  F(double*, longest) /* [parts], max |y - center| so far */         \
  F(double*, squares) /* [rows] |y - center|^2 */                    \
  F(int64_t, stride)                                                 \
  F(int64_t, rows)                                                   \
  F(int64_t, d)                                                      \
  F(int64_t, parts)                                                  \
  F(int32_t, type)                                                   \
  F(int32_t, group)                                                  \
  F(int32_t, kind)                                                   \
  F(bool, largest)
FL_ARGUMENTS(BankArguments, BANK_FIELDS)

struct BankShared {
  double most[kWarps];
};

// A row with NaN is not the longest: it needs no bound, for its key comes before all others.
template <class T>
FL_KERNEL(kThreads)
bank_rows(BankArguments a) {
  FL_SHARED(BankShared, s);
  const T* const y = static_cast<const T*>(a.y);
  const bool aligned = packs(y, a.stride);
  const int lane = threadIdx.x % kWarp, per = kWarp / a.group, part = lane % a.group;
  const int64_t step = int64_t(gridDim.x) * kWarps * per;
  double longest = 0;
  // every lane of a warp takes part in the sums, with a row or without
  for (int64_t base = (int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp) * per; base < a.rows;
       base += step) {
    const int64_t j = base + lane / a.group;
    const bool real = j < a.rows;
    double square = 0;
    if (real) {
      const double scale = a.scale ? ld(a.scale + j) : 1.0;
      for_share(y + j * a.stride, a.d, a.group, part, aligned, [&](int64_t k, int64_t, double v) {
        v *= scale;
        // codes have no center
        if constexpr (sizeof(T) > 1) {
          if (a.center && k < a.d) v -= ld(a.center + k);
        }
        square += v * v;
      });
    }
    square = group_sum(square, a.group);
    if (!real || part != 0) continue;
    if (a.squares) st(a.squares + j, square);
    const double length = std::sqrt(square);
    if (a.multiplier) {
      const double m = a.kind == kCosine ? inverse_length(square) : 1.0;
      st(a.multiplier + j, float(m) * (a.scale ? ld(a.scale + j) : 1.0f));
    }
    if (a.offset) st(a.offset + j, float(a.largest ? square / 2 : -square / 2));
    if (length > longest) longest = length;
  }
  if (a.longest == nullptr) return;
  longest = block_reduce(longest, s.most, [](double u, double v) { return u > v ? u : v; });
  if (threadIdx.x != 0) return;
  double* const mine = a.longest + blockIdx.x;
  if (longest > ld(mine)) st(mine, longest);
}

int run_topk_bank(BankArguments a, Stream stream) {
  return with_row_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    a.group = sharing<T>(a.d);
    const int64_t each = kWarps * (kWarp / a.group);
    const int64_t blocks = (a.rows + each - 1) / each;
    return launch(bank_rows<T>, blocks < a.parts ? blocks : a.parts, kThreads, 0, stream, a);
  });
}
FL_EXPORT(topk_bank, BankArguments, BANK_FIELDS, run_topk_bank)

// ---- the judge: exact scores, and the k best of them -------------------------------------------

// Larger is better; of equals, the lower column.
struct alignas(16) Scored {
  int64_t order, column;
};

constexpr Scored kNothing = {INT64_MIN, INT64_MAX};

FL_DEVICE bool before(const Scored& a, const Scored& b) {
  return a.order > b.order || (a.order == b.order && a.column < b.column);
}

FL_DEVICE int64_t order_of(double score, bool largest) {
  const double v = largest ? score : -score, key = v == 0 ? 0.0 : v;
  int64_t bits;
  memcpy(&bits, &key, 8);
  return bits ^ (bits >> 63 & INT64_MAX);
}

FL_DEVICE double score_of(int64_t order, bool largest) {
  const int64_t bits = order ^ (order >> 63 & INT64_MAX);
  double v;
  memcpy(&v, &bits, 8);
  return largest || v == 0 ? v : -v;
}

#define EXACT_FIELDS(F)                                                        \
  PAIR_FIELDS(F)                                                               \
  F(const void*, x)           /* [n, d] */                                     \
  F(const void*, y)           /* [m, d] */                                     \
  F(const float*, y_scale)    /* [m], null: 1 */                               \
  F(const double*, x_inverse) /* [n] 1 / |x|, with cosine */                   \
  F(const int32_t*, listed)   /* [n, columns], -1: none; null: all of y */     \
  F(const int64_t*, rows)     /* those to do; null: every one */               \
  F(const int64_t*, count)    /* how many of them; null: n */                  \
  F(void*, parts)             /* [n, splits, k] Scored, null with one split */ \
  F(double*, keys)            /* [n, k] */                                     \
  F(int64_t*, index)                                                           \
  F(int64_t, stride_x)                                                         \
  F(int64_t, stride_y)                                                         \
  F(int64_t, n)                                                                \
  F(int64_t, d)                                                                \
  F(int64_t, columns)                                                          \
  F(int64_t, span) /* columns of a split */                                    \
  F(int32_t, splits)                                                           \
  F(int32_t, k)                                                                \
  F(int32_t, slots) /* a power of two, k or more */                            \
  F(int32_t, width) /* columns at a time, a power of two */                    \
  F(int32_t, group)                                                            \
  F(int32_t, places) /* of x in shared memory */                               \
  F(int32_t, x_type)                                                           \
  F(int32_t, y_type)                                                           \
  F(int32_t, kind)                                                             \
  F(bool, largest)
FL_ARGUMENTS(ExactArguments, EXACT_FIELDS)

// The list of a row as keys and indices.
FL_DEVICE void write_best(const ExactArguments& a, int64_t i, const Scored* list) {
  FL_ROLLED
  for (int s = threadIdx.x; s < a.k; s += kThreads) {
    const Scored v = list[s];
    const bool some = v.column != kNothing.column;
    st(a.keys + i * a.k + s, some ? score_of(v.order, a.largest) : double(NAN));
    st(a.index + i * a.k + s, some ? v.column : -1);
  }
}

// A group's score of one column; all lanes of the warp come.
template <class T>
FL_DEVICE double exact_score(const ExactArguments& a, const double* x, int64_t i, int64_t j,
                             bool real) {
  double sum = 0, square = 0;
  if (real) {
    const T* const y = static_cast<const T*>(a.y);
    const double scale = a.y_scale ? ld(a.y_scale + j) : 1.0;
    const bool apart = a.kind == kSquaredDistance;
    for_share(y + j * a.stride_y, a.d, a.group, threadIdx.x % a.group, packs(y, a.stride_y),
              [&](int64_t, int64_t place, double v) {
                const double w = v * scale, u = apart ? x[place] - w : x[place];
                sum += u * (apart ? u : w);
                square += w * w;
              });
  }
  sum = group_sum(sum, a.group);
  if (a.kind != kCosine) return sum;
  return sum * ld(a.x_inverse + i) * inverse_length(group_sum(square, a.group));
}

// A block for a range of a row's columns. Rows beyond `count` cost nothing.
template <class T>
FL_KERNEL(kThreads, kBlocks)
exact_best(ExactArguments a) {
  Scored* const list = reinterpret_cast<Scored*>(dynamic_shared());
  Scored* const fresh = list + a.slots;
  double* const x = reinterpret_cast<double*>(fresh + a.width);  // as for_share places it
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, per = kWarp / a.group;
  const int64_t count = a.count ? ld(a.count) : a.n;
  const int split = int(blockIdx.x) % a.splits;
  for (int64_t nth = int(blockIdx.x) / a.splits; nth < count; nth += int(gridDim.x) / a.splits) {
    const int64_t i = a.rows ? ld(a.rows + nth) : nth;
    FL_ROLLED
    for (int k = threadIdx.x; k < a.places; k += kThreads) {
      const int pack = k / kPack<T>, round = pack / a.group * kPack<T> + k % kPack<T>;
      x[round * a.group + pack % a.group] =
          k < a.d ? load_element(a.x, a.x_type, i * a.stride_x + k) : 0.0;
    }
    FL_ROLLED
    for (int s = threadIdx.x; s < a.slots; s += kThreads) list[s] = kNothing;
    __syncthreads();
    const int64_t begin = int64_t(split) * a.span;
    const int64_t end = begin + a.span < a.columns ? begin + a.span : a.columns;
    for (int64_t base = begin; base < end; base += a.width) {
      bool hit = false;
      const Scored worst = list[a.k - 1];
      for (int first = warp * per; first < a.width; first += kWarps * per) {
        const int at = first + lane / a.group;
        bool real = at < a.width && base + at < end;
        int64_t j = base + at;
        if (real && a.listed) {
          j = ld(a.listed + i * a.columns + j);
          real = j >= 0;
        } else if (real) {
          real = allowed(a, i, j);
        }
        const double score = exact_score<T>(a, x, i, j, real);
        if (lane % a.group != 0 || at >= a.width) continue;
        Scored v = kNothing;
        if (real && score == score) v = {order_of(score, a.largest), j};
        fresh[at] = v;
        hit |= before(v, worst);
      }
      if (!__syncthreads_or(hit)) continue;
      sort<BlockTeam>(fresh, a.width);
      merge<BlockTeam>(list, a.slots, fresh, a.width);
    }
    if (a.parts) {
      Scored* const to = static_cast<Scored*>(a.parts) + (nth * a.splits + split) * a.k;
      FL_ROLLED
      for (int s = threadIdx.x; s < a.k; s += kThreads) st(to + s, list[s]);
    } else {
      write_best(a, i, list);
    }
    __syncthreads();
  }
}

// The best of all splits of a row.
FL_KERNEL(kThreads) merge_splits(ExactArguments a) {
  Scored* const list = reinterpret_cast<Scored*>(dynamic_shared());
  Scored* const fresh = list + a.slots;
  const int64_t count = a.count ? ld(a.count) : a.n;
  for (int64_t nth = blockIdx.x; nth < count; nth += gridDim.x) {
    for (int64_t split = 0; split < a.splits; ++split) {
      const Scored* const from =
          static_cast<const Scored*>(a.parts) + (nth * a.splits + split) * a.k;
      Scored* const to = split == 0 ? list : fresh;
      FL_ROLLED
      for (int s = threadIdx.x; s < a.slots; s += kThreads) {
        to[s] = s < a.k ? ld(from + s) : kNothing;
      }
      __syncthreads();
      if (split > 0) merge<BlockTeam>(list, a.slots, fresh, a.slots);
    }
    write_best(a, a.rows ? ld(a.rows + nth) : nth, list);
    __syncthreads();
  }
}

int run_topk_exact(ExactArguments a, Stream stream) {
  const int code = with_row_type(a.y_type, [&](auto zero) {
    using T = decltype(zero);
    a.group = sharing<T>(a.d);
    a.places = static_cast<int32_t>(round_up(a.d, int64_t(a.group) * kPack<T>));
    const size_t shared = sizeof(Scored) * (a.slots + a.width) + sizeof(double) * a.places;
    const int64_t rows = grid_of(a.n, static_cast<int>((8 + a.splits - 1) / a.splits));
    return launch(exact_best<T>, rows * a.splits, kThreads, shared, stream, a);
  });
  if (code || !a.parts) return code;
  return launch(merge_splits, grid_of(a.n, 8), kThreads, 2 * sizeof(Scored) * a.slots, stream, a);
}
FL_EXPORT(topk_exact, ExactArguments, EXACT_FIELDS, run_topk_exact)
}  // namespace fused_losses::cuda::topk
