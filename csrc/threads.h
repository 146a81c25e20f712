// The threads that kernels run on beside the caller's own: kept over calls, shared by all callers.
//
// A call is a job that workers enter while it is open. The caller works too, closes the job once
// nothing is left to claim, and waits for those alone that have entered: a worker that another
// process keeps from its core comes to a closed job and costs nothing.
#pragma once

namespace fused_losses {

// Runs body(context, i) for i = 0, on this thread, and for some other i of [0, count), each at most
// once: whoever comes in time. A body claims its blocks from a counter that all share, until none
// is left, and throws nothing. From within a body: body(context, 0) alone.
void run_on_workers(int count, void (*body)(void*, int), void* context) noexcept;

// How many workers have been started, for tests; a forked child starts with none.
int started_workers();

}  // namespace fused_losses
