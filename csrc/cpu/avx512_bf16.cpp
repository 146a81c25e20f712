// The kernels for one instruction set; the build gives this file its compiler flags.
#define FL_ISA avx512_bf16
#define FL_VECTOR_BYTES 64
#include "table.h"

namespace fused_losses {

const Kernels* avx512_bf16_kernels() {
#if defined(__AVX512BF16__)
  static constinit const Kernels kernels = avx512_bf16::table("avx512_bf16", true);
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace fused_losses
