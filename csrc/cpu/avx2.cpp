// The kernels for one instruction set; the build gives this file its compiler flags.
#define FL_ISA avx2
#define FL_VECTOR_BYTES 32
#include "table.h"

namespace fused_losses {

const Kernels* avx2_kernels() {
#if defined(__AVX2__)
  static constinit const Kernels kernels = avx2::table("avx2");
  return &kernels;
#else
  return nullptr;
#endif
}

}  // namespace fused_losses
