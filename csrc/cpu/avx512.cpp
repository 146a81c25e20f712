// The kernels for one instruction set; the build gives this file its compiler flags.
#define FL_ISA avx512
#define FL_VECTOR_BYTES 64
#include "table.h"

namespace fused_losses {

const Kernels* avx512_kernels() {
#if defined(__AVX512F__)
  static constinit const Kernels kernels = avx512::table("avx512");
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace fused_losses
