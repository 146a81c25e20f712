// The fibers, their order, and what is checked (simulator.h): what kernels and tests call.
#include "simulator.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdlib>
#include <numeric>

#include "machine.h"

namespace fused_losses::host {

Place place;

namespace {

Machine& machine() {
  static Machine* const the = new Machine;  // never destroyed: its stacks may outlive statics
  return *the;
}

void Machine::enter() {
  Machine& m = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_bottom, &m.scheduler_bytes);
#endif
  m.body(*m.launch);
  m.finish_thread();
  abort();
}

uint64_t mixed(uint64_t v) {
  v = (v ^ (v >> 30)) * 0xbf58476d1ce4e5b9ull;
  v = (v ^ (v >> 27)) * 0x94d049bb133111ebull;
  return (v ^ (v >> 31)) | 1;
}

uint64_t seed() {
  const char* text = getenv("FUSED_LOSSES_CUDA_SEED");
  return text ? strtoull(text, nullptr, 10) : 0;
}

}  // namespace

void fault(const char* format, ...) {
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Machine& m = machine();
  m.fail(text);
  m.to_scheduler(true);
  abort();
}

void touch(const void* p, size_t bytes, size_t alignment, Access access) {
  Machine& m = machine();
  Counts& c = m.counts;
  const uintptr_t at = reinterpret_cast<uintptr_t>(p);
  if (access == Access::kLoad) {
    ++c.loads, c.load_bytes += bytes;
  } else if (access == Access::kStore) {
    ++c.stores, c.store_bytes += bytes;
  } else {
    ++c.atomics, c.load_bytes += bytes, c.store_bytes += bytes;
  }
  if (at % alignment != 0) fault("an access of %zu bytes at %p is misaligned", bytes, p);
  if (--m.until_pause <= 0) m.pause();
  if (access == Access::kAtomic && m.in_shared(at, bytes)) {
    c.load_bytes -= bytes, c.store_bytes -= bytes;
    return;
  }
  if (m.buffers.empty()) return;
  const bool stores = access != Access::kLoad;
  const auto inside = [&](const Buffer& o) { return at >= o.begin && at + bytes <= o.end; };
  const auto fits = [&](const Buffer& o) { return inside(o) && !(stores && o.readonly); };
  Buffer* b = m.last;
  if (b == nullptr || !fits(*b)) {
    const auto found = std::find_if(m.buffers.begin(), m.buffers.end(), fits);
    if (found == m.buffers.end()) m.outside(at, bytes, stores);
    b = m.last = &*found;
  }
  if (access != Access::kStore) b->loaded += bytes;
  if (stores) b->stored += bytes;
}

void* shared(const void* key, size_t bytes) {
  Machine& m = machine();
  for (const Shared& known : m.shared) {
    if (known.key == key) return known.begin();
  }
  return m.shared.emplace_back(key, bytes).begin();
}

char* dynamic_shared() {
  Machine& m = machine();
  if (!m.dynamic) fault("a launch without dynamic shared memory");
  return m.dynamic->begin();
}

int processors() {
  const char* text = getenv("FUSED_LOSSES_CUDA_PROCESSORS");
  return text ? std::max(1, atoi(text)) : 3;
}

uint64_t exchange(unsigned mask, uint64_t value, int source) {
  return machine().meet(mask, Collective::kShuffle, value, source, false).received;
}

unsigned ballot(unsigned mask, bool predicate) {
  return machine().meet(mask, Collective::kVote, 0, 0, predicate).votes;
}

void sync_warp(unsigned mask) { machine().meet(mask, Collective::kWarpBarrier, 0, 0, false); }

int sync_block(bool predicate, const Site& site) {
  Machine& m = machine();
  if (m.alive != m.launch->threads) {
    fault("a barrier of the block, of which %d threads have ended", m.launch->threads - m.alive);
  }
  if (m.at_barrier == 0) m.site = site;
  if (m.site.line() != site.line() || m.site.column() != site.column()) {
    fault("threads of a block wait at two barriers: line %u and line %u", m.site.line(),
          site.line());
  }
  m.predicates += predicate;
  if (++m.at_barrier < m.launch->threads) {
    m.wait();
  } else {
    m.open_barrier();
  }
  return m.block_votes;
}

int lane() { return machine().current % kLanes; }

int run(const Launch& launch, void (*body)(const Launch&)) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> alone(m.busy);
  ++m.counts.launches;
  if (m.hook) {
    Dl_info info = {};
    const char* name = dladdr(launch.kernel, &info) && info.dli_sname ? info.dli_sname : "";
    return m.hook(name, launch.blocks, launch.threads, launch.shared, launch.arguments,
                  launch.argument_bytes);
  }
  m.launch = &launch;
  m.body = body;
  m.failed = false;
  m.error.clear();
  m.current = 0;
  m.last = nullptr;
  m.shared.clear();
  if (m.stacks == nullptr) {
    void* all = mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) abort();
    m.stacks = static_cast<char*>(all);
  }
  if (launch.threads < 1 || launch.threads > kMostThreads || launch.threads % kLanes != 0) {
    m.fail("blocks of " + std::to_string(launch.threads) + " threads");
    return 1;
  }
  if (launch.blocks < 0 || launch.blocks > std::numeric_limits<int32_t>::max()) {
    m.fail("a grid of " + std::to_string(launch.blocks) + " blocks");
    return 1;
  }
  m.dynamic.reset(launch.shared ? new Shared(nullptr, launch.shared) : nullptr);
  place.block_size = {static_cast<unsigned>(launch.threads), 1, 1};
  place.grid_size = {static_cast<unsigned>(launch.blocks), 1, 1};
  m.random = mixed(seed() + 0x9e3779b97f4a7c15ull);
  std::vector<int64_t> order(launch.blocks);
  std::iota(order.begin(), order.end(), 0);
  for (int64_t i = launch.blocks - 1; i > 0; --i) std::swap(order[i], order[m.next() % (i + 1)]);
  for (int64_t block : order) {
    m.run_block(block);
    if (m.failed) return 1;
  }
  return 0;
}

}  // namespace fused_losses::host

// ---- for the callers: Python (backends/cuda_launch.py) and tests
// ------------------------------------

using namespace fused_losses::host;

// The buffers that the next launches may touch; none: no check. They are numbered as given.
extern "C" void fused_losses_buffers(int count, void* const* begin, const size_t* bytes,
                                     const bool* readonly) {
  Machine& m = machine();
  m.buffers.clear();
  m.last = nullptr;
  for (int i = 0; i < count; ++i) {
    const auto at = reinterpret_cast<uintptr_t>(begin[i]);
    m.buffers.push_back({at, at + bytes[i], readonly[i], 0, 0});
  }
}

// Bytes loaded and stored so far of the buffers announced last.
extern "C" void fused_losses_traffic(uint64_t* loaded, uint64_t* stored) {
  const Machine& m = machine();
  for (size_t i = 0; i < m.buffers.size(); ++i) {
    loaded[i] = m.buffers[i].loaded;
    stored[i] = m.buffers[i].stored;
  }
}

// loads, load_bytes, stores, store_bytes, atomics, blocks, launches, barriers since the last call.
extern "C" void fused_losses_counts(uint64_t* out) {
  Machine& m = machine();
  memcpy(out, &m.counts, sizeof m.counts);
  m.counts = {};
}

// Launches go to the hook instead; null: they run again.
extern "C" void fused_losses_hook(Hook hook) { machine().hook = hook; }

extern "C" const char* fused_losses_error(int) { return machine().error.c_str(); }
