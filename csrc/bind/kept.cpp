// Room for scores that a forward keeps: the last large one waits for the next call.
//
// Room of this size comes from the system and goes back to it call by call, and fresh pages cost
// much of the product that is spared. A waiting room's pages are the system's for the taking
// (MADV_FREE): where memory is short it has them at once, else the next call finds them mapped.
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/library.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <mutex>
#include <utility>

#include "bind.h"

namespace fused_losses {
namespace {

#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
constexpr int64_t kHuge = 2 << 20;
constexpr size_t kLarge = 32 << 20;  // malloc keeps smaller rooms for itself

struct Region {
  void* data = nullptr;
  size_t bytes = 0;
};

// tried, never waited for: a child may be forked while another thread holds it
std::mutex waiting_lock;
Region waiting;

void unmap(const Region& r) {
  if (r.data) munmap(r.data, r.bytes);
}

// The waiting room if it fits, and is not more than twice what is asked for; else none waits on.
Region take_waiting(size_t bytes) {
  const std::unique_lock<std::mutex> lock(waiting_lock, std::try_to_lock);
  if (!lock) return {};
  const Region found = std::exchange(waiting, {});
  if (bytes <= found.bytes && found.bytes <= 2 * bytes) return found;
  unmap(found);
  return {};
}

void leave(const Region& r) {
  // memory that is locked cannot be taken back
  if (madvise(r.data, r.bytes, MADV_FREE) != 0) return unmap(r);
  const std::unique_lock<std::mutex> lock(waiting_lock, std::try_to_lock);
  unmap(lock ? std::exchange(waiting, r) : r);
}

Region region_of(size_t bytes) {
  Region r = take_waiting(bytes);
  if (r.data) return r;
  r.bytes = round_up(bytes, kHuge);
  r.data = mmap(nullptr, r.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (r.data == MAP_FAILED) return {};
  madvise(r.data, r.bytes, MADV_HUGEPAGE);
  return r;
}
#endif

}  // namespace

at::Tensor kept_scores(at::IntArrayRef shape, const at::TensorOptions& options) {
#if defined(__linux__) && defined(MADV_FREE) && defined(MADV_HUGEPAGE)
  const size_t bytes = c10::multiply_integers(shape) * options.dtype().itemsize();
  if (bytes >= kLarge) {
    const Region r = region_of(bytes);
    if (r.data) return at::from_blob(r.data, shape, [r](void*) { leave(r); }, options);
  }
#endif
  return at::empty(shape, options);
}

}  // namespace fused_losses
