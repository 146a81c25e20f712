// The tile loop of the row statistics, forward and backward, for one instruction set.
//
// Classes go by in tiles; a tile's scores S [class, row] stay in cache, transposed so that sums
// over classes are vertical and the tile is at once the left operand of both gradient products.
// Each thread owns a run of tiles and its own sums; they are merged in a fixed order.
#pragma once

#include "../rows.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kTileBytes = 384 << 10;  // of weights in a tile: 192 classes at d = 512
constexpr int64_t kMostClasses = 384;      // of a tile
constexpr int64_t kBlockRows = 256;        // rows whose scores a tile holds at once
constexpr int64_t kFewTiles = 32;          // that are made alike, for threads to share out
constexpr int64_t kWorthSharing = 96;      // classes of so small a tile that there are four
constexpr int64_t kRowsAtOnce = 64;        // of a task that prepares rows

inline int64_t tile_classes(const Problem& p) {
  if (p.tile) return p.tile;
  const int64_t fit = kTileBytes / (std::max<int64_t>(p.d, 1) * 4) / 12 * 12;
  const int64_t tile = std::clamp<int64_t>(fit, 24, kMostClasses);
  const int64_t most = std::max(p.group, tile / p.group * p.group);
  const int64_t tiles = (p.k + most - 1) / most;
  if (tiles > kFewTiles) return most;
  // whoever has the last tile of few would have less than half of another's work
  const int64_t shares = p.k >= 4 * kWorthSharing ? 4 : p.k >= kWorthSharing ? 2 : 1;
  const int64_t alike = round_up(std::max<int64_t>(tiles, 1), shares);
  const int64_t each = round_up((p.k + alike - 1) / alike, kRows);
  return std::clamp<int64_t>(round_up(each, p.group), p.group, most);
}

// Without wide vectors the host's BLAS, which has its own, multiplies tiles faster than we do.
#if defined(FL_PREFER_BLAS)
constexpr bool kPreferBlas = true;
#else
constexpr bool kPreferBlas = false;
#endif

inline bool uses_blas(const Problem& p) { return kPreferBlas && p.gemm.float32; }

inline void blas(const Problem& p, bool ta, bool tb, int64_t m, int64_t n, int64_t k,
                 const float* a, int64_t lda, const float* b, int64_t ldb, float beta, float* c,
                 int64_t ldc) {
  p.gemm.float32(ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc);
}

inline void blas(const Problem& p, bool ta, bool tb, int64_t m, int64_t n, int64_t k,
                 const double* a, int64_t lda, const double* b, int64_t ldb, double beta, double* c,
                 int64_t ldc) {
  p.gemm.float64(ta, tb, m, n, k, a, lda, b, ldb, beta, c, ldc);
}

// ---- a tile of classes --------------------------------------------------------------------------

template <class PS, class T>
struct TileScratch {
  T* rows;                    // [tile, d] weights where they are not read as they are; comes first
  typename PS::Word* narrow;  // [tile, d words], when products are of pairs
  T* scores;                  // [tile, ld]
  T* inverse;                 // [tile] what a product is multiplied by to be a score
  T* shift;                   // [tile] powers of two that rows have been multiplied by
  T* keep;                    // [block] 1, or 0 at the target of the class at hand
  SplitRoom split;
  int64_t tile, ld;
  bool gathered;  // whether every tile's weights are read from `rows`

  TileScratch(Arena& arena, const Problem& p) {
    tile = tile_classes(p);
    ld = std::min(round_up(p.n, kPanel<PS>), round_up(kBlockRows, kPanel<PS>)) + 16;
    gathered = p.w.type != kNative<T> || (uses_blas(p) && p.ids);
    rows = arena.take<T>(gathered || p.normalize ? tile * p.d : 0);
    narrow = arena.take<typename PS::Word>(PS::kPair == 2 ? tile * words<PS>(p.d) : 0);
    scores = arena.take<T>(tile * ld);
    inverse = arena.take<T>(tile);
    shift = arena.take<T>(tile);
    keep = arena.take<T>(ld);
    split = split_room<PS>(arena, tile, p.n * p.k * p.d);
  }
};

// Whether a sum of squares has lost nothing at either end of the range, nor will its inverse.
template <class T>
inline bool usual(T square) {
  return square >= T(0x1p-40) && square <= T(0x1p40);
}

// Multiplies a row by a power of two, which is exact, so that its largest entry is near 1; returns
// it. A row of zeros, and one with inf, stays as it is.
template <class T>
inline T bring_near_one(T* row, int64_t d) {
  T top = 0;
  for (int64_t e = 0; e < d; ++e) top = std::abs(row[e]) > top ? std::abs(row[e]) : top;
  if (top == 0 || top == std::numeric_limits<T>::infinity()) return 1;
  constexpr int kMost = std::numeric_limits<T>::max_exponent - 2;
  const T factor = std::ldexp(T(1), std::clamp(-std::ilogb(top), -kMost, kMost));
  for (int64_t e = 0; e < d; ++e) row[e] *= factor;
  return factor;
}

// scores[c][i] (+)= <left(c), x_i> for the rows [row0, row0 + rows) of packed x.
template <class PS, bool kAdd, class T, class Left>
inline void multiply_classes(Left&& left, int64_t count, int64_t depth,
                             const typename PS::Word* columns, int64_t row0, int64_t rows,
                             T* scores, int64_t ld, const SplitRoom& split) {
  constexpr int64_t kWide = kPanel<PS>;
  const auto put = [&](T* at, Vector<T> sum, bool add) { store(at, add ? load(at) + sum : sum); };
  const auto of_class = [&](int64_t c, int64_t k) { return left(c) + k; };
  const auto of_rows = [&](int64_t panel, int64_t k) {
    return columns + (row0 + panel * kWide) * depth + k * kWide;
  };
  const auto finish = [&](int64_t c, int64_t panel, int v, Vector<T> sum, bool first) {
    put(scores + c * ld + panel * kWide + v * kLanes<T>, sum, kAdd || !first);
  };
  if (multiply_split<PS>(split, of_class, count, depth, of_rows, rows / kWide, finish)) return;
  for (int64_t i = 0; i < rows; i += kWide) {
    const typename PS::Word* panel = columns + (row0 + i) * depth;
    for (int64_t c = 0; c < count; c += PS::kAtOnce) {
      const typename PS::Word* a[PS::kAtOnce];
      for (int r = 0; r < PS::kAtOnce; ++r) a[r] = left(std::min(c + r, count - 1));
      T* out = scores + c * ld + i;
      const int64_t last = count - c;
      multiply<PS, true>(a, 1, panel, depth, [&](int r, int v, Vector<T> sum) {
        if (r < last) put(out + r * ld + v * kLanes<T>, sum, kAdd);
      });
    }
  }
}

// The classes [first, first + count) with their weights at hand, and the targets among them. With
// `shifted` the rows at hand are those of W times s.shift.
template <class PS, class T>
class Tile {
 public:
  using Scores = PS;
  Tile(const Problem& p, const TileScratch<PS, T>& s, int64_t index)
      : gathered(s.gathered), p_(p), s_(s) {
    first = index * s.tile;
    count = std::min(s.tile, p.k - first);
    const Target* end = p.targets + p.target_count;
    const auto before = [](const Target& t, int64_t at) { return t.position < at; };
    targets = std::lower_bound(p.targets, end, first, before);
    targets_end = std::lower_bound(targets, end, first + count, before);
    for (int64_t c = 0; c < count; ++c) {
      if (gathered) gather(c);
      shifted |= !measure(c);
      narrow(c);
    }
    if (shifted) shift_rows();
  }

  int64_t id(int64_t c) const { return p_.ids ? p_.ids[first + c] : first + c; }

  const T* row(int64_t c) const {
    if (gathered) return s_.rows + c * p_.d;
    return static_cast<const T*>(p_.w.data) + id(c) * p_.w.stride;
  }

  int64_t stride() const { return gathered ? p_.d : p_.w.stride; }

  const typename PS::Word* left(int64_t c) const {
    if constexpr (PS::kPair == 2)
      return s_.narrow + c * words<PS>(p_.d);
    else
      return row(c);
  }

  // scores[c][i] = <w_c, x_i> for the rows [row0, row0 + rows) of packed x.
  void multiply_rows(const typename PS::Word* columns, const T* dense, int64_t row0, int64_t rows,
                     T* scores, int64_t ld) const {
    if constexpr (kPreferBlas) {
      if (uses_blas(p_)) {
        const int64_t real = std::min(rows, p_.n - row0);
        for (int64_t c = 0; c < count; ++c)
          std::fill(scores + c * ld + real, scores + c * ld + rows, T(0));
        return blas(p_, true, false, real, count, p_.d, dense + row0 * p_.d, p_.d, row(0), stride(),
                    T(0), scores, ld);
      }
    }
    multiply_classes<PS, false>([&](int64_t c) { return left(c); }, count, words<PS>(p_.d), columns,
                                row0, rows, scores, ld, s_.split);
  }

  int64_t first, count;
  const Target* targets;
  const Target* targets_end;
  bool gathered, shifted = false;

 private:
  void gather(int64_t c) { read_row(p_.w, id(c), p_.d, s_.rows + c * p_.d); }

  void narrow(int64_t c) {
    if constexpr (PS::kPair == 2) narrow_row<PS>(row(c), p_.d, s_.narrow + c * words<PS>(p_.d));
  }

  // 1/|w|; returns whether it could be taken of the row as it stands.
  bool measure(int64_t c) {
    s_.inverse[c] = s_.shift[c] = 1;
    if (!p_.normalize) return true;
    const T* w = row(c);
    constexpr int64_t kStep = kLanes<T>;
    Vector<T> squares[4] = {};
    int64_t e = 0;
    T rest = 0;
    for (; e + 4 * kStep <= p_.d; e += 4 * kStep) {
      for (int u = 0; u < 4; ++u) {
        const Vector<T> v = load(w + e + u * kStep);
        squares[u] += v * v;
      }
    }
    for (; e < p_.d; ++e) rest += w[e] * w[e];
    const T square = sum<T>((squares[0] + squares[1]) + (squares[2] + squares[3])) + rest;
    s_.inverse[c] = square == 0 ? T(0) : T(1) / std::sqrt(square);
    return usual(square);
  }

  // Rows of unusual length by powers of two, in copies.
  void shift_rows() {
    for (int64_t c = 0; !gathered && c < count; ++c) gather(c);
    gathered = true;
    for (int64_t c = 0; c < count; ++c) {
      const T inverse = s_.inverse[c];
      if (inverse >= T(0x1p-20) && inverse <= T(0x1p20)) continue;
      const T factor = bring_near_one(s_.rows + c * p_.d, p_.d);
      measure(c);
      s_.shift[c] = factor;
      narrow(c);
    }
  }

  const Problem& p_;
  const TileScratch<PS, T>& s_;
};

// Whether x lies in memory as kernels read it: in type T, row after row.
template <class T>
inline bool lies_dense(const Problem& p) {
  return p.x.data && p.x.type == kNative<T> && p.x.stride == p.d;
}

// x in type T, row after row, shared by the threads.
template <class T>
inline const T* dense_rows(const Problem& p, T* buffer) {
  for (int64_t i = 0; i < p.n; ++i) read_row(p.x, i, p.d, buffer + i * p.d);
  return buffer;
}

// The same where it lies, or in the buffer, and as the operand of S; a run of rows at a time.
template <class PS, class T>
inline void pack_rows_of_x(const Problem& p, T* dense, int64_t padded, typename PS::Word* columns,
                           const Parallel& parallel) {
  constexpr int64_t kWide = kPanel<PS>;
  const int64_t step = round_up(kRowsAtOnce, kWide), depth = words<PS>(p.d);
  const bool there = lies_dense<T>(p);
  on_tasks(parallel, (padded + step - 1) / step, [&](int, int64_t task) {
    const int64_t row0 = task * step, end = std::min(row0 + step, p.n);
    for (int64_t i = row0; !there && i < end; ++i) read_row(p.x, i, p.d, dense + i * p.d);
    const T* x = there ? static_cast<const T*>(p.x.data) : dense;
    pack_columns<PS>(x + row0 * p.d, std::max<int64_t>(end - row0, 0), p.d, p.d,
                     std::min(step, padded - row0), columns + row0 * depth);
  });
}

inline int64_t padded_rows(int64_t n, int64_t panel) {
  return round_up(std::max<int64_t>(n, 1), panel);
}

inline void tiles_of(int64_t run, int runs, int64_t tiles, int64_t* begin, int64_t* end) {
  *begin = tiles * run / runs;
  *end = tiles * (run + 1) / runs;
}

// Products kept by the forward for class c of a tile, or null.
template <class T>
inline T* kept_scores(const Problem& p, int64_t first, int64_t count) {
  if (first + count > p.kept_classes) return nullptr;
  return static_cast<T*>(p.kept) + first * round_up(p.n, kKeptPadding);
}

// ---- what becomes of a score before the bias: psi of a row, and a gradient through it -----------

template <class T>
struct Straight {
  Vector<T> psi(Vector<T> raw, int64_t) const { return raw; }
  T psi(T raw, int64_t) const { return raw; }
  Vector<T> through(Vector<T> g, Vector<T>, int64_t) const { return g; }
};

// Above its threshold t a row's score becomes a polynomial of itself.
template <class T>
struct Bent {
  const T *t, *p, *q, *r;  // [padded] each

  Vector<T> psi(Vector<T> raw, int64_t row) const {
    const Vector<T> above = load(p + row) + (load(q + row) + load(r + row) * raw) * raw;
    return raw > load(t + row) ? above : raw;
  }
  T psi(T raw, int64_t row) const {
    return raw > t[row] ? p[row] + (q[row] + r[row] * raw) * raw : raw;
  }
  Vector<T> through(Vector<T> g, Vector<T> raw, int64_t row) const {
    const Vector<T> above = g * (load(q + row) + T(2) * load(r + row) * raw);
    return raw > load(t + row) ? above : g;
  }
};

// The problem's bends in rows of `padded`, taken from the arena; past n no score is above t.
template <class T>
inline Bent<T> take_bend(Arena& arena, const Problem& p, int64_t padded) {
  if (!p.bend) return {};
  T* rows = arena.take<T>(4 * padded);
  for (int64_t k = 0; arena.base() && k < 4; ++k) {
    const T* from = static_cast<const T*>(p.bend) + k * p.n;
    std::copy(from, from + p.n, rows + k * padded);
    std::fill(rows + k * padded + p.n, rows + (k + 1) * padded,
              k == 0 ? std::numeric_limits<T>::infinity() : T(0));
  }
  return {rows, rows + padded, rows + 2 * padded, rows + 3 * padded};
}

// Calls body with how this problem's scores bend: one branch, outside every loop over scores.
template <class T, class Body>
inline void with_bend(const Bent<T>& bend, Body&& body) {
  bend.t ? body(bend) : body(Straight<T>{});
}

}  // namespace fused_losses::FL_ISA
