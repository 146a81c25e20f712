// What calls over pairs allocate and keep, told by the plans of their kernels.
#include <torch/library.h>

#include <algorithm>
#include <string>

#include "bind.h"

namespace fused_losses {
namespace {

PairProblem of_sizes(int64_t n, int64_t m, int64_t d, int64_t item, const std::string& precision) {
  PairProblem p = {};
  p.rows.count = n;
  p.columns.count = m;
  p.d = d;
  p.is_double = item == sizeof(double);
  p.precision = precision_of(precision);
  return p;
}

}  // namespace

size_t pair_workspace(int64_t n, int64_t m, int64_t d, int64_t item, const std::string& precision,
                      int64_t width, bool apart) {
  PairProblem p = of_sizes(n, m, d, item, precision);
  p.apart = apart;
  p.both = true;
  const Stored stored = item == 2 ? Stored::kBFloat16 : Stored::kWide;
  p.stored = stored;
  const PairKernels& kernels = best_kernels().pairs;
  const int threads = torch_threads().threads;
  double wanted;
  const PairBackwardOut everything = {&wanted, &wanted, &wanted, &wanted, &wanted};
  PairBackwardOut without_rows = everything;
  without_rows.dx = nullptr;
  size_t most = 0, shift = 0;
  for (const PairBackwardOut& out : {everything, without_rows}) {
    if (width > 0) {
      const AttentionIn in = {nullptr, width, false};
      most = std::max({most, kernels.attention_bytes(p, in, threads),
                       kernels.attention_backward_bytes(p, in, out, true, threads)});
      shift = 3 * sizeof(double) * n;  // products of a row, and what is taken from them
    }
    for (const bool triangle : {false, n == m}) {
      p.triangle = triangle;
      p.stored = triangle ? Stored::kWide : stored;
      most = std::max(
          {most, kernels.forward_bytes(p, threads), kernels.backward_bytes(p, out, threads)});
    }
    p.triangle = false;
    p.stored = stored;
  }
  const size_t norms = apart ? std::max<size_t>(item, sizeof(float)) * (n + m) : 0;
  // columns are read where they lie, and their gradients written so
  const size_t widened = item == 2 ? 2 * kWidened * n * d : 0;
  return scratch_bytes(most) + shift + norms + widened;
}

int64_t pair_kept(int64_t n, int64_t m, int64_t d, int64_t item, const std::string& precision,
                  bool triangle, int64_t most) {
  PairProblem p = of_sizes(n, m, d, item, precision);
  p.triangle = triangle;
  return best_kernels().pairs.kept(p, most);
}

}  // namespace fused_losses
