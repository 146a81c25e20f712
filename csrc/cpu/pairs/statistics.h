// Forward of the sweep over pairs: online maxima, rows and columns from one product.
#pragma once

#include "apart.h"

namespace fused_losses::FL_ISA {

// Exponents this far below the largest of a tile still have their digits in float.
constexpr double kSpread = 60;

// One class's sums over a tile, for one side: value = mass exp(shift), or mass.
template <class T>
struct Sums {
  T *shift, *mass, *total, *count, *best;

  Sums(Arena& arena, int64_t size) {
    shift = arena.take<T>(size);
    mass = arena.take<T>(size);
    total = arena.take<T>(size);
    count = arena.take<T>(size);
    best = arena.take<T>(size);
  }
  Sums at(int64_t i) const {
    Sums out = *this;
    out.shift += i, out.mass += i, out.total += i, out.count += i, out.best += i;
    return out;
  }
};

// The sums so far of a side, [classes][count] each; `mass` becomes the value in the end.
struct Totals {
  double *shift, *mass, *total, *count, *best;
  int64_t size;

  Totals(double* shift_in, double* out, int64_t n) : shift(shift_in), size(n) {
    mass = out + kValue * kClasses * n;
    total = out + kTotal * kClasses * n;
    count = out + kCount * kClasses * n;
    best = out + kBest * kClasses * n;
  }

  void clear() const {
    const int64_t all = kClasses * size;
    for (double* v : {mass, total, count}) std::fill(v, v + all, 0.0);
    for (double* v : {shift, best}) std::fill(v, v + all, kNone<double>);
  }

  void add(PairClass c, int64_t i, double shift2, double mass2, double factor, bool grew,
           bool lse) const {
    const int64_t k = c * size + i;
    if (!lse) {
      mass[k] += mass2;
    } else if (grew) {
      mass[k] = mass[k] * factor + mass2;
      shift[k] = shift2;
    } else {
      mass[k] += mass2 * factor;
    }
  }

  // Merges sums over [first, first + count).
  template <class T>
  void merge(PairClass c, int64_t first, int64_t count_in, const Sums<T>& s, bool lse) const {
    alignas(64) T away[kTileColumns + 64];
    for (int64_t i = 0; i < count_in && lse; ++i) {
      const double old = shift[c * size + first + i], fresh = s.shift[i];
      // -inf on either side is a sum of nothing: its mass is 0, so any factor will do
      const double apart = old == fresh ? 0.0 : -std::abs(old - fresh);
      away[i] = static_cast<T>(std::max(apart, -700.0));
    }
    for (int64_t i = 0; i < count_in && lse; i += kLanes<T>) store(away + i, exp(load(away + i)));
    for (int64_t i = 0; i < count_in; ++i) {
      const int64_t k = c * size + first + i;
      // a sum of nothing says nothing about the shift
      const bool grew = lse && s.mass[i] != 0 && s.shift[i] > shift[k];
      add(c, first + i, lse ? s.shift[i] : 0, s.mass[i], away[i], grew, lse);
      total[k] += s.total[i];
      count[k] += s.count[i];
      best[k] = std::max(best[k], static_cast<double>(s.best[i]));
    }
  }

  void merge(const Totals& o, bool lse) const {
    for (int64_t k = 0; k < kClasses * size; ++k) {
      const bool grew = lse && o.mass[k] != 0 && o.shift[k] > shift[k];
      const double apart = !lse || o.shift[k] == shift[k] ? 0 : -std::abs(o.shift[k] - shift[k]);
      add(PairClass(k / size), k % size, lse ? o.shift[k] : 0, o.mass[k], std::exp(apart), grew,
          lse);
      total[k] += o.total[k];
      count[k] += o.count[k];
      best[k] = std::max(best[k], o.best[k]);
    }
  }

  void finish() const {
    for (int64_t k = 0; k < kClasses * size; ++k) {
      // log 0 = -inf over no pairs; NaN stays
      mass[k] = mass[k] == 0 ? kNone<double> : shift[k] + std::log(mass[k]);
    }
  }
};

// Sums of a tile's terms z (-inf: not of the class) for both sides, in one pass after the maxima.
// Vectors without a pair of the class are passed over: they would add zeros.
template <class T>
inline void reduce_tile(Reduction reduction, const T* z, int64_t ld, const PairTile& t, bool masked,
                        const Sums<T>* rows, const Sums<T>* columns) {
  constexpr int64_t kStep = kLanes<T>;
  const Vector<T> zero = {}, none = zero + kNone<T>;
  const int64_t wide = round_up(t.columns, kStep);
  alignas(64) T unused[5][kTileColumns + 64];
  T* best_of = columns ? columns->best : unused[0];
  T* total_of = columns ? columns->total : unused[1];
  T* count_of = columns ? columns->count : unused[2];
  T* mass_of = columns ? columns->mass : unused[3];
  T* shift_of = columns ? columns->shift : unused[4];
  for (int64_t j = 0; j < wide; ++j) {
    best_of[j] = kNone<T>;
    total_of[j] = mass_of[j] = 0;
    count_of[j] = masked ? T(0) : static_cast<T>(t.rows);
  }
  T top = kNone<T>, low = std::numeric_limits<T>::infinity();
  for (int64_t i = 0; i < t.rows; ++i) {
    Vector<T> best = none, total = zero, count = zero;
    for (int64_t j = 0; j < wide; j += kStep) {
      const Vector<T> v = load(z + i * ld + j);
      if (masked && !any(v != none)) continue;
      best = larger<T>(v, best);
      store(best_of + j, larger<T>(v, load(best_of + j)));
      Vector<T> term = v;
      if (masked) {
        const Vector<T> member = v == none ? zero : zero + T(1);
        term = v == none ? zero : v;
        count += member;
        store(count_of + j, load(count_of + j) + member);
      }
      total += term;
      store(total_of + j, load(total_of + j) + term);
    }
    const T row_best = largest<T>(best);
    top = std::max(top, row_best);
    if (rows) {
      if (row_best != kNone<T>) low = std::min(low, row_best);
      rows->best[i] = row_best;
      rows->total[i] = sum<T>(total);
      rows->count[i] = masked ? sum<T>(count) : static_cast<T>(t.columns);
    }
  }
  if (reduction != Reduction::kLse) {
    for (int64_t i = 0; i < t.rows; ++i) {
      Vector<T> mass = zero;
      for (int64_t j = 0; j < wide; j += kStep) {
        const Vector<T> v = load(z + i * ld + j);
        if (masked && !any(v != none)) continue;
        const Vector<T> f = pair_rules::map_value<PairMath<T>>(reduction, v);
        mass += f;
        store(mass_of + j, load(mass_of + j) + f);
      }
      if (rows) rows->mass[i] = sum<T>(mass);
    }
    return;
  }
  for (int64_t j = 0; columns && j < t.columns; ++j) {
    if (best_of[j] != kNone<T>) low = std::min(low, best_of[j]);
  }
  const bool shared = top == kNone<T> || low >= top - T(kSpread);
  if (top == kNone<T>) top = 0;
  if (shared) {
    for (int64_t i = 0; i < t.rows; ++i) {
      Vector<T> mass = zero;
      for (int64_t j = 0; j < wide; j += kStep) {
        const Vector<T> v = load(z + i * ld + j);
        if (masked && !any(v != none)) continue;
        const Vector<T> e = exp(v - top);
        mass += e;
        if (columns) store(mass_of + j, load(mass_of + j) + e);
      }
      if (rows) {
        rows->mass[i] = sum<T>(mass);
        rows->shift[i] = top;
      }
    }
    for (int64_t j = 0; j < wide; ++j) shift_of[j] = top;
    return;
  }
  for (int64_t j = 0; j < wide; ++j) shift_of[j] = best_of[j] == kNone<T> ? T(0) : best_of[j];
  for (int64_t i = 0; i < t.rows; ++i) {
    const T shift = rows && rows->best[i] != kNone<T> ? rows->best[i] : T(0);
    Vector<T> mass = zero;
    for (int64_t j = 0; j < wide; j += kStep) {
      const Vector<T> v = load(z + i * ld + j);
      if (masked && !any(v != none)) continue;
      if (rows) mass += exp(v - shift);
      if (columns) store(mass_of + j, load(mass_of + j) + exp(v - load(shift_of + j)));
    }
    if (rows) {
      rows->mass[i] = sum<T>(mass);
      rows->shift[i] = shift;
    }
  }
}

template <class PS, class T>
struct PairForwardPlan {
  int64_t tile_rows, tile_columns, block_rows, block_columns, row_tiles, depth;
  typename PS::Word* left;    // rows of x in words, null: x itself
  typename PS::Word* panels;  // a block of y
  T* held;                    // the block itself, unless it lies in T
  double *row_shift, *column_shift, *column_out;
  T* parts;       // the columns' sums over each row tile of a block, or null
  char* present;  // [row tile][column tile][class]
  KeptTiles<T> kept;
  size_t shared_bytes, part_bytes, thread_bytes;
  char* buffer;

  PairForwardPlan(const PairProblem& p, void* base) : buffer(static_cast<char*>(base)) {
    tile_rows = pair_tile_rows(p.rows.count, p.d);
    tile_columns = pair_tile_columns<PS>(p.columns.count);
    depth = words<PS>(p.d);
    const int64_t n = p.rows.count, m = p.columns.count;
    row_tiles = std::min(kForwardTiles, ceil_div(n, tile_rows));
    block_rows = row_tiles * tile_rows;
    block_columns = even_blocks(m, kBlockColumns, kPanel<PS>);
    Arena arena(base);
    left = arena.take<typename PS::Word>(PS::kPair == 2 ? n * depth : 0);
    panels = arena.take<typename PS::Word>(block_columns * depth);
    held = arena.take<T>(p.stored == Stored::kWide ? 0 : block_columns * p.d);
    row_shift = arena.take<double>(kClasses * n);
    column_shift = arena.take<double>(p.both ? kClasses * m : 0);
    column_out = arena.take<double>(p.both && p.triangle ? kStatistics * kClasses * m : 0);
    Arena one(nullptr);
    Sums<T>(one, block_columns + 64);
    part_bytes = one.used();
    parts = p.both ? arena.take<T>(row_tiles * kClasses * part_bytes / sizeof(T)) : nullptr;
    present = arena.take<char>(row_tiles * (block_columns / kTileColumns + 1) * kClasses);
    kept = KeptTiles<T>(p, tile_rows, block_columns, kPanel<PS>, arena);
    shared_bytes = arena.used();
    Arena scratch(nullptr);
    Thread(scratch, *this, p);
    thread_bytes = scratch.used();
  }

  struct Thread {
    T *products, *terms;
    Code<T>* codes;
    Sums<T> rows;
    SplitRoom split;
    Thread(Arena& arena, const PairForwardPlan& plan, const PairProblem& p)
        : products(arena.take<T>(plan.tile_rows * plan.tile_columns)),
          terms(arena.take<T>(plan.tile_rows * plan.tile_columns)),
          codes(arena.take<Code<T>>(plan.tile_rows * plan.tile_columns)),
          rows(arena, plan.tile_rows + 64),
          split(split_room<PS>(arena, plan.tile_rows, work_of(p))) {}
  };

  Thread thread(int index, const PairProblem& p) const {
    Arena arena(buffer + shared_bytes + index * thread_bytes);
    return Thread(arena, *this, p);
  }

  Sums<T> part(int64_t row_tile, int c) const {
    const int64_t at = (row_tile * kClasses + c) * part_bytes;
    Arena arena(parts ? reinterpret_cast<char*>(parts) + at : nullptr);
    return Sums<T>(arena, block_columns + 64);
  }
};

template <class PS, class T>
size_t pair_forward_bytes(const PairProblem& p, int threads) {
  const PairForwardPlan<PS, T> plan(p, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class PS, class T>
int64_t pair_kept(const PairProblem& p, int64_t most) {
  return PairForwardPlan<PS, T>(p, nullptr).kept.whole(p.rows.count, most);
}

// Sums of each class of a tile whose products (or v) are at hand; calls put(class, rows' sums).
template <class T, class Thread, class Put>
inline void tile_statistics(const PairProblem& p, const PairTile& t, Thread& th, const T* products,
                            int64_t ld, const Sums<T>* columns, Put&& put) {
  if (t.mixed) t.codes(p, th.codes, ld);
  const bool windows = p.rows.window || p.columns.window;
  for (int k = 0; k < kClasses; ++k) {
    const PairClass c = PairClass(k);
    if (!t.mixed && t.pure != c) continue;
    if (t.mixed && c == kPositive && !p.rows.labels) continue;
    const Code<T>* codes = t.mixed ? th.codes : nullptr;
    const bool masked = t.mixed || windows;
    const Sums<T>* own = columns ? columns + k : nullptr;
    // products that are kept stay
    T* z = t.mixed || windows || products != th.products ? th.terms : th.products;
    const Window first = p.rows.window ? Window::kRows : Window::kNone;
    fill_terms<T>(p, t, products, ld, codes, c, first, z, nullptr);
    reduce_tile<T>(p.reduction, z, ld, t, masked, &th.rows, windows ? nullptr : own);
    put(c);
    if (windows && own) {
      const Window second = p.columns.window ? Window::kColumns : Window::kNone;
      fill_terms<T>(p, t, products, ld, codes, c, second, z, nullptr);
      reduce_tile<T>(p.reduction, z, ld, t, masked, nullptr, own);
    }
  }
}

template <class PS, class T>
void pair_forward(const PairProblem& p, const PairForwardOut& out, void* buffer,
                  const Parallel& parallel) {
  using Word = typename PS::Word;
  const PairForwardPlan<PS, T> plan(p, buffer);
  const int64_t n = p.rows.count, m = p.columns.count, d = p.d;
  const bool lse = p.reduction == Reduction::kLse;
  const T* x = static_cast<const T*>(p.rows.data);
  const Totals rows(plan.row_shift, out.rows, n);
  rows.clear();
  const Totals columns(plan.column_shift, p.triangle ? plan.column_out : out.columns,
                       p.both ? m : 0);
  columns.clear();
  const Word* left = plan.left;
  if constexpr (PS::kPair == 2) {
    on_tasks(parallel, ceil_div(n, 64), [&](int, int64_t task) {
      const int64_t i = task * 64;
      narrow_rows<PS>(x + i * d, std::min<int64_t>(64, n - i), d, plan.left + i * plan.depth);
    });
  } else {
    left = x;
  }
  for (int64_t j0 = 0; j0 < m; j0 += plan.block_columns) {
    const int64_t width = std::min(plan.block_columns, m - j0);
    const int64_t panels = ceil_div(width, kPanel<PS>);
    const T* y = block_of(p.stored, p.columns.data, j0, width, d, plan.held, parallel);
    on_tasks(parallel, panels, [&](int, int64_t k) {
      const int64_t j = k * kPanel<PS>;
      pack_panel<PS>(y + j * d, width - j, d, plan.panels + j * plan.depth);
    });
    const int64_t column_tiles = ceil_div(width, kTileColumns);
    for (int64_t i0 = 0; i0 < n && !(p.triangle && i0 >= j0 + width); i0 += plan.block_rows) {
      const int64_t tiles = ceil_div(std::min(plan.block_rows, n - i0), plan.tile_rows);
      std::memset(plan.present, 0, tiles * column_tiles * kClasses);
      on_tasks(parallel, tiles, [&](int thread, int64_t tile) {
        auto th = plan.thread(thread, p);
        const int64_t i = i0 + tile * plan.tile_rows;
        const int64_t tall = std::min(plan.tile_rows, n - i);
        for (int64_t k = 0; k < column_tiles; ++k) {
          const int64_t j = k * kTileColumns;
          const PairTile t(p, i, tall, j0 + j, std::min(kTileColumns, width - j), kPanel<PS>);
          if (t.skip) continue;
          const int64_t ld = round_up(t.columns, kPanel<PS>);
          T* kept = plan.kept.tile(t);
          T* products = kept ? kept : th.products;
          multiply_tile<PS>(left + i * plan.depth, tall, plan.depth, plan.panels + j * plan.depth,
                            ld, products, ld, th.split);
          if (p.apart) {
            mend_tile<T>(p, t, y + j * d, products, ld, th.products, nullptr);
            products = th.products;
          }
          Sums<T> own[kClasses] = {plan.part(tile, 0).at(j), plan.part(tile, 1).at(j)};
          tile_statistics<T>(p, t, th, products, ld, p.both ? own : nullptr, [&](PairClass c) {
            rows.merge(c, i, tall, th.rows, lse);
            plan.present[(tile * column_tiles + k) * kClasses + c] = 1;
          });
        }
      });
      if (!p.both) continue;
      on_tasks(parallel, column_tiles, [&](int, int64_t k) {
        const int64_t j = k * kTileColumns, count = std::min(kTileColumns, width - j);
        for (int64_t tile = 0; tile < tiles; ++tile) {
          for (int c = 0; c < kClasses; ++c) {
            if (!plan.present[(tile * column_tiles + k) * kClasses + c]) continue;
            columns.merge(PairClass(c), j0 + j, count, plan.part(tile, c).at(j), lse);
          }
        }
      });
    }
  }
  if (p.triangle) rows.merge(columns, lse);
  if (!lse) return;
  rows.finish();
  if (p.both && !p.triangle) columns.finish();
}

}  // namespace fused_losses::FL_ISA
