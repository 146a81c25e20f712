// The kernels for one instruction set; the build gives this file its compiler flags.
#define FL_ISA generic
#define FL_VECTOR_BYTES 16
#define FL_PREFER_BLAS
#include "table.h"

namespace fused_losses {

const Kernels& generic_kernels() {
  static constinit const Kernels kernels = generic::table("default");
  return kernels;
}

}  // namespace fused_losses
