// The cpu ops of the matrix of distances; module.cpp registers them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "bind.h"

namespace fused_losses {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Distance distance_of(c10::string_view name) {
  constexpr std::pair<const char*, Distance> kinds[] = {
      {"dot", Distance::kDot},
      {"sqeuclidean", Distance::kSquared},
      {"euclidean", Distance::kEuclidean},
      {"cityblock", Distance::kCityblock},
      {"minkowski", Distance::kMinkowski},
      {"chebyshev", Distance::kChebyshev},
      {"canberra", Distance::kCanberra},
      {"braycurtis", Distance::kBraycurtis},
      {"jensenshannon", Distance::kJensenShannon},
      {"kl", Distance::kKl},
      {"hamming", Distance::kHamming},
      {"jaccard", Distance::kJaccard},
      {"scaled", Distance::kScaled},
  };
  for (const auto& [known, kind] : kinds) {
    if (name == known) return kind;
  }
  TORCH_CHECK_VALUE(false, "kind: unknown distance ", name);
}

// Columns of 16 bits that are widened at once: 8 MiB, and whole blocks of a backward.
int64_t columns_at_once(int64_t d) {
  return std::max<int64_t>(1, (1 << 21) / std::max<int64_t>(d, 1) / 1024) * 1024;
}

// A DistanceProblem and what it points to.
struct DistanceCall {
  Tensor x, y, w;
  Tensor y_wide, w_wide;  // of columns that lie in 16 bits, `step` at a time
  at::ScalarType accumulate;
  DistanceProblem problem;
  int64_t step;  // columns at once: all, unless they lie in 16 bits

  DistanceCall(const Tensor& x_in, const Tensor& y_in, const OptionalTensor& w_in,
               c10::string_view kind_name, double p, c10::string_view precision) {
    TORCH_CHECK_VALUE(x_in.dim() == 2 && y_in.dim() == 2 && x_in.size(1) == y_in.size(1),
                      "distance_matrix: expected x [N, D] and y [M, D], got ", x_in.sizes(),
                      " and ", y_in.sizes());
    TORCH_CHECK_TYPE(x_in.scalar_type() == y_in.scalar_type(),
                     "distance_matrix: expected x and y of one dtype, got ", x_in.scalar_type(),
                     " and ", y_in.scalar_type());
    const Distance kind = distance_of(kind_name);
    const int64_t n = x_in.size(0), m = y_in.size(0), d = x_in.size(1);
    const bool flat = kind == Distance::kHamming || kind == Distance::kJaccard;
    const bool bits = x_in.scalar_type() == at::kBool;
    TORCH_CHECK_TYPE(!bits || flat, "distance_matrix: no bool rows with kind ", kind_name);
    TORCH_CHECK_VALUE(kind != Distance::kMinkowski || p > 0, "p: expected a value > 0, got ", p);
    const bool scaled = kind == Distance::kScaled;
    TORCH_CHECK_VALUE(!scaled || w_in, "w: expected weights [M, D] with kind scaled");
    TORCH_CHECK_VALUE(!w_in || scaled || flat || kind == Distance::kCanberra,
                      "w: expected none with kind ", kind_name);
    if (w_in) {
      const bool fits =
          scaled ? w_in->sizes() == y_in.sizes() : w_in->dim() == 1 && w_in->size(0) == d;
      TORCH_CHECK_VALUE(fits, "w: expected weights of ", d, " coordinates, got ", w_in->sizes());
    }
    accumulate = x_in.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const bool packed = bits && !w_in;
    const at::ScalarType read = packed ? at::kBool : accumulate;
    x = x_in.to(read).contiguous();
    const bool parts = stored_as(y_in) != Stored::kWide && m > columns_at_once(d);
    step = parts ? columns_at_once(d) : m;
    y = parts ? y_in : y_in.to(read).contiguous();
    if (parts) y_wide = at::empty({step, d}, x.options());
    if (w_in) {
      const bool in_parts = parts && scaled;
      w = in_parts ? *w_in : w_in->to(accumulate).contiguous();
      if (in_parts) w_wide = at::empty({step, d}, x.options());
    }
    problem = {x.const_data_ptr(),
               y.const_data_ptr(),
               w_in ? w.const_data_ptr() : nullptr,
               n,
               m,
               d,
               kind,
               p,
               accumulate == at::kDouble,
               packed,
               precision_of(precision),
               m};
  }

  // The problem of columns [first, first + part.m).
  DistanceProblem part(int64_t first) const {
    DistanceProblem part = problem;
    part.m = std::min(step, problem.m - first);
    const auto widened = [&](const Tensor& from, const Tensor& to) {
      to.narrow(0, 0, part.m).copy_(from.narrow(0, first, part.m));
      return to.const_data_ptr();
    };
    if (y_wide.defined()) part.y = widened(y, y_wide);
    if (w_wide.defined()) part.w = widened(w, w_wide);
    return part;
  }

  bool empty() const { return problem.n == 0 || problem.m == 0 || problem.d == 0; }
};

Tensor distances(const Tensor& x, const Tensor& y, const OptionalTensor& w, c10::string_view kind,
                 double p, c10::string_view precision) {
  const DistanceCall call(x, y, w, kind, p, precision);
  const DistanceProblem& problem = call.problem;
  const auto options = call.x.options().dtype(call.accumulate);
  if (call.empty()) return at::zeros({problem.n, problem.m}, options);
  const Tensor out = at::empty({problem.n, problem.m}, options);
  advise_huge(out);
  const DistanceKernels& kernels = best_kernels().distances;
  const Parallel parallel = torch_threads();
  for (int64_t first = 0; first < problem.m; first += call.step) {
    const DistanceProblem part = call.part(first);
    const Tensor to = out.narrow(1, first, part.m);
    const Tensor buffer = scratch(kernels.forward_bytes(part, parallel.threads));
    kernels.forward(part, to.data_ptr(), aligned(buffer), parallel);
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> distances_backward(const Tensor& grad_in, const Tensor& out_in,
                                                      const Tensor& x_in, const Tensor& y_in,
                                                      const OptionalTensor& w_in,
                                                      c10::string_view kind, double p,
                                                      c10::string_view precision, bool need_x,
                                                      bool need_y, bool need_w) {
  const DistanceCall call(x_in, y_in, w_in, kind, p, precision);
  const DistanceProblem& problem = call.problem;
  const bool flat = problem.kind == Distance::kHamming || problem.kind == Distance::kJaccard;
  TORCH_CHECK_VALUE(!flat, "distance_matrix: kind ", kind, " has no gradient");
  const std::array<int64_t, 2> shape = {problem.n, problem.m};
  TORCH_CHECK_VALUE(grad_in.sizes() == shape && out_in.sizes() == shape,
                    "distance_matrix: expected grad and out ", at::IntArrayRef(shape), ", got ",
                    grad_in.sizes(), " and ", out_in.sizes());
  // strides stay: an expanded gradient is read where it is
  const Tensor grad = grad_in.to(call.accumulate);
  const Tensor out = out_in.to(call.accumulate).contiguous();
  const bool of_w = need_w && w_in, w_of_columns = problem.kind == Distance::kScaled;
  const auto like = [&](const Tensor& t, bool need) {
    if (!need) return at::empty({0}, t.options());
    const Tensor to =
        call.empty() ? at::zeros(t.sizes(), t.options()) : at::empty(t.sizes(), t.options());
    advise_huge(to);
    return to;
  };
  const Tensor dx = like(call.x, need_x), dy = like(call.y, need_y);
  const Tensor dw = like(w_in ? call.w : call.y, of_w);
  const DistanceKernels& kernels = best_kernels().distances;
  const Parallel parallel = torch_threads();
  const bool any = !call.empty() && (need_x || need_y || of_w);
  for (int64_t first = 0; any && first < problem.m; first += call.step) {
    const DistanceProblem part = call.part(first);
    // a side's own gradient of this part: in place, or widened, or added to what others gave
    const auto own = [&](const Tensor& all, bool need, bool columns) {
      if (!need || part.m == problem.m) return all;
      if (columns) return at::empty({part.m, problem.d}, call.x.options());
      return first == 0 ? all : at::empty(all.sizes(), all.options());
    };
    const Tensor of_x = own(dx, need_x, false), of_y = own(dy, need_y, true);
    const Tensor of_weights = own(dw, of_w, w_of_columns);
    const DistanceBackwardIn in = {grad.narrow(1, first, part.m).const_data_ptr(), grad.stride(0),
                                   grad.stride(1), out.narrow(1, first, part.m).const_data_ptr()};
    const DistanceBackwardOut to = {need_x ? of_x.data_ptr() : nullptr,
                                    need_y ? of_y.data_ptr() : nullptr,
                                    of_w ? of_weights.data_ptr() : nullptr};
    const Tensor buffer = scratch(kernels.backward_bytes(part, to, parallel.threads));
    kernels.backward(part, in, to, aligned(buffer), parallel);
    const auto put = [&](const Tensor& all, const Tensor& part_of, bool columns) {
      if (part_of.is_same(all)) return;
      if (columns) {
        all.narrow(0, first, part.m).copy_(part_of);
      } else {
        all.add_(part_of);
      }
    };
    put(dx, of_x, false), put(dy, of_y, true), put(dw, of_weights, w_of_columns);
  }
  const at::ScalarType type = x_in.scalar_type();
  return {dx.to(type), dy.to(type), w_in ? dw.to(w_in->scalar_type()) : dw};
}

}  // namespace

void register_distances(torch::Library& m) {
  m.impl("distance_matrix_cpu", &distances);
  m.impl("distance_matrix_cpu_backward", &distances_backward);
}

size_t distance_workspace(int64_t n, int64_t m, int64_t d, int64_t item, const std::string& kind,
                          const std::string& precision, bool gradient) {
  DistanceProblem p = {};
  p.n = n, p.d = d;
  p.m = item == 2 ? std::min(m, columns_at_once(d)) : m;
  p.kind = distance_of(kind);
  p.is_double = item == sizeof(double);
  p.precision = precision_of(precision);
  const DistanceKernels& kernels = best_kernels().distances;
  const int threads = torch_threads().threads;
  size_t most = kernels.forward_bytes(p, threads);
  if (item == sizeof(bool)) {
    p.is_bool = true;  // unless they have weights
    most = std::max(most, kernels.forward_bytes(p, threads));
  }
  const bool weights = p.kind == Distance::kCanberra || p.kind == Distance::kScaled;
  double wanted;
  const DistanceBackwardOut out = {&wanted, &wanted, weights ? &wanted : nullptr};
  if (gradient) most = std::max(most, kernels.backward_bytes(p, out, threads));
  // rows twice more for the gradient of columns in parts
  const int64_t columns = (p.kind == Distance::kScaled ? 2 : 1) * p.m;
  const int64_t rows = gradient ? 3 * n + 2 * columns : n + columns;
  const size_t widened = item == 2 ? kWidened * rows * d : 0;
  return scratch_bytes(most) + widened;
}

}  // namespace fused_losses
