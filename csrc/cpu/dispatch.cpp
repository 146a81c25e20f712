// Chooses the kernels at run time: the CPU's abilities, capped by ATEN_CPU_CAPABILITY.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fused_losses {

namespace {

const Kernels* forced = nullptr;

// Whether there are tile registers, and Linux lends them: it does to a process that asks, but where
// a thread's stack for signals is too small to hold them.
bool lends_tiles() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kAskFor = 0x1023, kTileData = 18;
  // compilers do not agree on whose names they know
  constexpr unsigned kMultiplies = 1u << 22, kTiles = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kMultiplies) || !(d & kTiles)) return false;
  static const bool lent = syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
  return lent;
#else
  return false;
#endif
}

bool runs_here([[maybe_unused]] const char* capability) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool narrow = avx512 && __builtin_cpu_supports("avx512bf16");
  if (std::strcmp(capability, "amx_bf16") == 0) {
    return narrow && lends_tiles();
  }
  if (std::strcmp(capability, "avx512_bf16") == 0) return narrow;
  if (std::strcmp(capability, "avx512") == 0) return avx512;
  if (std::strcmp(capability, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return std::strcmp(capability, "default") == 0;
}

struct Rung {
  const char* capability;
  const Kernels* (*kernels)();
};

constexpr Rung kLadder[] = {{"amx_bf16", amx_bf16_kernels},
                            {"avx512_bf16", avx512_bf16_kernels},
                            {"avx512", avx512_kernels},
                            {"avx2", avx2_kernels}};

// what is compiled for an instruction set is called only where that runs
const Kernels* kernels_of(const Rung& rung) {
  return runs_here(rung.capability) ? rung.kernels() : nullptr;
}

const Kernels& choose() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  const bool none = cap && std::strcmp(cap, "default") == 0;
  const bool avx2_at_most = none || (cap && std::strcmp(cap, "avx2") == 0);
  for (const Rung& rung : kLadder) {
    const bool wide = std::strcmp(rung.capability, "avx2") != 0;
    if (none || (avx2_at_most && wide)) continue;
    if (const Kernels* k = kernels_of(rung)) return *k;
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
  if (std::strcmp(capability, "default") == 0) forced = &generic_kernels();
  for (const Rung& rung : kLadder) {
    if (std::strcmp(rung.capability, capability) == 0) forced = kernels_of(rung);
  }
  return forced != nullptr;
}

}  // namespace fused_losses
