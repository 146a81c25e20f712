// Products of float32 in AMX's tile registers: each factor is the sum of three of bfloat16.
//
// x = h + m + l has all of its 24 bits: |m| is at most 2^-8 |x|, |l| 2^-17 |x|. Of the nine
// products three, of m and l, l and m, l and l, are left out: with signs of their own, together at
// most 2^-24 |x y|. The five small ones are summed before the large one, so that a sum is rounded
// as often as in a tile of bfloat16. Where one side's largest is far from 1, a power of two brings
// it there first: parts of what is far below the largest, and no others, fall below what the
// registers hold. What is not finite has no parts and is multiplied as it is.
//
// A piece of each side is split once and meets all of the other's: that is why this takes whole
// blocks of rows and panels, and `multiply` does not.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "product.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kSplitDepth = 512;  // elements of the inner dimension at a time

#if defined(__AMX_BF16__)

template <class P>
constexpr bool kSplits = std::is_same_v<P, Plain<float>>;

constexpr int64_t kSplitFloats = 96 << 10;  // of rows that are split at a time
constexpr int64_t kSplitStep = 32;          // elements of the inner dimension in a register
constexpr int64_t kTileWords = kTileRows * kTileRows;  // words of a register

// products of a call that is worth the fresh memory, and rows of a block that are worth splitting a
// panel for; tests want all split
inline int64_t split_least = int64_t(1) << 26;
constexpr int64_t kSplitRows = 96;

// What a thread splits into. Null where splitting would cost more.
struct SplitRoom {
  uint32_t* left = nullptr;   // [16 rows][kSplitStep elements][part][register]
  uint32_t* right = nullptr;  // of one panel: [kSplitStep elements][part][4 vectors][register]
};

// For blocks of so many rows, in a call of so many products.
template <class P, class Arena>
inline SplitRoom split_room(Arena& arena, int64_t rows, int64_t products) {
  SplitRoom room;
  if (!kSplits<P> || products < split_least || (split_least > 1 && rows < kSplitRows)) return room;
  room.left = arena.template take<uint32_t>(kSplitFloats * 3 / 2);
  room.right = arena.template take<uint32_t>(kSplitDepth * kVectors * kTileRows * 3 / 2);
  return room;
}

// p[0 ... count), zeros after them.
inline Floats load_first(const float* p, int64_t count) {
  if (count >= kTileRows) return load(p);
  const __mmask16 some = static_cast<__mmask16>((1u << std::max<int64_t>(count, 0)) - 1);
  return (Floats)_mm512_maskz_loadu_ps(some, p);
}

// Splits floats, after a power of two, and keeps in mind the largest magnitude of them.
class Splitter {
 public:
  // so that 2^exponent becomes 1
  explicit Splitter(int exponent)
      : scaled_(exponent != 0), power_(broadcast(static_cast<float>(-exponent))) {}

  // parts of x in the high halves of words
  struct Parts {
    Ints part[3];
  };
  [[gnu::always_inline]] Parts operator()(Floats x) {
    constexpr int32_t kHalf = 0x8000, kHigh = static_cast<int32_t>(0xffff0000);
    const Ints magnitude = (Ints)x & 0x7fffffff;
    most_ = magnitude > most_ ? magnitude : most_;
    if (scaled_) x = (Floats)_mm512_scalef_ps((__m512)x, (__m512)power_);
    Parts parts;
    parts.part[0] = ((Ints)x + kHalf) & kHigh;
    const Floats rest = x - (Floats)parts.part[0];
    parts.part[1] = ((Ints)rest + kHalf) & kHigh;
    // of the smallest numbers there is more, which the registers would not hold
    parts.part[2] = (Ints)(rest - (Floats)parts.part[1]) & kHigh;
    return parts;
  }

  // the exponent of the largest, 0 as well where it is near 1; kNone where something is not finite
  static constexpr int kNone = 1 << 20;
  int exponent() const {
    constexpr int kNear = 30;
    int32_t most = 0;
    for (int i = 0; i < kTileRows; ++i) most = std::max(most, most_[i]);
    if (most >= 0x7f800000) return kNone;
    float value;
    __builtin_memcpy(&value, &most, 4);
    const int found = most == 0 ? 0 : std::ilogb(value);
    return std::abs(found) <= kNear ? 0 : found;
  }

 private:
  bool scaled_;
  Floats power_;
  Ints most_ = {};
};

// The first of two in the low half of a word, the second in the high one.
inline Vector<uint32_t> paired(Ints first, Ints second) {
  return (Vector<uint32_t>)first >> 16 | (Vector<uint32_t>)second;
}

// Rows [r0, r0 + 16) and kSplitStep elements from k on of what `left` points at, in registers.
template <bool kTurned, class Left>
inline void split_rows(const Left& left, int64_t r0, int64_t rows, int64_t k, int64_t depth,
                       Splitter& split, uint32_t* out) {
  const int64_t real = std::min<int64_t>(kSplitStep, depth - k);
  if constexpr (kTurned) {
    alignas(64) uint32_t words[3][kTileWords];
    for (int64_t e = 0; e < kSplitStep; e += 2) {
      const auto at = [&](int64_t i) {
        return i < real ? load_first(left(r0, k + i), rows - r0) : Floats{};
      };
      const auto low = split(at(e)), high = split(at(e + 1));
      for (int p = 0; p < 3; ++p) {
        store(words[p] + e / 2 * kTileRows, paired(low.part[p], high.part[p]));
      }
    }
    for (int p = 0; p < 3; ++p) transpose16(words[p], kTileRows, out + p * kTileWords, kTileRows);
    return;
  }
  // the high halves of 32 words, in their order
  alignas(64) static constexpr uint16_t kHighs[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                      23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                      45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i highs = _mm512_load_si512(kHighs);
  for (int r = 0; r < kTileRows; ++r) {
    uint32_t* to = out + r * kTileRows;
    const bool exists = r0 + r < rows;
    const float* from = exists ? left(r0 + r, k) : nullptr;
    const auto low = split(exists ? load_first(from, real) : Floats{});
    const bool more = exists && real > kTileRows;
    const auto high = split(more ? load_first(from + kTileRows, real - kTileRows) : Floats{});
    for (int p = 0; p < 3; ++p) {
      const __m512i word =
          _mm512_permutex2var_epi16((__m512i)low.part[p], highs, (__m512i)high.part[p]);
      store(to + p * kTileWords, (Vector<uint32_t>)word);
    }
  }
}

// kSplitStep elements of a panel, of which `real` exist, in registers.
inline void split_panel(const float* panel, int64_t real, Splitter& split, uint32_t* out) {
  constexpr int64_t kWide = kVectors * kTileRows;
  for (int64_t e = 0; e < kSplitStep; e += 2) {
    for (int v = 0; v < kVectors; ++v) {
      const float* from = panel + e * kWide + v * kTileRows;
      const auto low = split(e < real ? load(from) : Floats{});
      const auto high = split(e + 1 < real ? load(from + kWide) : Floats{});
      for (int p = 0; p < 3; ++p) {
        store(out + (p * kVectors + v) * kTileWords + e / 2 * kTileRows,
              paired(low.part[p], high.part[p]));
      }
    }
  }
}

// fill(split) splits one side; again where its largest is far from 1. Its exponent, or kNone.
template <class Fill>
inline int split_near_one(Fill&& fill) {
  Splitter split(0);
  fill(split);
  const int exponent = split.exponent();
  if (exponent != 0 && exponent != Splitter::kNone) {
    Splitter again(exponent);
    fill(again);
  }
  return exponent;
}

// Products of a part of the left rows with one of the right: registers 4 and 5 with 6 and 7.
template <int kTall>
[[gnu::always_inline]] inline void multiply_parts() {
  multiply_tiles<0, 4, 6>();
  multiply_tiles<1, 4, 7>();
  if constexpr (kTall == 2) {
    multiply_tiles<2, 5, 6>();
    multiply_tiles<3, 5, 7>();
  }
}

// out [32][32]: kTall registers of rows, `next` words apart, against two vectors of a panel.
template <int kTall>
inline void multiply_split_tiles(const uint32_t* left, int64_t next, const uint32_t* right,
                                 int64_t steps, float* out) {
  enum { kHigh, kMiddle, kLow };
  const auto rows = [&](int64_t step, int part) {
    const uint32_t* at = left + (step * 3 + part) * kTileWords;
    load_tile<4>(at, 64);
    if constexpr (kTall == 2) load_tile<5>(at + next, 64);
  };
  const auto columns = [&](int64_t step, int part) {
    const uint32_t* at = right + (step * 3 + part) * kVectors * kTileWords;
    load_tile<6>(at, 64);
    load_tile<7>(at + kTileWords, 64);
  };
  zero_sums<0, 4>();
  for (int64_t step = 0; step < steps; ++step) {
    rows(step, kLow), columns(step, kHigh);
    multiply_parts<kTall>();
    rows(step, kMiddle);
    multiply_parts<kTall>();
    columns(step, kMiddle);
    multiply_parts<kTall>();
    rows(step, kHigh);
    multiply_parts<kTall>();
    columns(step, kLow);
    multiply_parts<kTall>();
  }
  for (int64_t step = 0; step < steps; ++step) {
    rows(step, kHigh), columns(step, kHigh);
    multiply_parts<kTall>();
  }
  constexpr int64_t kRow = 2 * kTileRows * 4;
  store_tile<0>(out, kRow);
  store_tile<1>(out + kTileRows, kRow);
  if constexpr (kTall == 2) {
    store_tile<2>(out + 2 * kTileWords, kRow);
    store_tile<3>(out + 2 * kTileWords + kTileRows, kRow);
  }
}

// Rows [r0, end) with a panel over elements [k0, k1), as they are: what is not finite has no parts.
template <bool kTurned, int64_t kPiece, class Left, class Right, class Finish>
inline void multiply_unsplit(Left&& left, int64_t r0, int64_t end, int64_t k0, int64_t k1,
                             Right&& right, int64_t panel, Finish&& finish) {
  for (int64_t k = k0; k < k1; k += kPiece) {
    for (int64_t r = r0; r < end; r += kRows) {
      const float* a[kRows];
      for (int i = 0; i < kRows; ++i) {
        a[i] = kTurned ? left(r, k) + i : left(std::min(r + i, end - 1), k);
      }
      const int64_t stride = kTurned ? left(r, k + 1) - left(r, k) : 1;
      multiply<Plain<float>, !kTurned>(a, stride, right(panel, k), std::min(kPiece, k1 - k),
                                       [&](int i, int v, Floats sum) {
                                         if (r + i < end) finish(r + i, panel, v, sum, k == 0);
                                       });
    }
  }
}

// finish(row, panel, vector, sum, first) receives sums along the inner dimension, in pieces of
// kPiece or more that are to be added up. left(row, k) points at elements of a row from k on, as
// far as the next multiple of kPiece (kTurned: at element k of this row and those after it, 16 of
// them readable), right(panel, k) at those of a panel. False, and nothing done, where this would
// not pay.
template <class P, bool kTurned = false, int64_t kPiece = kSplitDepth, class Left, class Right,
          class Finish>
inline bool multiply_split(const SplitRoom& room, Left&& left, int64_t rows, int64_t depth,
                           Right&& right, int64_t panels, Finish&& finish) {
  if constexpr (!kSplits<P>) {
    return false;
  } else {
    static_assert(kSplitDepth % kPiece == 0 && kPiece % kSplitStep == 0);
    if (!room.left) return false;
    alignas(64) float sums[4 * kTileWords];
    for (int64_t k0 = 0; k0 < depth; k0 += kSplitDepth) {
      const int64_t k1 = std::min(k0 + kSplitDepth, depth);
      const int64_t steps = (k1 - k0 + kSplitStep - 1) / kSplitStep;
      const int64_t next = steps * 3 * kTileWords;
      const int64_t tall = kSplitFloats / (steps * kSplitStep) / (2 * kTileRows) * (2 * kTileRows);
      for (int64_t r0 = 0; r0 < rows; r0 += tall) {
        const int64_t end = std::min(r0 + tall, rows);
        const int a = split_near_one([&](Splitter& split) {
          for (int64_t r = r0; r < end; r += kTileRows) {
            uint32_t* to = room.left + (r - r0) / kTileRows * next;
            for (int64_t step = 0; step < steps; ++step, to += 3 * kTileWords) {
              split_rows<kTurned>(left, r, end, k0 + step * kSplitStep, k1, split, to);
            }
          }
        });
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int b = a == Splitter::kNone ? a : split_near_one([&](Splitter& split) {
            for (int64_t step = 0; step < steps; ++step) {
              const int64_t k = k0 + step * kSplitStep;
              split_panel(right(panel, k), k1 - k, split,
                          room.right + step * 3 * kVectors * kTileWords);
            }
          });
          if (b == Splitter::kNone) {
            multiply_unsplit<kTurned, kPiece>(left, r0, end, k0, k1, right, panel, finish);
            continue;
          }
          const Floats back = broadcast(static_cast<float>(a + b));
          for (int64_t r = r0; r < end; r += 2 * kTileRows) {
            const uint32_t* own = room.left + (r - r0) / kTileRows * next;
            const int64_t some = std::min<int64_t>(2 * kTileRows, end - r);
            for (int v = 0; v < kVectors; v += 2) {
              const uint32_t* theirs = room.right + v * kTileWords;
              if (some > kTileRows) {
                multiply_split_tiles<2>(own, next, theirs, steps, sums);
              } else {
                multiply_split_tiles<1>(own, next, theirs, steps, sums);
              }
              for (int64_t i = 0; i < some; ++i) {
                for (int half = 0; half < 2; ++half) {
                  Floats sum = load(sums + i * 2 * kTileRows + half * kTileRows);
                  if (a + b != 0) sum = (Floats)_mm512_scalef_ps((__m512)sum, (__m512)back);
                  finish(r + i, panel, v + half, sum, k0 == 0);
                }
              }
            }
          }
        }
      }
    }
    return true;
  }
}

#else

template <class P>
constexpr bool kSplits = false;

struct SplitRoom {};

template <class P, class Arena>
inline SplitRoom split_room(Arena&, int64_t, int64_t) {
  return {};
}

template <class P, bool kTurned = false, int64_t kPiece = kSplitDepth, class Left, class Right,
          class Finish>
inline bool multiply_split(const SplitRoom&, Left&&, int64_t, int64_t, Right&&, int64_t, Finish&&) {
  return false;
}

#endif

}  // namespace fused_losses::FL_ISA
