// Workers without a lock: whoever is kept from its core may stand anywhere, and delays nobody.
#include "../threads.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <climits>
#include <cstdint>
#include <system_error>
#include <thread>

namespace fused_losses {
namespace {

using Word = std::atomic<uint32_t>;

constexpr auto kWorkerSpin = std::chrono::microseconds(50);  // the gap between two sweeps of a call
constexpr auto kCallerSpin = std::chrono::microseconds(20);
constexpr int kPausesAtOnce = 16;  // between two looks at the clock
constexpr uint32_t kEntry = 1 << 16, kInside = kEntry - 1;

// Of a caller: what workers enter. Its memory outlives the call, so a late look at it is none.
struct alignas(64) Job {
  Word state{0};   // entries that are still free, in kEntry; how many workers are inside
  Word asleep{0};  // whether the caller sleeps until nobody is
  void (*body)(void*, int) = nullptr;
  void* context = nullptr;
};

Job jobs[64];
std::atomic<uint64_t> taken{0};  // the jobs that have a caller
std::atomic<uint64_t> open{0};   // those that may have entries
std::atomic<int> wanted{0};      // workers that all callers would use
std::atomic<int> started{0};
std::atomic_flag starting;
Word calls{0};  // how many jobs were opened: what workers wait on
std::atomic<int> sleepers{0};
thread_local bool inside = false;
const int cores = std::max<int>(1, std::thread::hardware_concurrency());

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// libstdc++'s own wait gives its core away before it sleeps, for as long as others like.
void sleep_while(Word& word, uint32_t value) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
#else
  word.wait(value);
#endif
}

void wake(Word& word, int count) {
#if defined(__linux__)
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, count, nullptr, nullptr, 0);
#else
  for (int i = 0; i < count; ++i) word.notify_one();
#endif
}

// Until done() or for so long.
template <class Done>
void spin(std::chrono::microseconds most, const Done& done) {
  const auto end = std::chrono::steady_clock::now() + most;
  do {
    for (int i = 0; i < kPausesAtOnce; ++i) {
      if (done()) return;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
}

// The first two of those that are still wanted; each wakes two more.
void wake_workers(uint32_t more) {
  if (more > 0 && sleepers.load() > 0) wake(calls, more > 1 ? 2 : 1);
}

// Whether there was a job to enter.
bool help() {
  for (uint64_t left = open.load(std::memory_order_acquire); left; left &= left - 1) {
    Job& job = jobs[std::countr_zero(left)];
    uint32_t state = job.state.load(std::memory_order_relaxed);
    while (state >= kEntry) {
      if (!job.state.compare_exchange_weak(state, state - kEntry + 1)) continue;
      const uint32_t index = state / kEntry;
      wake_workers(index - 1);
      job.body(job.context, static_cast<int>(index));
      // nothing is left to claim, so nobody need enter any more
      job.state.fetch_and(kInside);
      if (job.state.fetch_sub(1) == 1 && job.asleep.load()) wake(job.state, 1);
      return true;
    }
  }
  return false;
}

void work() {
  inside = true;
  for (;;) {
    const uint32_t seen = calls.load();
    if (help()) continue;
    const auto called = [&] { return calls.load(std::memory_order_relaxed) != seen; };
    spin(kWorkerSpin, called);
    if (called()) continue;
    sleepers.fetch_add(1);
    sleep_while(calls, seen);
    sleepers.fetch_sub(1);
  }
}

#if defined(__unix__) || defined(__APPLE__)
// A forked child has the thread that forked alone.
void forget() {
  for (Job& job : jobs) {
    job.state = 0;
    job.asleep = 0;
  }
  taken = open = 0;
  wanted = started = sleepers = 0;
  starting.clear();
}

[[maybe_unused]] const int forks = pthread_atfork(nullptr, nullptr, forget);
#endif

// Workers beyond those of one caller where there are cores for them. Fewer, where no more start.
void start_workers(int own, int all) {
  const int most = std::max(own, std::min(all, cores - 1));
  if (started.load(std::memory_order_relaxed) >= most || starting.test_and_set()) return;
  try {
    while (started.load() < most) {
      std::thread(work).detach();
      started.fetch_add(1);
    }
  } catch (const std::system_error&) {
  }
  starting.clear();
}

// A job of one's own, or null while all are in use.
Job* take() {
  uint64_t old = taken.load(std::memory_order_relaxed);
  while (~old) {
    const int at = std::countr_one(old);
    if (taken.compare_exchange_weak(old, old | uint64_t(1) << at)) return jobs + at;
  }
  return nullptr;
}

// Opened, worked at, closed.
void run(Job& job, int helpers, void (*body)(void*, int), void* context) {
  const uint64_t bit = uint64_t(1) << (&job - jobs);
  job.body = body;
  job.context = context;
  job.state.store(static_cast<uint32_t>(helpers) * kEntry);
  open.fetch_or(bit);
  calls.fetch_add(1);
  wake_workers(helpers);
  inside = true;
  body(context, 0);
  inside = false;
  open.fetch_and(~bit);
  job.state.fetch_and(kInside);
  spin(kCallerSpin, [&] { return job.state.load(std::memory_order_relaxed) == 0; });
  while (const uint32_t left = job.state.load()) {
    job.asleep = 1;
    sleep_while(job.state, left);
  }
  job.asleep = 0;
  taken.fetch_and(~bit);
}

}  // namespace

void run_on_workers(int count, void (*body)(void*, int), void* context) noexcept {
  const int helpers = std::min<int>(count - 1, kInside);
  Job* const job = helpers > 0 && !inside ? take() : nullptr;
  if (!job) return body(context, 0);
  start_workers(helpers, wanted.fetch_add(helpers) + helpers);
  run(*job, helpers, body, context);
  wanted.fetch_sub(helpers);
}

int started_workers() { return started; }

}  // namespace fused_losses
