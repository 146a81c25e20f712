// Optimiser steps on some rows: one pass over each row's gradient, weight and states.
//
// Tables of the arithmetic's own type are changed where they lie; a block of any other is widened
// into a buffer that stays in the first cache, and rounded back.
#pragma once

#include "../row_update.h"
#include "rows.h"

namespace fused_losses::FL_ISA {

constexpr int64_t kRowBlock = 512;              // columns that are widened at once
constexpr int64_t kRowWork = int64_t(1) << 15;  // elements that are worth a thread

// ---- stochastic rounding, as fused_losses/base/rounding.py has it
// ------------------------------------

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15;

// The start of a row's random words: splitmix64 of the key and of where the row stands.
inline uint32_t row_word(uint64_t key, int64_t row, int table) {
  uint64_t z = key + (static_cast<uint64_t>(row) * 4 + table) * kGolden;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
  return static_cast<uint32_t>(z ^ (z >> 31));
}

inline uint32_t random_word(uint32_t row, uint32_t column) {
  uint32_t h = row + column * 0x9E3779B9u;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}

inline uint16_t stochastic_bf16(float value, uint32_t random) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  const uint32_t up = (bits + (random & 0xffff)) >> 16;
  return static_cast<uint16_t>(value == value ? up : 0x7fc0);
}

inline _Float16 stochastic_half(float value, uint32_t random) {
  constexpr float kMost = 65504;  // above it to the nearest
  const float size = std::abs(value);
  const float cut = size < kMost ? size : kMost;
  uint32_t bits;
  __builtin_memcpy(&bits, &cut, 4);
  // the unit in the last place: subnormal numbers share one
  const uint32_t binade = std::max(bits & 0x7f800000u, 0x38800000u);
  const uint32_t inverse = (254u << 23) - binade;
  float high, low;
  __builtin_memcpy(&high, &binade, 4);
  __builtin_memcpy(&low, &inverse, 4);
  const float units = cut * (low * 0x1p10f) + static_cast<float>(random & 0x1fff) * 0x1p-13f;
  const float up = static_cast<float>(static_cast<int32_t>(units)) * (high * 0x1p-10f);
  return static_cast<_Float16>(size < kMost ? std::copysign(up, value) : value);
}

// n neighbours from a column on.
inline void write_stochastic(void* data, Type type, int64_t n, const float* from, uint32_t column,
                             uint32_t row) {
  if (type == Type::kBFloat16) {
    uint16_t* to = static_cast<uint16_t*>(data);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = stochastic_bf16(from[i], random_word(row, column + static_cast<uint32_t>(i)));
    }
  } else {
    _Float16* to = static_cast<_Float16*>(data);
    for (int64_t i = 0; i < n; ++i) {
      to[i] = stochastic_half(from[i], random_word(row, column + static_cast<uint32_t>(i)));
    }
  }
}

// ---- rows ---------------------------------------------------------------------------------------

inline int64_t bytes_of(Type type) {
  if (type == Type::kFloat64) return 8;
  return type == Type::kFloat32 ? 4 : 2;
}

inline char* place(const RowTable& t, int64_t row, int64_t column) {
  return static_cast<char*>(t.data) + (row * t.stride + column) * bytes_of(t.type);
}

// n neighbours of a table in T: where they lie, or widened into `held`.
template <class T>
inline T* opened(const RowTable& t, int64_t row, int64_t column, int64_t n, T* held) {
  if (!t.data) return nullptr;
  if (t.type == kNative<T>) return reinterpret_cast<T*>(place(t, row, column));
  read_row(Matrix{place(t, row, column), t.type, 0}, 0, n, held);
  return held;
}

// Writes what was widened. table: the number of this one among the row's.
template <class T>
inline void closed(const RowUpdate& p, const RowTable& t, int table, int64_t row, int64_t column,
                   int64_t n, const T* held) {
  if (!t.data || t.type == kNative<T>) return;
  char* to = place(t, row, column);
  if constexpr (sizeof(T) == 4) {
    if (p.stochastic) {
      const uint32_t word = row_word(p.key, row + p.row_offset, table);
      return write_stochastic(to, t.type, n, held, static_cast<uint32_t>(column), word);
    }
  }
  write_row(to, t.type, 0, n, held);
}

// rule(k, n, g, w, a, b) changes n neighbours of the k-th row's weight and states.
template <class T, class Rule>
inline void on_rows(const RowUpdate& p, const Parallel& parallel, const Rule& rule) {
  // several a thread: one that comes late finds less left
  const int64_t most = 8 * static_cast<int64_t>(parallel.threads);
  const int64_t tasks = std::clamp<int64_t>(p.count * p.width / kRowWork, 1, most);
  on_tasks(parallel, tasks, [&](int, int64_t task) {
    alignas(64) T held[2 + kRowStates][kRowBlock];
    for (int64_t k = p.count * task / tasks; k < p.count * (task + 1) / tasks; ++k) {
      const int64_t row = p.rows[k];
      for (int64_t c = 0; c < p.width; c += kRowBlock) {
        const int64_t n = std::min(kRowBlock, p.width - c);
        const RowTable grad = {const_cast<void*>(p.grad.data), p.grad.type, p.grad.stride};
        const T* g = opened(grad, k, c, n, held[0]);
        T* w = opened(p.weight, row, c, n, held[1]);
        T* a = opened(p.states[0], row, c, n, held[2]);
        T* b = opened(p.states[1], row, c, n, held[3]);
        rule(k, n, g, w, a, b);
        closed(p, p.weight, 0, row, c, n, w);
        closed(p, p.states[0], 1, row, c, n, a);
        closed(p, p.states[1], 2, row, c, n, b);
      }
    }
  });
}

// ---- the rules ----------------------------------------------------------------------------------

// 0 leaves out what it multiplies, were it infinite.
template <class T>
inline T part(T factor, T value) {
  return factor == 0 ? T(0) : factor * value;
}

template <class T>
inline void sgd_rows(const RowUpdate& p, const SgdStep& s, const Parallel& parallel) {
  const T lr = T(s.lr), momentum = T(s.momentum), share = T(s.share), decay = T(s.weight_decay);
  const T sign = s.maximize ? -1 : 1;
  const bool nesterov = s.nesterov;
  on_rows<T>(p, parallel,
             [=](int64_t, int64_t n, const T* __restrict g, T* __restrict w, T* __restrict v, T*) {
               if (!v) {
                 for (int64_t i = 0; i < n; ++i) w[i] -= lr * (sign * g[i] + part(decay, w[i]));
                 return;
               }
               for (int64_t i = 0; i < n; ++i) {
                 const T d = sign * g[i] + part(decay, w[i]);
                 v[i] = momentum * v[i] + share * d;
                 w[i] -= lr * (nesterov ? d + momentum * v[i] : v[i]);
               }
             });
}

template <class T>
inline void adamw_rows(const RowUpdate& p, const AdamwStep& s, const Parallel& parallel) {
  const T lr = T(s.lr), share1 = T(s.share1), beta2 = T(s.beta2), share2 = T(s.share2);
  const T root = T(s.root), eps = T(s.eps), decay = T(s.decay), sign = s.maximize ? -1 : 1;
  on_rows<T>(p, parallel,
             [=](int64_t, int64_t n, const T* __restrict g, T* __restrict w, T* __restrict m,
                 T* __restrict v) {
               for (int64_t i = 0; i < n; ++i) {
                 m[i] += share1 * (sign * g[i] - m[i]);
                 v[i] = beta2 * v[i] + share2 * g[i] * g[i];
                 // one change: 1 - decay would round a small one alike in every step
                 w[i] -= lr * m[i] / (std::sqrt(v[i]) * root + eps) + part(decay, w[i]);
               }
             });
}

template <class T>
inline void adagrad_rows(const RowUpdate& p, const AdagradStep& s, const Parallel& parallel) {
  const T eps = T(s.eps), initial = T(s.initial), decay = T(s.decay);
  const T lr = T(s.maximize ? -s.lr : s.lr);
  on_rows<T>(
      p, parallel,
      [=](int64_t, int64_t n, const T* __restrict g, T* __restrict w, T* __restrict sum, T*) {
        for (int64_t i = 0; i < n; ++i) {
          sum[i] += g[i] * g[i];
          w[i] -= lr * g[i] / (std::sqrt(sum[i] + initial) + eps) + part(decay, w[i]);
        }
      });
}

template <class T>
inline void catch_up_rows(const RowUpdate& p, const double* factors, const Parallel& parallel) {
  on_rows<T>(p, parallel,
             [=](int64_t k, int64_t n, const T*, T* __restrict w, T* __restrict v, T*) {
               const double* f = factors + 4 * k;
               const T a = T(f[0]), b = T(f[1]), c = T(f[2]), d = T(f[3]);
               if (!v) {
                 for (int64_t i = 0; i < n; ++i) w[i] += part(a, w[i]);
                 return;
               }
               for (int64_t i = 0; i < n; ++i) {
                 const T old = w[i];
                 w[i] += part(a, old) + part(b, v[i]);
                 v[i] = part(c, old) + part(d, v[i]);
               }
             });
}

template <class Step, void (*kFloat)(const RowUpdate&, Step, const Parallel&),
          void (*kDouble)(const RowUpdate&, Step, const Parallel&)>
inline void by_type(const RowUpdate& p, Step step, const Parallel& parallel) {
  (p.weight.type == Type::kFloat64 ? kDouble : kFloat)(p, step, parallel);
}

constexpr RowUpdateKernels row_update_table() {
  return {by_type<const SgdStep&, sgd_rows<float>, sgd_rows<double>>,
          by_type<const AdamwStep&, adamw_rows<float>, adamw_rows<double>>,
          by_type<const AdagradStep&, adagrad_rows<float>, adagrad_rows<double>>,
          by_type<const double*, catch_up_rows<float>, catch_up_rows<double>>};
}

}  // namespace fused_losses::FL_ISA
