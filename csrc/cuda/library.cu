// What the library says of itself (backends/cuda_launch.py).
#include "platform.h"

#if defined(__CUDACC__)
FL_PUBLIC const char* fused_losses_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}

// 1000 major + 10 minor: the newest CUDA that the driver knows, 0 without one, and the runtime's.
FL_PUBLIC int fused_losses_driver() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

FL_PUBLIC int fused_losses_runtime() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

// The architectures that there is machine code for.
FL_PUBLIC const char* fused_losses_architectures() { return FUSED_LOSSES_ARCHITECTURES; }
#endif
