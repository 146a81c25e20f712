// Rows in any type, packed as products want them; the pieces of a buffer; work on threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#include "../kernels.h"
#include "product.h"
#include "split.h"

namespace fused_losses::FL_ISA {

constexpr double kZeroNorm = 1e-12;

// Hands out 64-byte aligned pieces of one buffer; from null it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base_ + used_;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += round_up(bytes, 64);
#if defined(__SANITIZE_ADDRESS__)
    // behind each piece 64 bytes and more that nobody may touch
    if (bytes > 0) used_ += 64;
    if (base_ && bytes > 0) {
      __asan_unpoison_memory_region(at, bytes);
      __asan_poison_memory_region(at + bytes, base_ + used_ - at - bytes);
    }
#endif
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }
  void* base() const { return base_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Zeros in several pieces, and in what lies between them.
#if defined(__SANITIZE_ADDRESS__)
[[gnu::no_sanitize_address]] inline void clear(char* from, const char* to) {
  for (volatile char* at = from; at != to; ++at) *at = 0;
}
#else
inline void clear(char* from, const char* to) { std::memset(from, 0, to - from); }
#endif

template <class T>
inline void read_row(const Matrix& m, int64_t row, int64_t d, T* out) {
  const int64_t at = row * m.stride;
  if (m.type == Type::kFloat64) {
    const double* from = static_cast<const double*>(m.data) + at;
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<T>(from[i]);
  } else if (m.type == Type::kFloat32) {
    const float* from = static_cast<const float*>(m.data) + at;
    for (int64_t i = 0; i < d; ++i) out[i] = from[i];
  } else if (m.type == Type::kBFloat16) {
    const uint16_t* from = static_cast<const uint16_t*>(m.data) + at;
    for (int64_t i = 0; i < d; ++i) out[i] = from_bf16(from[i]);
  } else if (m.type == Type::kInt8) {
    const int8_t* from = static_cast<const int8_t*>(m.data) + at;
    for (int64_t i = 0; i < d; ++i) out[i] = from[i];
  } else {
    const _Float16* from = static_cast<const _Float16*>(m.data) + at;
    for (int64_t i = 0; i < d; ++i) out[i] = static_cast<float>(from[i]);
  }
}

template <class T>
inline void write_row(void* data, Type type, int64_t at, int64_t d, const T* from) {
  if (type == Type::kFloat64) {
    std::copy(from, from + d, static_cast<double*>(data) + at);
  } else if (type == Type::kFloat32) {
    std::copy(from, from + d, static_cast<float*>(data) + at);
  } else if (type == Type::kBFloat16) {
    uint16_t* to = static_cast<uint16_t*>(data) + at;
    for (int64_t i = 0; i < d; ++i) to[i] = to_bf16(static_cast<float>(from[i]));
  } else {
    _Float16* to = static_cast<_Float16*>(data) + at;
    for (int64_t i = 0; i < d; ++i) to[i] = static_cast<_Float16>(from[i]);
  }
}

// Rows [first, first + count) of d dense elements in T.
template <class T>
inline void read_rows(Stored stored, const void* data, int64_t first, int64_t count, int64_t d,
                      T* out) {
  if (stored == Stored::kWide) {
    std::copy_n(static_cast<const T*>(data) + first * d, count * d, out);
  } else {
    const Type type = stored == Stored::kHalf ? Type::kFloat16 : Type::kBFloat16;
    read_row({data, type, d}, first, count * d, out);
  }
}

// Elements [at, at + count) of rows that are stored so.
template <class T>
inline void write_part(Stored stored, void* data, int64_t at, int64_t count, const T* from) {
  if (stored == Stored::kWide) {
    std::copy_n(from, count, static_cast<T*>(data) + at);
  } else {
    write_row(data, stored == Stored::kHalf ? Type::kFloat16 : Type::kBFloat16, at, count, from);
  }
}

template <class T>
constexpr Type kNative = sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32;

// ---- packing ------------------------------------------------------------------------------------

// Words for a float pair: the two elements, or the only one.
template <class P, class T>
inline typename P::Word word(T first, [[maybe_unused]] T second) {
  if constexpr (P::kPair == 1) {
    return first;
  } else {
    return to_bf16(first) | static_cast<uint32_t>(to_bf16(second)) << 16;
  }
}

template <class P>
constexpr int64_t words(int64_t elements) {
  return (elements + P::kPair - 1) / P::kPair;
}

// A row in words along it.
template <class P, class T>
inline void narrow_row(const T* from, int64_t d, typename P::Word* to) {
  int64_t k = 0;
#if defined(__AVX512BF16__)
  if constexpr (P::kPair == 2) {
    for (; k + 16 <= d / 2; k += 16) {
      const Floats low = load(from + 2 * k), high = load(from + 2 * k + 16);
      store(to + k, (Vector<uint32_t>)(__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
    }
  }
#endif
  for (; k < words<P>(d); ++k) {
    const int64_t e = k * P::kPair;
    to[k] = word<P>(from[e], e + 1 < d ? from[e + 1] : T(0));
  }
}

// out[c][i] = in[i][c] of `wide` rows, of which `real` exist; the others are zero.
template <class Word>
inline void turn_panel(const Word* in, int64_t real, int64_t wide, int64_t columns, int64_t ld,
                       Word* out) {
  for (int64_t r = 0; r < wide; r += 16) {
    int64_t c = 0;
    for (; r + 16 <= real && c + 16 <= columns; c += 16) {
      transpose16(in + r * ld + c, ld, out + c * wide + r, wide);
    }
    for (; c < columns; ++c) {
      for (int64_t i = r; i < std::min(r + 16, wide); ++i) {
        out[c * wide + i] = i < real ? in[i * ld + c] : Word(0);
      }
    }
  }
}

// x as the right operand of W x^T: panels of rows, [panel][d words][kPanel rows].
template <class P, class T>
inline void pack_columns(const T* x, int64_t n, int64_t d, int64_t ld, int64_t padded,
                         typename P::Word* out) {
  constexpr int64_t kWide = kPanel<P>;
  const int64_t depth = words<P>(d);
  for (int64_t p = 0; p < padded; p += kWide, out += depth * kWide) {
    if constexpr (P::kPair == 1) {
      turn_panel(x + p * ld, std::min(kWide, n - p), kWide, d, ld, out);
      continue;
    }
    for (int64_t i = 0; i < kWide; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        const int64_t e = k * P::kPair;
        const bool real = p + i < n;
        const T a = real ? x[(p + i) * ld + e] : T(0);
        const T b = real && e + 1 < d ? x[(p + i) * ld + std::min(e + 1, d - 1)] : T(0);
        out[k * kWide + i] = word<P>(a, b);
      }
    }
  }
}

// Words of two rows, an element of each in a word; or, of one row, the row.
template <class P, class T>
inline void interleave_row(const T* first, [[maybe_unused]] const T* second, int64_t count,
                           typename P::Word* to) {
  int64_t i = 0;
  if constexpr (P::kPair == 1) {
    std::copy(first, first + count, to);
    return;
  }
#if defined(__AVX512BF16__)
  if constexpr (P::kPair == 2) {
    for (; i + 16 <= count; i += 16) {
      store(to + i, interleave(load(first + i), second ? load(second + i) : Floats{}));
    }
  }
#endif
  for (; i < count; ++i) to[i] = word<P>(first[i], second ? second[i] : T(0));
}

// A matrix as the right operand of G m: panels of columns, [panel][row words][kPanel columns].
// `panel_words` words separate two panels (a whole matrix's depth, of which this may be a part).
template <class P, class T, class Row>
inline void pack_rows(Row&& row, int64_t rows, int64_t d, int64_t panel_words,
                      typename P::Word* out) {
  constexpr int64_t kWide = kPanel<P>;
  for (int64_t k = 0; k < words<P>(rows); ++k) {
    const T* first = row(k * P::kPair);
    const T* second = P::kPair == 2 && k * 2 + 1 < rows ? row(k * 2 + 1) : nullptr;
    typename P::Word* to = out + k * kWide;
    for (int64_t c = 0; c < d; c += kWide, to += panel_words) {
      const int64_t wide = std::min(kWide, d - c);
      interleave_row<P>(first + c, second ? second + c : nullptr, wide, to);
      for (int64_t i = wide; i < kWide; ++i) to[i] = 0;
    }
  }
}

// Runs body(thread, task) for each task, whoever is free taking the next.
template <class F>
inline void on_tasks(const Parallel& parallel, int64_t tasks, F&& body) {
  std::atomic<int64_t> next{0};
  auto some = [&](int thread) {
#if defined(__AMX_BF16__)
    const TileRegisters registers;
#endif
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      body(thread, task);
    }
  };
  using Some = decltype(some);
  parallel.run(
      static_cast<int>(std::min<int64_t>(parallel.threads, tasks)),
      [](void* context, int thread) { (*static_cast<Some*>(context))(thread); }, &some);
}

}  // namespace fused_losses::FL_ISA
