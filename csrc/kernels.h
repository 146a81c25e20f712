// The kernels by instruction set, and the choice among them.
#pragma once

#include "class_rules.h"
#include "distances.h"
#include "divergence.h"
#include "listed.h"
#include "maxsim.h"
#include "pairs.h"
#include "peaks.h"
#include "row_statistics.h"
#include "row_update.h"
#include "topk.h"
#include "triplets.h"

namespace fused_losses {

struct Kernels {
  const char* capability;
  bool bf16;
  bool blas;  // losses over classes multiply by the host's products
  RowKernels rows;
  ClassKernels classes;
  PairKernels pairs;
  MaxSimKernels maxsim;
  TopkKernels topk;
  DistanceKernels distances;
  TripletKernels triplets;
  RowUpdateKernels row_update;
  DivergenceKernels divergence;
  PeakKernels peaks;
  ListedKernels listed;
  // for tests: how many products a call has at least whose float32 factors are split; or null
  int64_t* split_least = nullptr;
};

const Kernels& generic_kernels();
const Kernels* avx2_kernels();  // null where the build has none
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_bf16_kernels();

// The best that this CPU runs, no better than ATEN_CPU_CAPABILITY allows.
const Kernels& best_kernels();

// Tests walk through the instruction sets; null goes back to the best. False: not on this CPU.
bool force_kernels(const char* capability);

}  // namespace fused_losses
