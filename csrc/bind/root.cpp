// `numerics.root` in one pass, with gradients of any order, in plain eager mode alone
// (`base/compiled.py`).
#include <ATen/ops/empty.h>
#include <ATen/ops/le.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>

#include "helpers.h"

namespace fused_losses {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The truth of `numerics.root`, to be differentiated further.
Tensor root_graph(const Tensor& v) {
  const Tensor positive = at::logical_not(at::le(v, 0));
  return at::where(positive, at::sqrt(at::where(positive, v, at::ones_like(v))), at::zeros_like(v));
}

struct Root : torch::autograd::Function<Root> {
  static Tensor forward(AutogradContext* ctx, const Tensor& v_in) {
    const Tensor v = v_in.contiguous(), out = at::empty(v.sizes(), v.options());
    of_wide_type(v, [&](auto type) {
      using T = decltype(type);
      const T* in = v.const_data_ptr<T>();
      T* to = out.data_ptr<T>();
      for (int64_t i = 0; i < v.numel(); ++i) to[i] = in[i] <= 0 ? T(0) : std::sqrt(in[i]);
    });
    ctx->save_for_backward({v_in, out});
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    if (at::GradMode::is_enabled()) {
      const Tensor leaf = leaf_of(saved[0]);
      return further(root_graph(leaf), {leaf}, grads[0]);
    }
    const Tensor root = saved[1].contiguous(), grad = grads[0].contiguous();
    const Tensor out = at::empty(root.sizes(), root.options());
    of_wide_type(root, [&](auto type) {
      using T = decltype(type);
      const T *in = root.const_data_ptr<T>(), *from = grad.const_data_ptr<T>();
      T* to = out.data_ptr<T>();
      for (int64_t i = 0; i < root.numel(); ++i) to[i] = in[i] == 0 ? T(0) : from[i] / (2 * in[i]);
    });
    return {out};
  }
};

}  // namespace

Tensor root_of(const Tensor& v) { return Root::apply(v); }

}  // namespace fused_losses
