// The k best columns of each row (backends/cuda_topk.py): the screen.
//
// The screen is the epilogue of a library product: a tile of products in L2 becomes keys
// m_j <x_i, y_j> + a_j, and whatever beats the worst that a row has kept joins its list, which lies
// in global memory between tiles. A key and its column are one integer, larger for a larger key
// and, of equals, for a lower column: all differ, so that no order of threads changes a list.
#include "lists.h"

namespace fused_losses::cuda::topk {

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

}  // namespace fused_losses::cuda::topk
