// Tiles of the two score matrices, class by class beside each other, and sums over their classes.
#pragma once

#include <cmath>

#include "../../rules/divergence.h"
#include "../distances/math.h"
#include "../row_statistics/gradient.h"
#include "runs.h"

namespace fused_losses::FL_ISA {

template <class T>
struct DivergenceMath : DistanceMath<T> {
  static Vector<T> exp(Vector<T> v) { return FL_ISA::exp(v); }
};

// A row's target is apart on both sides: as this score it adds nothing, of any kind.
template <class T>
constexpr T kApart = T(-1e30);

constexpr int64_t kStaged = 16;  // rows of dense scores that are turned at once

// Whether the sides can be near each other coordinate by coordinate: then a difference of scores is
// a product of differences, <x - t, w> + <t, w - wt>, whose rounding is as small as it is itself.
template <class PS>
inline bool may_be_near(const DivergenceProblem& p) {
  return PS::kPair == 1 && !p.dense.data && p.student.d == p.teacher.d &&
         p.student.normalize == p.teacher.normalize;
}

// Squared lengths: a difference below 1/32 of its rows is near, and worth a third product.
template <class T>
inline bool is_small(T difference, T whole) {
  return difference <= whole * T(0x1p-10);
}

// What a thread has beside the two tiles.
template <class T>
struct PairScratch {
  T *student_bias, *teacher_bias, *apart_bias;  // [tile] of each side, and what is between them
  T *student_target, *teacher_target;           // [ld] the targets' scores without bias
  T* apart;                                     // [tile, ld] u - v
  T* staging;                                   // [kStaged, tile] of dense scores
  T* differences;                               // [tile, d] w - wt
  T* inverse_gap;                               // [tile] 1/|w| - 1/|wt|

  PairScratch(Arena& arena, const DivergenceProblem& p, int64_t tile, int64_t ld, bool near) {
    student_bias = arena.take<T>(tile);
    teacher_bias = arena.take<T>(tile);
    apart_bias = arena.take<T>(tile);
    student_target = arena.take<T>(ld);
    teacher_target = arena.take<T>(ld);
    apart = arena.take<T>(tile * ld);
    staging = arena.take<T>(p.dense.data ? kStaged * round_up(tile, 16) : 0);
    differences = arena.take<T>(near ? tile * p.student.d : 0);
    inverse_gap = arena.take<T>(near ? tile : 0);
  }
};

// Calls body(a pointer of the scores' own type).
template <class Body>
inline void with_dense(const DenseScores& m, Body&& body) {
  if (m.type == Type::kFloat64) return body(static_cast<const double*>(m.data));
  if (m.type == Type::kFloat32) return body(static_cast<const float*>(m.data));
  if (m.type == Type::kFloat16) return body(static_cast<const _Float16*>(m.data));
  body(static_cast<const uint16_t*>(m.data));  // bfloat16
}

template <class T, class From>
inline T widened(From v) {
  if constexpr (sizeof(From) == 2 && std::is_integral_v<From>) return from_bf16(v);
  return static_cast<T>(v);
}

template <class T>
inline T scale_of(const DenseScores& m, int64_t row) {
  return m.scale ? static_cast<const T*>(m.scale)[row] : T(1);
}

// Classes [tile.first, tile.first + count) of row i, as they are.
template <class T, class Tile>
inline void read_dense(const DenseScores& m, const Tile& tile, int64_t i, T* out) {
  with_dense(m, [&](const auto* data) {
    const auto* row = data + i * m.row_stride;
    for (int64_t c = 0; c < tile.count; ++c) {
      out[c] = widened<T>(row[tile.id(c) * m.column_stride]);
    }
  });
}

// Both sides' rows, packed and plain; those of x - t are null unless they are near.
template <class PS, class T>
struct PairRows {
  const typename PS::Word* columns;
  const T* dense;
  const typename PS::Word* teacher_columns;
  const T* teacher_dense;
  const typename PS::Word* apart_columns = nullptr;
  const T* apart_dense = nullptr;
};

// Room for x - t where it may be wanted.
template <class PS, class T>
struct DifferenceRows {
  typename PS::Word* columns;
  T* dense;

  DifferenceRows(Arena& arena, const DivergenceProblem& p, int64_t padded) {
    const bool near = may_be_near<PS>(p);
    columns = arena.take<typename PS::Word>(near ? padded * p.student.d : 0);
    dense = arena.take<T>(near ? p.student.n * p.student.d : 0);
  }

  // Puts x - t into `rows` if it is small.
  void add_to(PairRows<PS, T>& rows, const DivergenceProblem& p, int64_t padded) const {
    if (!may_be_near<PS>(p)) return;
    const int64_t n = p.student.n, d = p.student.d;
    double small = 0, whole = 0;
    for (int64_t i = 0; i < n * d; ++i) {
      const double x = rows.dense[i];
      dense[i] = rows.dense[i] - rows.teacher_dense[i];
      small += double(dense[i]) * dense[i];
      whole += x * x;
    }
    if (!is_small(small, whole)) return;
    pack_columns<PS>(dense, n, d, d, padded, columns);
    rows.apart_columns = columns;
    rows.apart_dense = dense;
  }
};

// What `score` does with the scores that the problem keeps.
enum class Kept { kWritten, kRead };

// The same classes on both sides, with the scores of a block of rows.
template <class PS, class T>
class TilePair {
 public:
  TilePair(const DivergenceProblem& p, const PairRows<PS, T>& x, const TileScratch<PS, T>& s,
           const TileScratch<PS, T>& t, const PairScratch<T>& own, int64_t index, Kept kept)
      : student(p.student, s, index),
        teacher(p.teacher, t, index),
        u(s.scores),
        v(t.scores),
        apart(own.apart),
        ld(s.ld),
        p_(p),
        x_(x),
        s_(s),
        t_(t),
        own_(own),
        kept_u_(kept_scores<T>(p.student, student.first, student.count)),
        kept_teacher_(kept_scores<T>(p.teacher, student.first, student.count)),
        read_(kept == Kept::kRead && kept_u_) {
    for (int64_t c = 0; c < student.count; ++c) {
      const T bias = bias_of<T>(p.student, student.id(c));
      own.student_bias[c] = bias;
      own.teacher_bias[c] = bias_of<T>(p.teacher, student.id(c));
      own.apart_bias[c] = bias - own.teacher_bias[c];
    }
    if (x.apart_columns && !student.shifted && !teacher.shifted) compare_weights();
  }

  // u, v and u - v without bias of the rows [row0, row0 + rows), targets apart. The same steps on
  // both sides: equal inputs are 0 apart. No score is made of another that may be longer.
  void score(int64_t row0, int64_t rows) const {
    const int64_t kept_ld = round_up(p_.student.n, kKeptPadding);
    if (read_) {
      copy(kept_u_ + row0, kept_ld, u, ld, rows);
    } else {
      student.multiply_rows(x_.columns, x_.dense, row0, rows, u, ld);
    }
    T* product = near_ ? apart : v;
    if (read_ && kept_teacher_) {
      copy(kept_teacher_ + row0, kept_ld, product, ld, rows);
    } else if (near_) {
      subtract_products(row0, rows);
    } else {
      if (p_.dense.data) {
        turn_dense(row0, rows);
      } else {
        teacher.multiply_rows(x_.teacher_columns, x_.teacher_dense, row0, rows, v, ld);
      }
      if (p_.student.normalize && !read_) scale(s_.inverse, u, rows);
      if (p_.teacher.normalize) scale(t_.inverse, v, rows);
    }
    // of what memory holds: in one expression with a factor only one of both would be rounded
    T* difference = near_ ? v : apart;
    each_vector(rows, [&](int64_t, int64_t at) {
      store(difference + at, load(u + at) - load(product + at));
    });
    if (kept_u_ && !read_) copy(u, ld, kept_u_ + row0, kept_ld, rows);
    if (kept_teacher_ && !read_) copy(product, ld, kept_teacher_ + row0, kept_ld, rows);
    each_target(row0, rows, [&](int64_t c, int64_t i) {
      own_.student_target[i] = u[c * ld + i];
      own_.teacher_target[i] = v[c * ld + i];
      u[c * ld + i] = v[c * ld + i] = kApart<T>;
      apart[c * ld + i] = -own_.apart_bias[c];
    });
  }

  // body(class of the tile, row of the block) of each target here.
  template <class Body>
  void each_target(int64_t row0, int64_t rows, Body&& body) const {
    for (const Target* t = student.targets; t != student.targets_end; ++t) {
      const int64_t i = t->row - row0;
      if (i >= 0 && i < rows) body(t->position - student.first, i);
    }
  }

  Tile<PS, T> student, teacher;
  T *u, *v, *apart;
  int64_t ld;

 private:
  template <class Body>
  void each_vector(int64_t rows, Body&& body) const {
    for (int64_t c = 0; c < student.count; ++c) {
      for (int64_t i = 0; i < rows; i += kLanes<T>) body(c, c * ld + i);
    }
  }

  void copy(const T* from, int64_t ld_from, T* to, int64_t ld_to, int64_t rows) const {
    for (int64_t c = 0; c < student.count; ++c) {
      std::copy_n(from + c * ld_from, rows, to + c * ld_to);
    }
  }

  void scale(const T* inverse, T* scores, int64_t rows) const {
    each_vector(rows,
                [&](int64_t c, int64_t at) { store(scores + at, load(scores + at) * inverse[c]); });
  }

  // w - wt, and whether it is small, or nothing.
  void compare_weights() {
    const int64_t d = p_.student.d;
    T small = 0, whole = 0;
    for (int64_t c = 0; c < student.count; ++c) {
      const T *w = student.row(c), *wt = teacher.row(c);
      T* to = own_.differences + c * d;
      Vector<T> squares = {}, longer = {}, of_w = {};
      int64_t e = 0;
      const auto add = [&](Vector<T> a, Vector<T> b) {
        const Vector<T> apart = a - b;
        squares += apart * apart;
        longer += apart * (a + b);
        of_w += a * a;
        return apart;
      };
      for (; e + kLanes<T> <= d; e += kLanes<T>) store(to + e, add(load(w + e), load(wt + e)));
      if (e < d) {
        store_part(to + e, add(load_part(w + e, d - e), load_part(wt + e, d - e)), d - e);
      }
      small += sum<T>(squares);
      whole += sum<T>(of_w);
      const T a = s_.inverse[c], b = t_.inverse[c];
      // 1/|w| - 1/|wt| from |w|^2 - |wt|^2
      own_.inverse_gap[c] = a == 0 || b == 0 ? a - b : -sum<T>(longer) * a * a * b * b / (a + b);
    }
    near_ = is_small(small, whole);
    same_weights_ = small == 0;
  }

  template <bool kAdd>
  void multiply_apart(const typename PS::Word* columns, const T* dense, const T* left,
                      int64_t stride, int64_t row0, int64_t rows) const {
    const int64_t d = p_.student.d, count = student.count;
    if constexpr (kPreferBlas) {
      if (uses_blas(p_.student)) {
        const int64_t real = std::min(rows, p_.student.n - row0);
        for (int64_t c = 0; c < count; ++c) {
          std::fill(apart + c * ld + real, apart + c * ld + rows, T(0));
        }
        return blas(p_.student, true, false, real, count, d, dense + row0 * d, d, left, stride,
                    T(kAdd), apart, ld);
      }
    }
    if constexpr (PS::kPair == 1) {
      const auto rows_of = [&](int64_t c) {
        return left == own_.differences ? left + c * stride : student.row(c);
      };
      multiply_classes<PS, kAdd>(rows_of, count, d, columns, row0, rows, apart, ld, s_.split);
    }
  }

  // u - v = <x - t, w> + <t, w - wt>, and what norms make of it.
  void subtract_products(int64_t row0, int64_t rows) const {
    multiply_apart<false>(x_.apart_columns, x_.apart_dense, student.row(0), student.stride(), row0,
                          rows);
    if (!same_weights_) {
      multiply_apart<true>(x_.teacher_columns, x_.teacher_dense, own_.differences, p_.student.d,
                           row0, rows);
    }
    if (!p_.student.normalize) return;
    each_vector(rows, [&](int64_t c, int64_t at) {
      const Vector<T> product = load(u + at), between = load(apart + at);
      store(apart + at, between * s_.inverse[c] + (product - between) * own_.inverse_gap[c]);
      store(u + at, product * s_.inverse[c]);
    });
  }

  void turn_dense(int64_t row0, int64_t rows) const {
    const int64_t wide = round_up(s_.tile, 16), count = student.count;
    for (int64_t i = 0; i < rows; i += kStaged) {
      for (int64_t r = 0; r < kStaged; ++r) {
        T* at = own_.staging + r * wide;
        const int64_t row = row0 + i + r;
        if (row >= p_.student.n) {
          std::fill_n(at, count, T(0));
          continue;
        }
        read_dense(p_.dense, student, row, at);
        const T factor = scale_of<T>(p_.dense, row);
        for (int64_t c = 0; c < count; ++c) at[c] *= factor;
      }
      for (int64_t c = 0; c < count; c += 16) {
        if (c + 16 <= count) {
          transpose16(own_.staging + c, wide, v + c * ld + i, ld);
          continue;
        }
        for (int64_t at = c; at < count; ++at) {
          for (int64_t r = 0; r < kStaged; ++r) v[at * ld + i + r] = own_.staging[r * wide + at];
        }
      }
    }
  }

  const DivergenceProblem& p_;
  const PairRows<PS, T>& x_;
  const TileScratch<PS, T>&s_, &t_;
  const PairScratch<T>& own_;
  // [classes of the tile, padded n] without bias, targets in place; null: not kept
  T *kept_u_, *kept_teacher_;
  bool read_;
  bool near_ = false, same_weights_ = false;
};

inline int64_t pair_tile(const DivergenceProblem& p) {
  const int64_t student = tile_classes(p.student);
  return p.dense.data ? student : std::min(student, tile_classes(p.teacher));
}

// The problem whose sides walk by tiles of one size.
inline DivergenceProblem in_step(DivergenceProblem p) {
  p.student.tile = p.teacher.tile = pair_tile(p);
  return p;
}

// A mean as two T: what is beyond the anchor keeps its own digits where it is so small that the
// whole, rounded twice, has fewer.
template <class T>
inline void split(const Mean& mean, T* high, T* low) {
  constexpr double kSmall = sizeof(T) == 4 ? 0x1p-8 : 1;
  const double whole = mean.value();
  const bool own = static_cast<T>(mean.anchor) == mean.anchor &&
                   std::abs(mean.offset) <= kSmall * std::abs(whole);
  *high = static_cast<T>(own ? mean.anchor : whole);
  *low = static_cast<T>(own ? mean.offset : whole - *high);
}

// Both lse of rows as slopes want them: [padded] each, zeros where a row has no other class, and
// past n what no score comes near.
template <class T>
struct SoftmaxRows {
  T *lse, *teacher_lse, *gap_high, *gap_low;

  SoftmaxRows(Arena& arena, int64_t padded) {
    lse = arena.take<T>(padded);
    teacher_lse = arena.take<T>(padded);
    gap_high = arena.take<T>(padded);
    gap_low = arena.take<T>(padded);
  }

  // between(row): what is between both lse.
  template <class Between>
  void set(int64_t n, int64_t padded, const double* from, const double* teacher_from,
           const Between& between) const {
    for (int64_t i = 0; i < padded; ++i) {
      const bool real = i < n, live = real && from[i] != -std::numeric_limits<double>::infinity();
      lse[i] = live ? static_cast<T>(from[i]) : (real ? T(0) : -kApart<T>);
      teacher_lse[i] = live ? static_cast<T>(teacher_from[i]) : lse[i];
      split(live ? between(i) : Mean{}, gap_high + i, gap_low + i);
    }
  }
};

}  // namespace fused_losses::FL_ISA
