// What multiplies in bfloat16, two products a step and lane; all else is avx512's.
#include "../kernels.h"

#if defined(__AVX512BF16__)

#define FL_ISA avx512_bf16
#define FL_VECTOR_BYTES 64
#include "narrow_table.h"

namespace fused_losses {

// Made at its first call, which is on a CPU that has the instructions.
const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = avx512_bf16::table("avx512_bf16");
  return &kernels;
}

}  // namespace fused_losses

#else

namespace fused_losses {

const Kernels* avx512_bf16_kernels() { return nullptr; }

}  // namespace fused_losses

#endif
