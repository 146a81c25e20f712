// The products that a forward keeps for its backward: the first strips of rows, tile by tile.
#pragma once

#include "tile.h"

namespace fused_losses::FL_ISA {

// A strip is a tile high. Its tiles lie one after the other as they were multiplied; with a
// triangle, from the first one that has a pair on.
template <class T>
struct KeptTiles {
  T* data = nullptr;  // null: nothing is kept
  int64_t* ends;      // [strips + 1] where each strip begins
  int64_t tile_rows, block_columns, columns, wide, capacity;
  bool triangle;

  KeptTiles() = default;
  KeptTiles(const PairProblem& p, int64_t tile_rows_in, int64_t block_columns_in, int64_t panel,
            Arena& arena)
      : data(static_cast<T*>(p.kept)),
        tile_rows(tile_rows_in),
        block_columns(block_columns_in),
        columns(p.columns.count),
        wide(round_up(p.columns.count, panel)),
        capacity(p.kept ? p.kept_count : 0),
        triangle(p.triangle) {
    const int64_t n = p.rows.count, strips = ceil_div(n, tile_rows);
    ends = arena.take<int64_t>(strips + 1);
    if (!data || !arena.base()) return;
    ends[0] = 0;
    for (int64_t s = 0; s < strips; ++s) ends[s + 1] = ends[s] + strip(s * tile_rows, n);
  }

  // How many products the strips have that fit into `most`.
  int64_t whole(int64_t n, int64_t most) const {
    int64_t total = 0;
    for (int64_t i = 0; i < n; i += tile_rows) {
      const int64_t more = strip(i, n);
      if (total + more > most) break;
      total += more;
    }
    return total;
  }

  // Whether no tile of n rows has to be multiplied again.
  bool all(int64_t n) const { return data && ends[ceil_div(n, tile_rows)] <= capacity; }

  // Where a tile's products lie, rows round_up(its columns, panel) apart; null: they are not kept.
  T* tile(const PairTile& t) const {
    const int64_t s = t.row0 / tile_rows;
    if (!data || ends[s + 1] > capacity) return nullptr;
    return data + ends[s] + t.rows * (t.column0 - first(t.row0));
  }

 private:
  int64_t strip(int64_t row0, int64_t n) const {
    return std::min(tile_rows, n - row0) * (wide - first(row0));
  }

  // The first column of the first tile with a pair.
  int64_t first(int64_t row0) const {
    if (!triangle) return 0;
    if (row0 + 1 >= columns) return wide;
    const int64_t block = (row0 + 1) / block_columns * block_columns;
    return block + (row0 + 1 - block) / kTileColumns * kTileColumns;
  }
};

}  // namespace fused_losses::FL_ISA
