// What a CPU can do at most, to hold times against.
#pragma once

#include "common.h"

namespace fused_losses {

// `steps` rounds of products that never leave the registers, on the calling thread; the FLOPs done.
struct PeakKernels {
  double (*fp32)(int64_t steps);
  double (*bf16)(int64_t steps);  // null where products of bfloat16 are none of the CPU's own
};

}  // namespace fused_losses
