// SGD and AdamW on the rows of a table that have a gradient, in place (fused_losses/row_update.py).
//
// One pass: gradient read, weight and state read and written once, in their own types; arithmetic
// in float32. A warp takes a row, or several narrow ones. Rows are distinct, so nobody shares one.
#include "warp.h"

namespace fused_losses::cuda::row_update {

constexpr int kRowThreads = 256;

#define ROW_FIELDS(F)                                                       \
  F(void*, weight)        /* [table, width], rows weight_stride apart */    \
  F(const int64_t*, rows) /* [count] */                                     \
  F(const void*, grad)    /* [count, width], rows grad_stride apart */      \
  F(const float*, lr_at)  /* the learning rate on the device; null: `lr` */ \
  F(float, lr)                                                              \
  F(int64_t, table)                                                         \
  F(int64_t, count)                                                         \
  F(int64_t, width)                                                         \
  F(int64_t, weight_stride)                                                 \
  F(int64_t, grad_stride)                                                   \
  F(int32_t, weight_type)                                                   \
  F(int32_t, grad_type)                                                     \
  F(float, weight_decay)                                                    \
  F(bool, maximize)

#define SGD_FIELDS(F)                                       \
  ROW_FIELDS(F)                                             \
  F(void*, buffer) /* momentum, as weight; null: without */ \
  F(int64_t, buffer_stride)                                 \
  F(int32_t, buffer_type)                                   \
  F(float, momentum)                                        \
  F(float, share) /* 1 - dampening */                       \
  F(bool, nesterov)
FL_ARGUMENTS(SgdArguments, SGD_FIELDS)

#define ADAMW_FIELDS(F)                                                       \
  ROW_FIELDS(F)                                                               \
  F(void*, first) /* moments, as weight */                                    \
  F(void*, second)                                                            \
  F(int64_t, first_stride)                                                    \
  F(int64_t, second_stride)                                                   \
  F(int32_t, first_type)                                                      \
  F(int32_t, second_type)                                                     \
  F(const float*, step_at) /* how many updates with this one; null: `step` */ \
  F(float, step)                                                              \
  F(float, share1) /* 1 - beta1, rounded once */                              \
  F(float, share2)                                                            \
  F(float, beta2)                                                             \
  F(float, log_beta1)                                                         \
  F(float, log_beta2)                                                         \
  F(float, eps)
FL_ARGUMENTS(AdamwArguments, ADAMW_FIELDS)

// ---- N neighbours of any type -------------------------------------------------------------------
//
// The type is the same for everyone: a branch costs less than a kernel for each mix of types. Bits
// are loaded first and widened later, or each load would wait for the one before it.

// 1, 4 or 8 values: floats, or 16-bit ones, two a word. Packs of 4 are of float alone.
template <int N>
struct Bits {
  uint32_t word[N];
};

template <int N>
FL_DEVICE Bits<N> load(const void* from, int64_t at, int32_t type) {
  Bits<N> out = {};
  if constexpr (N == 1) {
    out.word[0] = type == kTypeFloat ? ld(static_cast<const uint32_t*>(from) + at)
                                     : ld(static_cast<const uint16_t*>(from) + at);
  } else {
    const bool wide = N == 4 || type == kTypeFloat;
    const char* p = static_cast<const char*>(from) + at * (wide ? 4 : 2);
    Pack<uint32_t, 4> low = ld(reinterpret_cast<const Pack<uint32_t, 4>*>(p)), high = {};
    if (N == 8 && wide) high = ld(reinterpret_cast<const Pack<uint32_t, 4>*>(p) + 1);
    FL_UNROLL
    for (int k = 0; k < N; ++k) out.word[k] = k < 4 ? low[k % 4] : high[k % 4];
  }
  return out;
}

template <int N>
FL_DEVICE void store(void* to, int64_t at, int32_t type, const Bits<N>& bits) {
  if constexpr (N == 1) {
    if (type == kTypeFloat) {
      st(static_cast<uint32_t*>(to) + at, bits.word[0]);
    } else {
      st(static_cast<uint16_t*>(to) + at, static_cast<uint16_t>(bits.word[0]));
    }
  } else {
    const bool wide = N == 4 || type == kTypeFloat;
    char* p = static_cast<char*>(to) + at * (wide ? 4 : 2);
    Pack<uint32_t, 4> low, high;
    FL_UNROLL
    for (int k = 0; k < 4; ++k) low[k] = bits.word[k], high[k] = bits.word[N - 4 + k];
    st(reinterpret_cast<Pack<uint32_t, 4>*>(p), low);
    if (N == 8 && wide) st(reinterpret_cast<Pack<uint32_t, 4>*>(p) + 1, high);
  }
}

template <int N>
struct Values {
  float v[N];
  FL_DEVICE float& operator[](int u) { return v[u]; }
};

template <int N, class T>
FL_DEVICE Values<N> widened(const Bits<N>& bits) {
  Values<N> out;
  FL_UNROLL
  for (int u = 0; u < N; ++u) {
    out[u] = to_float(T{static_cast<uint16_t>(bits.word[u / 2] >> 16 * (u % 2))});
  }
  return out;
}

template <int N>
FL_DEVICE Values<N> values_of(const Bits<N>& bits, int32_t type) {
  Values<N> out;
  if (N != 4 && type == kTypeBf16) return widened<N, Bf16>(bits);
  if (N != 4 && type == kTypeHalf) return widened<N, Half>(bits);
  FL_UNROLL
  for (int u = 0; u < N; ++u) out[u] = __int_as_float(bits.word[u]);
  return out;
}

template <int N, class T>
FL_DEVICE Bits<N> narrowed(Values<N> values) {
  Bits<N> out = {};
  FL_UNROLL
  for (int u = 0; u < N; ++u) {
    out.word[u / 2] |= uint32_t(from_float<T>(values[u]).bits) << 16 * (u % 2);
  }
  return out;
}

template <int N>
FL_DEVICE Bits<N> bits_of(Values<N> values, int32_t type) {
  Bits<N> out;
  if (N != 4 && type == kTypeBf16) return narrowed<N, Bf16>(values);
  if (N != 4 && type == kTypeHalf) return narrowed<N, Half>(values);
  FL_UNROLL
  for (int u = 0; u < N; ++u) out.word[u] = __float_as_int(values[u]);
  return out;
}

// ---- the rows -----------------------------------------------------------------------------------

// Lanes that share a row: a power of two.
template <int N>
FL_FUNCTION int lanes_of(int64_t width) {
  int lanes = 1;
  while (lanes < kWarp && lanes * N < width) lanes *= 2;
  return lanes;
}

// f(k, row, column) for every N neighbours of each row that is in the table.
template <int N, class Arguments, class F>
FL_DEVICE void on_rows(const Arguments& a, F&& f) {
  const int lanes = lanes_of<N>(a.width), lane = threadIdx.x % kWarp;
  const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t together = kWarp / lanes, step = int64_t(gridDim.x) * blockDim.x / lanes;
  for (int64_t first = thread / kWarp * together; first < a.count; first += step) {
    const int64_t k = first + lane / lanes;
    int64_t row = -1;
    if (k < a.count && lane % lanes == 0) row = ld(a.rows + k);
    row = __shfl_sync(kAllLanes, row, lane / lanes * lanes);
    if (row < 0 || row >= a.table) continue;
    for (int64_t j = lane % lanes * N; j < a.width; j += lanes * N) f(k, row, j);
  }
}

template <class Arguments>
FL_DEVICE float learning_rate(const Arguments& a) {
  return a.lr_at ? ld(a.lr_at) : a.lr;
}

template <int N>
FL_KERNEL(kRowThreads)
sgd_rows(SgdArguments a) {
  const float lr = learning_rate(a);
  on_rows<N>(a, [&](int64_t k, int64_t row, int64_t j) {
    const int64_t at = row * a.weight_stride + j, buffer_at = row * a.buffer_stride + j;
    Bits<N> kept = {};
    const auto grad = load<N>(a.grad, k * a.grad_stride + j, a.grad_type);
    const auto weight = load<N>(a.weight, at, a.weight_type);
    if (a.buffer) kept = load<N>(a.buffer, buffer_at, a.buffer_type);
    Values<N> w = values_of<N>(weight, a.weight_type), g = values_of<N>(grad, a.grad_type);
    Values<N> v = values_of<N>(kept, a.buffer_type);
    FL_UNROLL
    for (int u = 0; u < N; ++u) {
      float step = a.maximize ? -g[u] : g[u];
      // 0 times an infinite weight is NaN
      if (a.weight_decay != 0) step += a.weight_decay * w[u];
      if (a.buffer) {
        v[u] = a.momentum * v[u] + a.share * step;
        step = a.nesterov ? step + a.momentum * v[u] : v[u];
      }
      w[u] -= lr * step;
    }
    store<N>(a.weight, at, a.weight_type, bits_of<N>(w, a.weight_type));
    if (a.buffer) store<N>(a.buffer, buffer_at, a.buffer_type, bits_of<N>(v, a.buffer_type));
  });
}

template <int N>
FL_KERNEL(kRowThreads)
adamw_rows(AdamwArguments a) {
  const float lr = learning_rate(a), step = a.step_at ? ld(a.step_at) : a.step;
  // 1 - beta^step without its cancellation
  const float size = lr / -expm1f(step * a.log_beta1);
  const float scale = 1 / sqrtf(-expm1f(step * a.log_beta2)), decay = lr * a.weight_decay;
  on_rows<N>(a, [&](int64_t k, int64_t row, int64_t j) {
    const int64_t at = row * a.weight_stride + j;
    const int64_t first_at = row * a.first_stride + j, second_at = row * a.second_stride + j;
    const auto grad = load<N>(a.grad, k * a.grad_stride + j, a.grad_type);
    const auto weight = load<N>(a.weight, at, a.weight_type);
    const auto first = load<N>(a.first, first_at, a.first_type);
    const auto second = load<N>(a.second, second_at, a.second_type);
    Values<N> w = values_of<N>(weight, a.weight_type), g = values_of<N>(grad, a.grad_type);
    Values<N> m = values_of<N>(first, a.first_type), v = values_of<N>(second, a.second_type);
    FL_UNROLL
    for (int u = 0; u < N; ++u) {
      const float slope = a.maximize ? -g[u] : g[u];
      m[u] += a.share1 * (slope - m[u]);
      v[u] = a.beta2 * v[u] + a.share2 * slope * slope;
      // one change: 1 - decay would round a small decay alike in every step
      w[u] -= decay * w[u] + size * m[u] / (sqrtf(v[u]) * scale + a.eps);
    }
    store<N>(a.weight, at, a.weight_type, bits_of<N>(w, a.weight_type));
    store<N>(a.first, first_at, a.first_type, bits_of<N>(m, a.first_type));
    store<N>(a.second, second_at, a.second_type, bits_of<N>(v, a.second_type));
  });
}

// ---- launches -----------------------------------------------------------------------------------

struct Matrix {
  const void* p;
  int64_t stride;
  int32_t type;

  bool packs() const {
    const int64_t size = type == kTypeFloat ? 4 : 2;
    return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride * size % 16 == 0;
  }
};

// How many neighbours a thread takes: 16 bytes of each matrix, of the widest type two packs.
template <size_t kMatrices>
int neighbours(const Matrix (&matrices)[kMatrices], int64_t width) {
  bool packed = true, floats = true;
  for (const Matrix& m : matrices) {
    packed = packed && m.packs();
    floats = floats && m.type == kTypeFloat;
  }
  const int n = floats ? 4 : 8;
  return packed && width % n == 0 ? n : 1;
}

template <int N, class Arguments>
int launch_rows(void (*kernel)(Arguments), const Arguments& a, Stream stream) {
  const int64_t a_block = kRowThreads / lanes_of<N>(a.width);
  const int64_t blocks = grid_of((a.count + a_block - 1) / a_block, 8);
  return launch(kernel, blocks, kRowThreads, 0, stream, a);
}

int run_sgd_rows(const SgdArguments& a, Stream stream) {
  const Matrix weight = {a.weight, a.weight_stride, a.weight_type};
  const Matrix grad = {a.grad, a.grad_stride, a.grad_type};
  const Matrix buffer = {a.buffer, a.buffer_stride, a.buffer_type};
  switch (neighbours({weight, grad, a.buffer ? buffer : weight}, a.width)) {
    case 4:
      return launch_rows<4>(sgd_rows<4>, a, stream);
    case 8:
      return launch_rows<8>(sgd_rows<8>, a, stream);
    default:
      return launch_rows<1>(sgd_rows<1>, a, stream);
  }
}
FL_EXPORT(sgd_rows, SgdArguments, SGD_FIELDS, run_sgd_rows)

int run_adamw_rows(const AdamwArguments& a, Stream stream) {
  const Matrix weight = {a.weight, a.weight_stride, a.weight_type};
  const Matrix grad = {a.grad, a.grad_stride, a.grad_type};
  const Matrix first = {a.first, a.first_stride, a.first_type};
  const Matrix second = {a.second, a.second_stride, a.second_type};
  switch (neighbours({weight, grad, first, second}, a.width)) {
    case 4:
      return launch_rows<4>(adamw_rows<4>, a, stream);
    case 8:
      return launch_rows<8>(adamw_rows<8>, a, stream);
    default:
      return launch_rows<1>(adamw_rows<1>, a, stream);
  }
}
FL_EXPORT(adamw_rows, AdamwArguments, ADAMW_FIELDS, run_adamw_rows)

}  // namespace fused_losses::cuda::row_update
