// What multiplies in bfloat16, in AMX's tile registers; all else is avx512's.
#include "../kernels.h"

#if defined(__AMX_BF16__)

#define FL_ISA amx_bf16
#define FL_VECTOR_BYTES 64
#include "narrow_table.h"

namespace fused_losses {

// Made at its first call, which is on a CPU that has the instructions.
const Kernels* amx_bf16_kernels() {
  static const Kernels kernels = amx_bf16::table("amx_bf16");
  return &kernels;
}

}  // namespace fused_losses

#else

namespace fused_losses {

const Kernels* amx_bf16_kernels() { return nullptr; }

}  // namespace fused_losses

#endif
