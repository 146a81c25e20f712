// Kernels' threads: every block once whoever comes, callers at once, workers that never come, a
// body that calls, forks, threads that do not start, and the process's end while workers sleep.
//
// usage: threads_test [seconds of callers at once]
#include "threads.h"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>

#include "check.h"

using namespace fused_losses;

namespace {

using Clock = std::chrono::steady_clock;

template <class F>
void on_workers(int count, F&& body) {
  using Body = std::remove_reference_t<F>;
  run_on_workers(count, [](void* f, int i) { (*static_cast<Body*>(f))(i); }, &body);
}

// A job of so many blocks: how often each was done, and who came.
struct Blocks {
  std::vector<std::atomic<int>> done, came;
  std::atomic<int> next{0};

  Blocks(int blocks, int count) : done(blocks), came(count) {}

  bool run(int count, int work) {
    on_workers(count, [&](int index) {
      came[index].fetch_add(1, std::memory_order_relaxed);
      for (int at; (at = next.fetch_add(1, std::memory_order_relaxed)) < int(done.size());) {
        volatile double sum = 0;
        for (int i = 0; i < work; ++i) sum = sum + i;
        done[at].fetch_add(1, std::memory_order_relaxed);
      }
    });
    bool fine = came[0] == 1;
    for (const auto& c : came) fine = fine && c <= 1;
    for (const auto& d : done) fine = fine && d == 1;
    return fine;
  }
};

void every_block_once() {
  std::mt19937 engine(1);
  bool fine = true;
  for (int turn = 0; turn < 2000; ++turn) {
    const int count = 1 + engine() % 9, blocks = engine() % 40;
    fine = fine && Blocks(blocks, count).run(count, engine() % 300);
    // workers asleep, and about to be
    if (turn % 20 == 0) std::this_thread::sleep_for(std::chrono::microseconds(engine() % 200));
  }
  expect(fine, "every block once, each thread once at most");
}

// Callers that open jobs at once share workers, and none waits for another.
void callers_at_once(double seconds) {
  std::atomic<bool> fine{true};
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  std::vector<std::thread> callers;
  for (unsigned seed = 0; seed < 8; ++seed) {
    callers.emplace_back([&, seed] {
      std::mt19937 engine(seed);
      while (Clock::now() < end) {
        const int count = 1 + engine() % 5;
        if (!Blocks(engine() % 20, count).run(count, engine() % 2000)) fine = false;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  expect(fine, "callers at once");
}

// All workers are kept in another caller's body: a call ends without them.
void workers_that_never_come() {
  std::atomic<bool> go{false};
  std::atomic<int> kept{0};
  const int count = started_workers() + 1;
  std::thread other([&] {
    on_workers(count, [&](int) {
      kept.fetch_add(1);
      while (!go) std::this_thread::yield();
    });
  });
  while (kept < count) std::this_thread::yield();
  Blocks blocks(100, 2);
  expect(blocks.run(2, 10), "a call whose workers are elsewhere");
  expect(blocks.came[1] == 0 || started_workers() >= count, "no worker was free");
  go = true;
  other.join();
}

void a_body_that_calls() {
  std::atomic<int> inner{0}, others{0}, came{0};
  on_workers(4, [&](int) {
    came.fetch_add(1);
    on_workers(4, [&](int index) { (index ? others : inner).fetch_add(1); });
  });
  expect(inner == came && others == 0, "a body that calls has one thread");
}

// Whether it ended with 0.
template <class F>
bool in_child(F&& body) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    std::_Exit(body() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

void forks() {
  const bool fine = in_child([] {
    bool alone = started_workers() == 0;
    for (int turn = 0; turn < 200; ++turn) alone = Blocks(20, 3).run(3, 300) && alone;
    return alone && started_workers() >= 2;
  });
  expect(fine, "a forked child has workers of its own");
}

void threads_that_do_not_start() {
  const bool fine = in_child([] {
    // room for the stacks of a few
    rlimit stack;
    getrlimit(RLIMIT_STACK, &stack);
    stack.rlim_cur = std::min<rlim_t>(stack.rlim_cur, 8 << 20);
    long pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t most = pages * sysconf(_SC_PAGESIZE) + 5 * stack.rlim_cur;
    const rlimit room = {most, most};
    setrlimit(RLIMIT_AS, &room);
    const bool every = Blocks(300, 64).run(64, 300) && Blocks(300, 64).run(64, 300);
    return every && started_workers() < 63;
  });
  expect(fine, "as many workers as start");
}

}  // namespace

int main(int argc, char** argv) {
  every_block_once();
  callers_at_once(argc > 1 ? std::atof(argv[1]) : 0.5);
  workers_that_never_come();
  a_body_that_calls();
#if !defined(__SANITIZE_THREAD__)  // starts no threads after a fork
  forks();
#if defined(__linux__)
  threads_that_do_not_start();
#endif
#endif
  if (failures == 0) std::printf("threads: ok\n");
  return failures != 0;
}
