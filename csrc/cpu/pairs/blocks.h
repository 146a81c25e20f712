// Blocks and tiles of the sweep over pairs: how the work is cut, packed and multiplied.
//
// A tile of scores stays in L2, a block of tiles of G in L3. Columns' blocks are the outer loop:
// their operands are packed once. Products lie as
//   S  = X Y^T     left: rows of X               right: panels of Y's rows (transposed)
//   dX = G Y       left: G by rows, in panels    right: panels of Y's columns
//   dY = (X^T G)^T left: rows of X^T             right: G in panels, as it lies
#pragma once

#include <algorithm>
#include <cstring>

#include "../../pairs.h"
#include "../rows.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kTileColumns = 256;
constexpr int64_t kBlockColumns = 1024;
constexpr int64_t kBackwardRows = 2112;        // of G in a block: 8.3 MiB of float
constexpr int64_t kForwardTiles = 64;          // row tiles of a forward block
constexpr int64_t kDepthChunk = 512;           // inner words of a gradient's product at a time
constexpr int64_t kPairTileBytes = 384 << 10;  // of X in a tile

inline int64_t pair_tile_rows(int64_t d) {
  const int64_t fit = kPairTileBytes / (std::max<int64_t>(d, 1) * 4) / 12 * 12;
  return std::clamp<int64_t>(fit, 24, 192);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The same for n rows: few are one tile, somewhat more are four, which threads share evenly.
inline int64_t pair_tile_rows(int64_t n, int64_t d) {
  const int64_t most = pair_tile_rows(d), tiles = n <= most / 2 ? 1 : 4;
  return std::min(most, round_up(std::max<int64_t>(1, ceil_div(n, tiles)), 12));
}

// Columns of the widest tile, as its buffers have them.
template <class P>
inline int64_t pair_tile_columns(int64_t m) {
  return std::min(kTileColumns, round_up(std::max<int64_t>(1, m), kPanel<P>));
}

// The size of blocks, at most `most` and a multiple of `unit`, that cut `count` evenly.
inline int64_t even_blocks(int64_t count, int64_t most, int64_t unit) {
  const int64_t blocks = std::max<int64_t>(1, ceil_div(count, most));
  return std::max(unit, round_up(ceil_div(count, blocks), unit));
}

// Rows [first, first + count) in T: where they lie, or read into `held`.
template <class T>
inline const T* block_of(Stored stored, const void* data, int64_t first, int64_t count, int64_t d,
                         T* held, const Parallel& parallel) {
  if (stored == Stored::kWide) return static_cast<const T*>(data) + first * d;
  on_tasks(parallel, ceil_div(count, 64), [&](int, int64_t task) {
    const int64_t i = task * 64;
    read_rows(stored, data, first + i, std::min<int64_t>(64, count - i), d, held + i * d);
  });
  return held;
}

// out[c][r] = in[r][c]; of the rows only `real` exist, the others are zero.
template <class Word>
inline void transpose(const Word* in, int64_t real, int64_t rows, int64_t columns, int64_t ld,
                      Word* out, int64_t ld_out) {
  for (int64_t r = 0; r < rows; r += 16) {
    for (int64_t c = 0; c < columns; c += 16) {
      if (r + 16 <= real && c + 16 <= columns) {
        transpose16(in + r * ld + c, ld, out + c * ld_out + r, ld_out);
        continue;
      }
      for (int64_t k = c; k < std::min(c + 16, columns); ++k) {
        for (int64_t i = r; i < std::min(r + 16, rows); ++i) {
          out[k * ld_out + i] = i < real ? in[i * ld + k] : Word(0);
        }
      }
    }
  }
}

constexpr int64_t kTurnedRows = 64;

// Rows of X as columns of X^T, in words along the rows; at most kTurnedRows of them.
template <class P, class T>
inline void turn_rows(const T* in, int64_t rows, int64_t d, typename P::Word* out, int64_t ld_out) {
  using Word = typename P::Word;
  if constexpr (P::kPair == 1) {
    transpose(in, rows, rows, d, d, out, ld_out);
  } else {
    constexpr int64_t kColumns = 128;
    Word piece[kTurnedRows / 2 * kColumns];
    for (int64_t c = 0; c < d; c += kColumns) {
      const int64_t wide = std::min(kColumns, d - c);
      for (int64_t r = 0; r < rows; r += 2) {
        const T* first = in + r * d + c;
        const T* second = r + 1 < rows ? first + d : nullptr;
        interleave_row<P>(first, second, wide, piece + r / 2 * kColumns);
      }
      transpose(piece, words<P>(rows), words<P>(rows), wide, kColumns, out + c * ld_out, ld_out);
    }
  }
}

// Rows in words along them: the left operand of S, when words are not elements.
template <class P, class T>
inline void narrow_rows(const T* in, int64_t rows, int64_t d, typename P::Word* out) {
  for (int64_t i = 0; i < rows; ++i) narrow_row<P>(in + i * d, d, out + i * words<P>(d));
}

// One panel of pack_columns: rows [0, kWide) of x, transposed; past n they are zero.
template <class P, int64_t kWide = kPanel<P>, class T>
inline void pack_panel(const T* x, int64_t n, int64_t d, typename P::Word* out) {
  using Word = typename P::Word;
  constexpr int64_t kPiece = 64;
  const int64_t real = std::min(kWide, n);
  if constexpr (P::kPair == 1) {
    transpose(x, real, kWide, d, d, out, kWide);
  } else {
    Word piece[kWide * kPiece];
    for (int64_t k = 0; k < words<P>(d); k += kPiece) {
      const int64_t e = k * P::kPair, wide = std::min(kPiece * P::kPair, d - e);
      for (int64_t i = 0; i < real; ++i) narrow_row<P>(x + i * d + e, wide, piece + i * kPiece);
      transpose(piece, real, kWide, words<P>(wide), kPiece, out + k * kWide, kWide);
    }
  }
}

// scores[i][j] = <left row i, column j> for a tile; `panels` are packed columns, ld a multiple.
template <class P, class T>
inline void multiply_tile(const typename P::Word* left, int64_t rows, int64_t depth,
                          const typename P::Word* panels, int64_t columns, T* scores, int64_t ld,
                          const SplitRoom& split) {
  constexpr int64_t kWide = kPanel<P>;
  const auto of_row = [&](int64_t i, int64_t k) { return left + i * depth + k; };
  const auto of_panel = [&](int64_t panel, int64_t k) {
    return panels + (panel * depth + k) * kWide;
  };
  const auto finish = [&](int64_t i, int64_t panel, int v, Vector<T> sum, bool first) {
    T* at = scores + i * ld + panel * kWide + v * kLanes<T>;
    store(at, first ? sum : load(at) + sum);
  };
  if (multiply_split<P>(split, of_row, rows, depth, of_panel, ceil_div(columns, kWide), finish)) {
    return;
  }
  for (int64_t j = 0; j < columns; j += kWide, panels += depth * kWide) {
    for (int64_t i = 0; i < rows; i += P::kAtOnce) {
      const typename P::Word* a[P::kAtOnce];
      for (int r = 0; r < P::kAtOnce; ++r) a[r] = left + std::min(i + r, rows - 1) * depth;
      T* out = scores + i * ld + j;
      const int64_t last = rows - i;
      multiply<P, true>(a, 1, panels, depth, [&](int r, int v, Vector<T> sum) {
        if (r < last) store(out + r * ld + v * kLanes<T>, sum);
      });
    }
  }
}

// Products of a sweep.
inline int64_t work_of(const PairProblem& p) { return p.rows.count * p.columns.count * p.d; }

// The sums that a product will be added to, on their way into the caches while it runs.
template <class P, class T>
[[gnu::always_inline]] inline void prefetch_sums(const T* c, int64_t ld, int64_t rows) {
  for (int64_t r = 0; r < std::min<int64_t>(P::kAtOnce, rows); ++r) {
    for (int64_t e = 0; e < kPanel<P>; e += 64 / sizeof(T)) __builtin_prefetch(c + r * ld + e, 1);
  }
}

// Words between two rows of X^T: chunks of kDepthChunk words then fall into different sets of L2.
inline int64_t turned_stride(int64_t words) {
  if (words <= kDepthChunk) return round_up(words, 16);
  const int64_t chunks = ceil_div(words, kDepthChunk);
  return (chunks | 1) * kDepthChunk;
}

// c[...] += sum for a vector of which only the first `real` lanes exist.
template <class T>
[[gnu::always_inline]] inline void add_lanes(T* c, int64_t real, Vector<T> sum) {
  if (real >= kLanes<T>) {
    store(c, load(c) + sum);
  } else {
    for (int64_t l = 0; l < real; ++l) c[l] += sum[l];
  }
}

// A block of G, as both products want it. By rows: [panel][rows][words of a panel]; by columns:
// [panel][words of rows][panel]. Float words serve both from one buffer.
template <class P>
struct GradientBlock {
  using Word = typename P::Word;
  static constexpr int64_t kWide = kPanel<P>;
  static constexpr int64_t kRun = kWide / P::kPair;
  Word *by_row, *by_column;
  int64_t rows, columns;  // as allocated: multiples of a pair and of a panel

  GradientBlock(Arena& arena, int64_t most_rows, int64_t most_columns) {
    rows = round_up(most_rows, P::kPair);
    columns = round_up(most_columns, kWide);
    by_row = arena.take<Word>(rows * columns / P::kPair);
    by_column = P::kPair == 1 ? by_row : arena.take<Word>(rows / P::kPair * columns);
  }

  // Stores a tile at (row0, column0); rows and columns past the real ones become zero.
  template <class T>
  void put(const T* g, int64_t ld, int64_t row0, int64_t column0, int64_t real_rows,
           int64_t real_columns) {
    const int64_t wide = round_up(real_columns, kWide);
    for (int64_t i = 0; i < real_rows; i += P::kPair) {
      const bool paired = i + 1 < real_rows;
      const T* first = g + i * ld;
      const T* second = P::kPair == 2 && paired ? first + ld : nullptr;
      for (int64_t j = 0; j < wide; j += kWide) {
        const int64_t panel = (column0 + j) / kWide;
        const int64_t real = std::min(kWide, real_columns - j);
        if constexpr (P::kPair == 1) {
          Word* to = by_row + (panel * rows + row0 + i) * kWide;
          std::copy(first + j, first + j + real, to);
          std::fill(to + real, to + kWide, Word(0));
        } else {
          Word* to = by_column + (panel * (rows / 2) + (row0 + i) / 2) * kWide;
          Word* left = by_row + (panel * rows + row0 + i) * kRun;
          put_pairs(first + j, second ? second + j : nullptr, real, to, left, left + kRun);
        }
      }
    }
  }

  void put_zero(int64_t row0, int64_t column0, int64_t real_rows, int64_t real_columns) {
    for (int64_t j = 0; j < real_columns; j += kWide) {
      const int64_t panel = (column0 + j) / kWide;
      Word* left = by_row + (panel * rows + row0) * kRun;
      std::fill(left, left + real_rows * kRun, Word(0));
      if constexpr (P::kPair == 2) {
        Word* to = by_column + (panel * (rows / 2) + row0 / 2) * kWide;
        std::fill(to, to + (real_rows + 1) / 2 * kWide, Word(0));
      }
    }
  }

 private:
  template <class T>
  static void put_pairs(const T* first, const T* second, int64_t real, Word* to, Word* left_first,
                        Word* left_second) {
    int64_t j = 0;
#if defined(__AVX512BF16__)
    if constexpr (P::kPair == 2) {
      if (real == kWide && second) {
        for (; j < kWide; j += 32) {
          const Floats a0 = load(first + j), a1 = load(first + j + 16);
          const Floats b0 = load(second + j), b1 = load(second + j + 16);
          store(to + j, interleave(a0, b0));
          store(to + j + 16, interleave(a1, b1));
          store(left_first + j / 2,
                (Vector<uint32_t>)(__m512i)_mm512_cvtne2ps_pbh((__m512)a1, (__m512)a0));
          store(left_second + j / 2,
                (Vector<uint32_t>)(__m512i)_mm512_cvtne2ps_pbh((__m512)b1, (__m512)b0));
        }
        return;
      }
    }
#endif
    const auto at = [&](const T* row, int64_t k) { return row && k < real ? row[k] : T(0); };
    for (; j < kWide; ++j) to[j] = word<P>(at(first, j), at(second, j));
    for (j = 0; j < kRun; ++j) {
      left_first[j] = word<P>(at(first, 2 * j), at(first, 2 * j + 1));
      if (second) left_second[j] = word<P>(at(second, 2 * j), at(second, 2 * j + 1));
    }
  }
};

// dx[rows of a strip] += G y over the panels [first, last); y packed by columns of d.
template <class P, class T>
inline void add_rows(const GradientBlock<P>& g, int64_t row0, int64_t rows, int64_t first,
                     int64_t last, const typename P::Word* y_panels, int64_t y_words, int64_t d,
                     T* dx, const SplitRoom& split) {
  constexpr int64_t kWide = kPanel<P>, kRun = GradientBlock<P>::kRun;
  const auto of_row = [&](int64_t i, int64_t k) {
    return g.by_row + ((first + k / kRun) * g.rows + row0 + i) * kRun + k % kRun;
  };
  const auto of_panel = [&](int64_t panel, int64_t k) {
    return y_panels + (panel * y_words + first * kRun + k) * kWide;
  };
  const auto finish = [&](int64_t i, int64_t panel, int v, Vector<T> sum, bool) {
    const int64_t c = panel * kWide + v * kLanes<T>;
    add_lanes(dx + i * d + c, d - c, sum);
  };
  if (multiply_split<P, false, kRun>(split, of_row, rows, (last - first) * kRun, of_panel,
                                     ceil_div(d, kWide), finish)) {
    return;
  }
  const int64_t step = kDepthChunk / kRun;
  for (int64_t panel = first; panel < last; panel += step) {
    const int64_t panels = std::min(step, last - panel);
    for (int64_t c = 0; c < d; c += kWide) {
      const typename P::Word* b = y_panels + c / kWide * y_words * kWide + panel * kRun * kWide;
      for (int64_t i = 0; i < rows; i += P::kAtOnce) {
        const typename P::Word* a[P::kAtOnce];
        for (int r = 0; r < P::kAtOnce; ++r) {
          a[r] = g.by_row + (panel * g.rows + row0 + std::min(i + r, rows - 1)) * kRun;
        }
        T* out = dx + i * d + c;
        const int64_t left = rows - i, real = d - c;
        prefetch_sums<P>(out, d, left);
        multiply_runs<P>(a, kRun, g.rows * kRun, panels, b, [&](int r, int v, Vector<T> sum) {
          if (r < left) add_lanes(out + r * d + v * kLanes<T>, real - v * kLanes<T>, sum);
        });
      }
    }
  }
}

// dyt[d0 .. d0 + count)[columns of the panels] += X^T G over rows [0, rows) of the block.
template <class P, class T>
inline void add_columns(const GradientBlock<P>& g, int64_t rows, int64_t first, int64_t last,
                        const typename P::Word* xt, int64_t ld_xt, int64_t d0, int64_t count,
                        T* dyt, int64_t ld, const SplitRoom& split) {
  constexpr int64_t kWide = kPanel<P>;
  const int64_t depth = words<P>(rows), chunk = kDepthChunk;
  const auto of_row = [&](int64_t e, int64_t k) { return xt + (d0 + e) * ld_xt + k; };
  const auto of_panel = [&](int64_t panel, int64_t k) {
    return g.by_column + ((first + panel) * (g.rows / P::kPair) + k) * kWide;
  };
  const auto finish = [&](int64_t e, int64_t panel, int v, Vector<T> sum, bool) {
    T* at = dyt + (d0 + e) * ld + (first + panel) * kWide + v * kLanes<T>;
    store(at, load(at) + sum);
  };
  if (multiply_split<P>(split, of_row, count, depth, of_panel, last - first, finish)) return;
  for (int64_t k = 0; k < depth; k += chunk) {
    const int64_t run = std::min(chunk, depth - k);
    for (int64_t panel = first; panel < last; ++panel) {
      const typename P::Word* b = g.by_column + (panel * (g.rows / P::kPair) + k) * kWide;
      for (int64_t e = 0; e < count; e += P::kAtOnce) {
        const typename P::Word* a[P::kAtOnce];
        for (int r = 0; r < P::kAtOnce; ++r)
          a[r] = xt + (d0 + std::min(e + r, count - 1)) * ld_xt + k;
        T* out = dyt + (d0 + e) * ld + panel * kWide;
        const int64_t left = count - e;
        prefetch_sums<P>(out, ld, left);
        multiply<P, true>(a, 1, b, run, [&](int r, int v, Vector<T> sum) {
          T* to = out + r * ld + v * kLanes<T>;
          if (r < left) store(to, load(to) + sum);
        });
      }
    }
  }
}

}  // namespace fused_losses::FL_ISA
