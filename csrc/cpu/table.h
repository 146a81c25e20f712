// Fills the table of one instruction set from the templates.
#pragma once

#include "backward.h"

namespace fused_losses::FL_ISA {

using F32 = Plain<float>;
using F64 = Plain<double>;

inline bool is_double(const Problem& p) { return p.w.type == Type::kFloat64; }

inline size_t table_forward_bytes(const Problem& p, int threads) {
  if (is_double(p)) return forward_bytes<F64, double>(p, threads);
#if defined(__AVX512BF16__)
  if (p.precision == Precision::kBFloat16) return forward_bytes<Pairs, float>(p, threads);
#endif
  return forward_bytes<F32, float>(p, threads);
}

inline size_t table_backward_bytes(const Problem& p, int threads, bool dx, bool dw) {
  if (is_double(p)) return backward_bytes<F64, F64, double>(p, threads, dx, dw);
#if defined(__AVX512BF16__)
  if (p.precision == Precision::kMixed)
    return backward_bytes<F32, Pairs, float>(p, threads, dx, dw);
  if (p.precision == Precision::kBFloat16) {
    return backward_bytes<Pairs, Pairs, float>(p, threads, dx, dw);
  }
#endif
  return backward_bytes<F32, F32, float>(p, threads, dx, dw);
}

inline void table_forward(const Problem& p, const ForwardOut& out, void* buffer,
                          const Parallel& parallel) {
  if (is_double(p)) return forward<F64, double>(p, out, buffer, parallel);
#if defined(__AVX512BF16__)
  if (p.precision == Precision::kBFloat16) return forward<Pairs, float>(p, out, buffer, parallel);
#endif
  forward<F32, float>(p, out, buffer, parallel);
}

inline void table_backward(const Problem& p, const BackwardIn& in, const BackwardOut& out,
                           void* buffer, const Parallel& parallel) {
  if (is_double(p)) return backward<F64, F64, double>(p, in, out, buffer, parallel);
#if defined(__AVX512BF16__)
  if (p.precision == Precision::kMixed) {
    return backward<F32, Pairs, float>(p, in, out, buffer, parallel);
  }
  if (p.precision == Precision::kBFloat16) {
    return backward<Pairs, Pairs, float>(p, in, out, buffer, parallel);
  }
#endif
  backward<F32, F32, float>(p, in, out, buffer, parallel);
}

inline Kernels table(const char* capability, bool bf16) {
  return {capability,           bf16,          table_forward_bytes,
          table_backward_bytes, table_forward, table_backward};
}

}  // namespace fused_losses::FL_ISA
