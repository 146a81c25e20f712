// What the library says of itself (backends/cuda_launch.py).
#include "platform.h"

#if defined(__CUDACC__)
FL_PUBLIC const char* fused_losses_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// The architectures that there is machine code for.
FL_PUBLIC const char* fused_losses_architectures() { return FUSED_LOSSES_ARCHITECTURES; }
#endif
