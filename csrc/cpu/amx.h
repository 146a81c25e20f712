// Products of bfloat16 in AMX's tile registers: 16 rows by up to four vectors of columns.
//
// A register holds 16 rows of 16 words. Packed panels are right operands as they are, rows in words
// along them left ones. A sum goes along the words in the same order wherever its row and its
// column stand.
#pragma once

#include <cstdint>
#include <cstring>

#include "vector.h"

namespace fused_losses::FL_ISA {

constexpr int kTileRows = 16;  // and words of a row

// Shapes the calling thread's registers while it lives. Nobody's shapes outlive a kernel: other
// libraries have their own, and a thread without any is cheaper to switch.
class TileRegisters {
 public:
  TileRegisters() {
    if (users()++ > 0) return;
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shapes;
    asm volatile("ldtilecfg %0" ::"m"(shapes));
  }
  ~TileRegisters() {
    if (--users() == 0) asm volatile("tilerelease");
  }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;

 private:
  static int& users() {
    thread_local int count = 0;
    return count;
  }
};

template <int kTile>
[[gnu::always_inline]] inline void load_tile(const void* rows, int64_t apart) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(apart), "i"(kTile) : "memory");
}

template <int kTile>
[[gnu::always_inline]] inline void store_tile(void* rows, int64_t apart) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(apart), "i"(kTile) : "memory");
}

template <int kTile>
[[gnu::always_inline]] inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kSums, int kLeft, int kRight>
[[gnu::always_inline]] inline void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

// Register v of 0 to 3 has the sums of vector v; 4 the rows, 5 and 6 in turn a vector of columns.
template <int kVector, int kWidth>
[[gnu::always_inline]] inline void multiply_vectors(const uint32_t* right) {
  if constexpr (kVector < kWidth) {
    constexpr int kRight = 5 + kVector % 2;
    load_tile<kRight>(right + kVector * kTileRows, kWidth * kTileRows * 4);
    multiply_tiles<kVector, 4, kRight>();
    multiply_vectors<kVector + 1, kWidth>(right);
  }
}

template <int kVector, int kWidth>
[[gnu::always_inline]] inline void zero_sums() {
  if constexpr (kVector < kWidth) {
    zero_tile<kVector>();
    zero_sums<kVector + 1, kWidth>();
  }
}

template <int kVector, int kWidth>
[[gnu::always_inline]] inline void store_sums(float* sums) {
  if constexpr (kVector < kWidth) {
    store_tile<kVector>(sums + kVector * kTileRows, kWidth * kTileRows * 4);
    store_sums<kVector + 1, kWidth>(sums);
  }
}

// finish(row, vector, sum) receives what 16 rows have with a panel of kWidth vectors. The rows lie
// in `runs` pieces of `run` words, `jump` words apart; b has [runs * run][kWidth vectors].
template <int kWidth, class Finish>
[[gnu::always_inline]] inline void multiply_in_tiles(const uint32_t* const* a, int64_t run,
                                                     int64_t jump, int64_t runs, const uint32_t* b,
                                                     Finish&& finish) {
  constexpr int64_t kWide = kWidth * kTileRows;
  alignas(64) uint32_t left[kTileRows * kTileRows];
  alignas(64) float sums[kTileRows * kWide];
  const uintptr_t first = reinterpret_cast<uintptr_t>(a[0]);
  const uintptr_t apart = reinterpret_cast<uintptr_t>(a[1]) - first;
  bool even = true;
  for (int r = 2; r < kTileRows; ++r) {
    even &= reinterpret_cast<uintptr_t>(a[r]) == first + r * apart;
  }
  zero_sums<0, kWidth>();
  for (int64_t piece = 0; piece < runs; ++piece) {
    const int64_t from = piece * jump;
    int64_t k = 0;
    for (; k + kTileRows <= run; k += kTileRows, b += kTileRows * kWide) {
      if (even) {
        load_tile<4>(a[0] + from + k, static_cast<int64_t>(apart));
      } else {
        for (int r = 0; r < kTileRows; ++r) {
          store(left + r * kTileRows, load(a[r] + from + k));
        }
        load_tile<4>(left, 64);
      }
      multiply_vectors<0, kWidth>(b);
    }
    if (const int64_t rest = run - k) {
      // zeros on both sides, since there may be anything behind, and 0 times anything may be NaN
      alignas(64) uint32_t right[kTileRows * kWide];
      std::memset(left, 0, sizeof left);
      std::memset(right + rest * kWide, 0, (kTileRows - rest) * kWide * 4);
      for (int r = 0; r < kTileRows; ++r) {
        std::memcpy(left + r * kTileRows, a[r] + from + k, rest * 4);
      }
      std::memcpy(right, b, rest * kWide * 4);
      load_tile<4>(left, 64);
      multiply_vectors<0, kWidth>(right);
      b += rest * kWide;
    }
  }
  store_sums<0, kWidth>(sums);
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kWidth; ++v) finish(r, v, load(sums + r * kWide + v * kTileRows));
  }
}

// The products of `steps` rounds that never leave the registers; their FLOPs.
inline double multiply_tiles_alone(int64_t steps) {
  const TileRegisters registers;
  alignas(64) uint32_t ones[kTileRows * kTileRows];
  for (uint32_t& word : ones) word = 0x3f803f80u;
  zero_sums<0, 4>();
  load_tile<4>(ones, 64);
  load_tile<5>(ones, 64);
  for (int64_t step = 0; step < steps; ++step) {
    multiply_tiles<0, 4, 5>();
    multiply_tiles<1, 4, 5>();
    multiply_tiles<2, 4, 5>();
    multiply_tiles<3, 4, 5>();
  }
  return 4.0 * 2 * kTileRows * kTileRows * (2 * kTileRows) * static_cast<double>(steps);
}

}  // namespace fused_losses::FL_ISA
