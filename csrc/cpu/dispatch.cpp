// Chooses the kernels at run time: the CPU's abilities, capped by ATEN_CPU_CAPABILITY.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "../kernels.h"

namespace fused_losses {

namespace {

const Kernels* forced = nullptr;

bool runs_here([[maybe_unused]] const char* capability) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (std::strcmp(capability, "avx512_bf16") == 0) {
    return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  if (std::strcmp(capability, "avx512") == 0) return avx512;
  if (std::strcmp(capability, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return std::strcmp(capability, "default") == 0;
}

const Kernels& choose() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const bool none = cap && std::strcmp(cap, "default") == 0;
  const bool avx2_at_most = none || (cap && std::strcmp(cap, "avx2") == 0);
  const Kernels* ladder[] = {avx2_at_most ? nullptr : avx512_bf16_kernels(),
                             avx2_at_most ? nullptr : avx512_kernels(),
                             none ? nullptr : avx2_kernels()};
  for (const Kernels* k : ladder) {
    if (k && runs_here(k->capability)) return *k;
  }
  return generic_kernels();
}

}  // namespace

const Kernels& best_kernels() {
  if (forced) return *forced;
  static const Kernels& kernels = choose();
  return kernels;
}

bool force_kernels(const char* capability) {
  forced = nullptr;
  if (!capability) return true;
  for (const Kernels* k :
       {&generic_kernels(), avx2_kernels(), avx512_kernels(), avx512_bf16_kernels()}) {
    if (k && std::strcmp(k->capability, capability) == 0 && runs_here(capability)) forced = k;
  }
  return forced != nullptr;
}

}  // namespace fused_losses
