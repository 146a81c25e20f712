// Whose threads kernels run on: OpenMP's while these come in time, ours while they do not.
//
// Torch's operators leave OpenMP's threads spinning for milliseconds: on a quiet machine they are
// at work at once, and a thread of ours would have to share their core. But the end of a region
// waits for each of them, also for one that another process keeps from its core and that nothing is
// left for; where such waits are many among the regions, ours take over for a while.
#include "../threads.h"

#include <ATen/Parallel.h>
#include <pthread.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>

#include "bind.h"

namespace fused_losses {
namespace {

using Body = void (*)(void*, int);

// Nanoseconds: what a region may take beyond its caller's own part and half of it; how long ours
// take over, at first and at most.
constexpr int64_t kLate = 200'000, kShort = 250'000'000, kLong = 4'000'000'000;

// A wait weighs as much as so many regions in time, and four of them are many: waits that are
// fewer than one in five regions are any machine's and never add up.
constexpr int kWeight = 4, kMany = 4 * kWeight;

std::atomic<bool> has_threads{false};
// a forked child waits for ever for OpenMP's threads, which it has not
std::atomic<bool> lost{false};
std::atomic<int64_t> ours_until{0}, ours_for{kShort};
std::atomic<int> waits{0};  // weighed; threads that race lose a count, no more

[[maybe_unused]] const int forks =
    pthread_atfork(nullptr, nullptr, [] { lost = lost || has_threads; });

int64_t now() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// After a region, in time or not; ours take over for longer each time unless OpenMP's have come in
// time for long.
void returned(int64_t at, bool late) {
  const int before = waits, weighed = late ? before + kWeight : std::max(before - 1, 0);
  if (weighed != before) waits = weighed;
  if (weighed < kMany) return;
  waits = 0;
  const bool again = at - ours_until < kLong;
  ours_for = again ? std::min(2 * ours_for, kLong) : kShort;
  ours_until = at + ours_for;
}

void run_on_threads(int count, Body body, void* context) {
  if (count <= 1 || at::in_parallel_region()) return body(context, 0);
  has_threads = true;
  const int64_t start = now();
  if (lost || start < ours_until) return run_on_workers(count, body, context);
  int64_t own = 0;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const int64_t before = now();
    for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
    if (begin == 0) own = now() - before;
  });
  const int64_t end = now();
  returned(end, end - start - own > kLate + own / 2);
}

}  // namespace

bool ran_on_threads() { return has_threads; }

Parallel torch_threads() { return {at::get_num_threads(), run_on_threads}; }

void run_in_region(int count, Body body, void* context) {
  if (count > 1) has_threads = true;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
  });
}

void on_runs(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  struct Work {
    int64_t count, grain;
    const std::function<void(int64_t, int64_t)>& body;
    std::atomic<int64_t> next{0};
  } work = {count, grain, body};
  const auto some = [](void* context, int) {
    auto& w = *static_cast<Work*>(context);
    for (int64_t at; (at = w.next.fetch_add(w.grain, std::memory_order_relaxed)) < w.count;) {
      w.body(at, std::min(at + w.grain, w.count));
    }
  };
  const int64_t runs = (count + grain - 1) / grain;
  run_on_threads(static_cast<int>(std::min<int64_t>(at::get_num_threads(), runs)), some, &work);
}

void own_threads(double seconds) { ours_until = now() + static_cast<int64_t>(seconds * 1e9); }

}  // namespace fused_losses
