// Single numbers and numbers in order, of which PyTorch's own operations take longer than a small
// sweep.
//
// In plain eager mode alone (`base/compiled.py`): else the same formulas run in PyTorch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/reciprocal.h>
#include <torch/library.h>

#include <numeric>
#include <optional>

#include "helpers.h"

namespace fused_losses {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Inverse : torch::autograd::Function<Inverse> {
  static Tensor forward(AutogradContext* ctx, const Tensor& t, double value) {
    ctx->save_for_backward({t});
    const Tensor out = at::empty({}, t.options().dtype(at::kDouble));
    *out.data_ptr<double>() = 1 / value;
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor t = ctx->get_saved_variables()[0];
    if (at::GradMode::is_enabled()) {
      const Tensor leaf = leaf_of(t);
      return {further(at::reciprocal(leaf.to(at::kDouble)), {leaf}, grads[0])[0], Tensor()};
    }
    const double inverse = 1 / number_of(t);
    return {single(-number_of(grads[0]) * (inverse * inverse), t.options()), Tensor()};
  }
};

}  // namespace

std::optional<Tensor> inverse(const Tensor& t) {
  if (t.dim() != 0 || !at::isFloatingType(t.scalar_type())) return std::nullopt;
  const double value = number_of(t);
  if (value <= 0) return std::nullopt;
  return Inverse::apply(t, value);
}

Tensor counted_up(int64_t count, int64_t start) {
  const Tensor out = at::empty({count}, at::TensorOptions().dtype(at::kInt));
  int32_t* to = out.data_ptr<int32_t>();
  std::iota(to, to + count, static_cast<int32_t>(start));
  return out;
}

}  // namespace fused_losses
