// Listed pairs: a line is a sum over its two rows, a gradient's row a sum over its lines in order.
#pragma once

#include <cmath>

#include "../listed.h"
#include "pairs/blocks.h"
#include "sums.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kListedEntries = 1 << 14;  // of a task's lines or rows

inline int64_t listed_step(int64_t d) {
  return std::max<int64_t>(1, kListedEntries / std::max<int64_t>(d, 1));
}

// A row in T: where it lies, or read into `out`.
template <class T>
inline const T* listed_row(const Matrix& m, int64_t row, int64_t d, T* out) {
  if (m.type == kNative<T>) return static_cast<const T*>(m.data) + row * m.stride;
  read_row(m, row, d, out);
  return out;
}

// The lines of each row, in the list's order.
struct Grouped {
  int64_t *start, *line;  // [rows + 1], [lines]

  Grouped(Arena& arena, int64_t rows, int64_t lines) {
    start = arena.take<int64_t>(rows + 2);
    line = arena.take<int64_t>(lines);
  }

  void fill(const int64_t* of, int64_t rows, int64_t lines) {
    // counted two places further on, a start comes to where the next row begins as lines are placed
    std::fill(start, start + rows + 2, 0);
    for (int64_t k = 0; k < lines; ++k) ++start[of[k] + 2];
    for (int64_t i = 2; i < rows + 2; ++i) start[i] += start[i - 1];
    for (int64_t k = 0; k < lines; ++k) line[start[of[k] + 1]++] = k;
  }
};

struct ListedPlan {
  static constexpr int kRoom = 3;  // rows that a thread has
  Grouped by_row, by_column;       // of a backward
  char* threads;
  size_t shared_bytes, thread_bytes;

  ListedPlan(const ListedProblem& p, bool backward, void* base)
      : ListedPlan(p, backward, Arena(base)) {}

  template <class T>
  void rooms(const ListedProblem& p, int thread, T* (&room)[kRoom]) const {
    Arena arena(threads + thread * thread_bytes);
    for (T*& row : room) row = arena.take<T>(p.d);
  }

 private:
  ListedPlan(const ListedProblem& p, bool backward, Arena arena)
      : by_row(arena, p.n, backward ? p.pairs : 0), by_column(arena, p.m, backward ? p.pairs : 0) {
    shared_bytes = arena.used();
    threads = static_cast<char*>(arena.base()) + shared_bytes;
    Arena one(nullptr);
    for (int i = 0; i < kRoom; ++i) one.take<double>(p.d);
    thread_bytes = one.used();
  }
};

inline size_t listed_bytes(const ListedProblem& p, int threads, bool backward) {
  const ListedPlan plan(p, backward, nullptr);
  return plan.shared_bytes + threads * plan.thread_bytes;
}

template <class T>
void listed_forward(const ListedProblem& p, void* score, void* buffer, const Parallel& parallel) {
  const ListedPlan plan(p, false, buffer);
  T* to = static_cast<T*>(score);
  const int64_t step = listed_step(p.d);
  on_tasks(parallel, ceil_div(p.pairs, step), [&](int thread, int64_t task) {
    T* room[ListedPlan::kRoom];
    plan.rooms(p, thread, room);
    for (int64_t k = task * step; k < std::min((task + 1) * step, p.pairs); ++k) {
      const T* x = listed_row(p.x, p.rows[k], p.d, room[0]);
      const T* y = listed_row(p.y, p.columns[k], p.d, room[1]);
      const double sum =
          p.apart ? sum_of<SquaredDifference>(x, y, p.d) : sum_of<Product>(x, y, p.d);
      // a sum of finite rows may overflow; any other with such an entry is no number
      const bool broken = !std::isfinite(sum) && !(all_finite(x, p.d) && all_finite(y, p.d));
      to[k] = broken ? T(NAN) : static_cast<T>(sum);
    }
  });
}

// What a line gives to the row at its one end, from that at its other end.
template <class T>
inline void add_line(const T* row, const T* other, T g, bool apart, int64_t d, T* __restrict sum) {
  if (apart) {
    for (int64_t e = 0; e < d; ++e) sum[e] += 2 * g * (row[e] - other[e]);
  } else {
    for (int64_t e = 0; e < d; ++e) sum[e] += g * other[e];
  }
}

template <class T>
void listed_backward(const ListedProblem& p, const void* grad, void* dx, void* dy, void* buffer,
                     const Parallel& parallel) {
  const T* g = static_cast<const T*>(grad);
  ListedPlan plan(p, true, buffer);
  if (dx) plan.by_row.fill(p.rows, p.n, p.pairs);
  if (dy || p.own) plan.by_column.fill(p.columns, p.m, p.pairs);
  const int64_t step = listed_step(p.d);
  const auto side = [&](const Matrix& of, int64_t count, void* out, bool as_row, bool as_column) {
    on_tasks(parallel, ceil_div(count, step), [&](int thread, int64_t task) {
      T* room[ListedPlan::kRoom];
      plan.rooms(p, thread, room);
      T* const sum = room[2];
      for (int64_t i = task * step; i < std::min((task + 1) * step, count); ++i) {
        const T* row = listed_row(of, i, p.d, room[0]);
        std::fill(sum, sum + p.d, T(0));
        const auto add = [&](const Grouped& lines, const Matrix& others, const int64_t* at) {
          for (int64_t l = lines.start[i]; l < lines.start[i + 1]; ++l) {
            const int64_t k = lines.line[l];
            add_line(row, listed_row(others, at[k], p.d, room[1]), g[k], p.apart, p.d, sum);
          }
        };
        if (as_row) add(plan.by_row, p.y, p.columns);
        if (as_column) add(plan.by_column, p.x, p.rows);
        write_row(out, of.type, i * p.d, p.d, sum);
      }
    });
  };
  if (dx) side(p.x, p.n, dx, true, p.own);
  if (dy) side(p.y, p.m, dy, false, true);
}

}  // namespace fused_losses::FL_ISA
