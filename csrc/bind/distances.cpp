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

// A DistanceProblem and what it points to.
struct DistanceCall {
  Tensor x, y, w;
  at::ScalarType accumulate;
  DistanceProblem problem;

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
    y = y_in.to(read).contiguous();
    if (w_in) w = w_in->to(accumulate).contiguous();
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
               precision_of(precision)};
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
  const Tensor buffer = scratch(kernels.forward_bytes(problem, parallel.threads));
  kernels.forward(problem, out.data_ptr(), aligned(buffer), parallel);
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
  const auto like = [&](const Tensor& t, bool need) {
    if (!need) return at::empty({0}, t.options());
    const Tensor to =
        call.empty() ? at::zeros(t.sizes(), t.options()) : at::empty(t.sizes(), t.options());
    advise_huge(to);
    return to;
  };
  const bool of_w = need_w && w_in;
  const Tensor dx = like(call.x, need_x), dy = like(call.y, need_y);
  const Tensor dw = like(w_in ? call.w : call.y, of_w);
  if (!call.empty() && (need_x || need_y || of_w)) {
    const DistanceBackwardIn in = {grad.const_data_ptr(), grad.stride(0), grad.stride(1),
                                   out.const_data_ptr()};
    const DistanceBackwardOut to = {need_x ? dx.data_ptr() : nullptr,
                                    need_y ? dy.data_ptr() : nullptr,
                                    of_w ? dw.data_ptr() : nullptr};
    const DistanceKernels& kernels = best_kernels().distances;
    const Parallel parallel = torch_threads();
    const Tensor buffer = scratch(kernels.backward_bytes(problem, to, parallel.threads));
    kernels.backward(problem, in, to, aligned(buffer), parallel);
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
  p.n = n, p.m = m, p.d = d;
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
  const int64_t rows = n + m + (p.kind == Distance::kScaled ? m : 0);
  const size_t widened = item == 2 ? (gradient ? 2 : 1) * kWidened * rows * d : 0;
  return scratch_bytes(most) + widened;
}

}  // namespace fused_losses
