// The state of a launch: fibers, their order, shared memory, buffers, and how a block runs.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "context.h"
#include "simulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fused_losses::host {
namespace {

constexpr int kMostThreads = 1024, kLanes = 32, kMostWarps = kMostThreads / kLanes;
constexpr size_t kGuard = 64;  // bytes on both sides of shared memory
constexpr int kPause = 128;    // at most so many accesses to global memory without a pause
constexpr size_t kStack = 64 << 10;
constexpr size_t kStagger = 832;  // or the stacks of a block would share a few sets of the cache

// Lanes of a warp that wait for each other.
struct Meeting {
  unsigned mask = 0, arrived = 0, predicates = 0;
  Collective kind = Collective::kWarpBarrier;
};

struct Fiber {
  Context context;
  bool started;
  uint64_t value, received;
  int source;
  unsigned votes;
};

struct Buffer {
  uintptr_t begin, end;
  bool readonly;
  uint64_t loaded, stored;
};

struct Counts {
  uint64_t loads, load_bytes, stores, store_bytes, atomics, blocks, launches, barriers;
};

// Shared memory between its guards, which must keep their bytes.
struct Shared {
  const void* key;
  size_t bytes;
  std::unique_ptr<char[]> all;

  Shared(const void* k, size_t n) : key(k), bytes(n), all(new char[n + 2 * kGuard]) {
    memset(all.get(), 0xff, n + 2 * kGuard);
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(all.get(), kGuard);
    __asan_poison_memory_region(begin() + n, kGuard);
#endif
  }
  char* begin() const { return all.get() + kGuard; }
  // Whether it has these bytes; with its guards if `beside`.
  bool has(uintptr_t at, size_t n, bool beside = false) const {
    const auto first = reinterpret_cast<uintptr_t>(begin()) - beside * kGuard;
    return at >= first && at + n <= first + bytes + 2 * beside * kGuard;
  }
  bool intact() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t i = 0; i < kGuard; ++i) {
      if (all[i] != '\xff' || begin()[bytes + i] != '\xff') return false;
    }
#endif
    return true;
  }
};

using Hook = int (*)(const char* kernel, int64_t blocks, int threads, size_t shared,
                     const void* arguments, size_t bytes);

struct Machine {
  std::mutex busy;
  Context scheduler;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_bytes = 0;
  char* stacks = nullptr;
  Fiber fibers[kMostThreads];
  Meeting meetings[kMostWarps][4];
  unsigned ended[kMostWarps], ready[kMostWarps];  // lanes, a bit each
  unsigned ready_warps = 0;
  bool in_step = false;  // all warps at about the same pace, or one as far as it can
  int warp = 0, until_pause = 1;
  Site site;  // of the barrier that the block waits at
  std::vector<Shared> shared;
  int current = 0, alive = 0, at_barrier = 0, predicates = 0, block_votes = 0;
  const Launch* launch = nullptr;
  void (*body)(const Launch&) = nullptr;
  std::unique_ptr<Shared> dynamic;
  uint64_t random = 0;
  bool failed = false;
  std::string error;
  std::vector<Buffer> buffers;
  Buffer* last = nullptr;
  Counts counts = {};
  Hook hook = nullptr;

  uint64_t next() {
    random ^= random << 13;
    random ^= random >> 7;
    random ^= random << 17;
    return random;
  }

  char* stack(int thread) { return stacks + thread * kStack; }
  size_t stack_bytes(int thread) { return kStack - 64 - thread % 32 * kStagger; }

  void to_fiber(int thread) {
    Fiber& f = fibers[thread];
    current = thread;
    place.thread = {static_cast<unsigned>(thread), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler.fake, stack(thread), stack_bytes(thread));
#endif
    scheduler.go(f.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler.fake, nullptr, nullptr);
#endif
  }

  // Back to the scheduler; for good if the fiber has ended.
  void to_scheduler(bool ends) {
    Fiber& f = fibers[current];
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(ends ? nullptr : &f.context.fake, scheduler_bottom,
                                   scheduler_bytes);
#else
    (void)ends;
#endif
    f.context.go(scheduler);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(f.context.fake, nullptr, nullptr);
#endif
  }

  void wait() { to_scheduler(false); }

  void make_ready(int thread) {
    ready[thread / kLanes] |= 1u << thread % kLanes;
    ready_warps |= 1u << thread / kLanes;
  }

  // One of the bits, at random.
  int any_of(unsigned bits) {
    for (int left = next() % std::popcount(bits); left > 0; --left) bits &= bits - 1;
    return std::countr_zero(bits);
  }

  int next_thread() {
    if (in_step || !(ready_warps >> warp & 1)) warp = any_of(ready_warps);
    const int lane = any_of(ready[warp]);
    ready[warp] &= ~(1u << lane);
    if (ready[warp] == 0) ready_warps &= ~(1u << warp);
    return warp * kLanes + lane;
  }

  // After a barrier, and at the start.
  void next_phase() {
    for (int t = 0; t < launch->threads; ++t) make_ready(t);
    in_step = next() >> 32 & 1;
    warp = any_of(ready_warps);
  }

  // Lets others come first.
  void pause() {
    until_pause = 1 + next() % kPause;
    make_ready(current);
    wait();
  }

  void finish_thread() {
    ended[current / kLanes] |= 1u << current % kLanes;
    --alive;
    to_scheduler(true);
  }

  // Whether every living thread waits at the barrier: then all go on.
  void open_barrier() {
    ++counts.barriers;
    at_barrier = 0;
    block_votes = predicates;
    predicates = 0;
    next_phase();
    wait();
  }

  Meeting& meeting(unsigned mask, Collective kind) {
    const int warp = current / kLanes;
    for (Meeting& m : meetings[warp]) {
      if (m.arrived != 0 && m.mask == mask) {
        if (m.kind != kind) {
          fault("the lanes of mask %08x came to different kinds of collectives", mask);
        }
        return m;
      }
    }
    for (Meeting& m : meetings[warp]) {
      if (m.arrived == 0) {
        m = {mask, 0, 0, kind};
        return m;
      }
    }
    fault("more than four groups of lanes wait at once in warp %d", warp);
  }

  // Comes to a collective; returns when all lanes of the mask have.
  Fiber& meet(unsigned mask, Collective kind, uint64_t value, int source, bool predicate) {
    const int at = current % kLanes, first = current - at;
    if (!(mask >> at & 1)) fault("lane %d calls a collective of mask %08x", at, mask);
    if (const unsigned gone = mask & ended[current / kLanes]) {
      fault("a collective of mask %08x waits for lanes %08x, which have ended", mask, gone);
    }
    Fiber& f = fibers[current];
    f.value = value;
    f.source = source;
    Meeting& m = meeting(mask, kind);
    m.arrived |= 1u << at;
    if (predicate) m.predicates |= 1u << at;
    if (m.arrived != mask) {
      wait();
      return f;
    }
    for (int l = 0; l < kLanes; ++l) {
      if (!(mask >> l & 1)) continue;
      Fiber& lane = fibers[first + l];
      if (kind == Collective::kShuffle) {
        const int from = lane.source;
        if (from < 0 || from >= kLanes || !(mask >> from & 1)) {
          fault("a shuffle of mask %08x reads lane %d", mask, from);
        }
        lane.received = fibers[first + from].value;
      }
      lane.votes = m.predicates;
      if (first + l != current) make_ready(first + l);
    }
    m.arrived = 0;
    return f;
  }

  void run_block(int64_t block) {
    const int threads = launch->threads;
    place.block = {static_cast<unsigned>(block), 0, 0};
    ++counts.blocks;
    for (const Shared& s : shared) memset(s.begin(), 0xff, s.bytes);
    if (dynamic) memset(dynamic->begin(), 0xff, dynamic->bytes);
    ready_warps = 0;
    for (int t = 0; t < threads; ++t) fibers[t].started = false;
    std::fill(std::begin(ready), std::end(ready), 0u);
    next_phase();
    for (auto& warp : meetings) {
      for (Meeting& m : warp) m.arrived = 0;
    }
    std::fill(std::begin(ended), std::end(ended), 0u);
    alive = threads;
    at_barrier = predicates = 0;
    while (alive > 0 && !failed) {
      if (ready_warps == 0) stuck(threads);
      if (failed) break;
      const int thread = next_thread();
      Fiber& f = fibers[thread];
      if (!f.started) {
        f.started = true;
#if defined(__SANITIZE_ADDRESS__)
        __asan_unpoison_memory_region(stack(thread), kStack);
#endif
        f.context.prepare(stack(thread), stack_bytes(thread), &enter);
      }
      to_fiber(thread);
    }
    const auto intact = [](const Shared& s) { return s.intact(); };
    if (!std::all_of(shared.begin(), shared.end(), intact) || (dynamic && !dynamic->intact())) {
      fail("a store out of the bounds of shared memory");
    }
  }

  bool in_shared(uintptr_t at, size_t bytes, bool beside = false) const {
    const auto has = [&](const Shared& s) { return s.has(at, bytes, beside); };
    return std::any_of(shared.begin(), shared.end(), has) ||
           (dynamic && dynamic->has(at, bytes, beside));
  }

  // The fault of an access that fits no buffer.
  [[noreturn]] void outside(uintptr_t at, size_t bytes, bool stores) {
    if (in_shared(at, bytes, true))
      fault("an atomic out of the bounds of shared memory, or ld or st there");
    const char* what = stores ? "a store" : "a load";
    for (size_t i = 0; i < buffers.size(); ++i) {
      const Buffer& o = buffers[i];
      if (at >= o.begin && at + bytes <= o.end) {
        fault("a store of %zu bytes to buffer %zu, which is read only", bytes, i);
      }
    }
    for (size_t i = 0; i < buffers.size(); ++i) {
      const Buffer& o = buffers[i];
      if (at + 4096 < o.begin || at >= o.end + 4096) continue;
      fault("%s of %zu bytes out of bounds: offset %lld of buffer %zu, which has %zu bytes", what,
            bytes, static_cast<long long>(at - o.begin), i, static_cast<size_t>(o.end - o.begin));
    }
    fault("%s of %zu bytes at %p, which is in no buffer", what, bytes, reinterpret_cast<void*>(at));
  }

  void stuck(int threads) {
    if (at_barrier > 0) {
      fail("a barrier of the block was reached by " + std::to_string(at_barrier) + " of " +
           std::to_string(threads) + " threads; " + std::to_string(threads - alive) +
           " have ended, the rest wait elsewhere");
      return;
    }
    for (int w = 0; w * kLanes < threads; ++w) {
      for (const Meeting& m : meetings[w]) {
        if (m.arrived == 0) continue;
        char text[160];
        snprintf(text, sizeof text,
                 "warp %d: a collective of mask %08x was reached by lanes %08x only", w, m.mask,
                 m.arrived);
        fail(text);
        return;
      }
    }
    fail("no thread can go on");
  }

  void fail(const std::string& what) {
    if (failed) return;
    failed = true;
    Dl_info info = {};
    const char* name = dladdr(launch->kernel, &info) && info.dli_sname ? info.dli_sname : "?";
    error = "kernel " + std::string(name) + ", block " + std::to_string(place.block.x) +
            ", thread " + std::to_string(place.thread.x) + ": " + what;
  }

  static void enter();
};

}  // namespace
}  // namespace fused_losses::host
