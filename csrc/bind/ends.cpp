// The ends of losses, a number a row, in one pass each, with gradients of any order.
//
// In plain eager mode alone (`base/compiled.py`): else the same formulas run in PyTorch.
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/log_sigmoid.h>
#include <ATen/ops/logical_and.h>
#include <ATen/ops/logical_or.h>
#include <ATen/ops/lt.h>
#include <ATen/ops/ne.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>

#include "helpers.h"

namespace fused_losses {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

double softplus(double z) { return z < 0 ? std::log1p(std::exp(z)) : z + std::log1p(std::exp(-z)); }

double sigmoid(double z) {
  const double part = std::exp(-std::abs(z));
  return (z < 0 ? part : 1) / (1 + part);
}

// The truth of `numerics.softplus`, to be differentiated further.
Tensor softplus_graph(const Tensor& z) {
  return at::where(at::lt(z, 0), at::softplus(z), at::neg(at::log_sigmoid(at::neg(z))));
}

struct Softplus : torch::autograd::Function<Softplus> {
  static Tensor forward(AutogradContext* ctx, const Tensor& z_in) {
    ctx->save_for_backward({z_in});
    const Tensor z = z_in.contiguous(), out = at::empty(z.sizes(), z.options());
    of_wide_type(z, [&](auto type) {
      using T = decltype(type);
      const T* in = z.const_data_ptr<T>();
      T* to = out.data_ptr<T>();
      for (int64_t i = 0; i < z.numel(); ++i) to[i] = static_cast<T>(softplus(in[i]));
    });
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor z_in = ctx->get_saved_variables()[0];
    if (at::GradMode::is_enabled()) {
      // the slope too has a derivative
      const Tensor leaf = leaf_of(z_in);
      return further(softplus_graph(leaf), {leaf}, grads[0]);
    }
    const Tensor z = z_in.contiguous(), grad = grads[0].contiguous();
    const Tensor out = at::empty(z.sizes(), z.options());
    of_wide_type(z, [&](auto type) {
      using T = decltype(type);
      const T *in = z.const_data_ptr<T>(), *from = grad.const_data_ptr<T>();
      T* to = out.data_ptr<T>();
      for (int64_t i = 0; i < z.numel(); ++i) to[i] = static_cast<T>(from[i] * sigmoid(in[i]));
    });
    return {out};
  }
};

// What a row of `share_loss` counts for: has it a positive, and with something else beside it?
struct Standing {
  bool counted, both;
};

template <class T>
Standing standing(T positive, T others) {
  // `!=` and not `>`: a NaN must show
  const bool counted = positive != -std::numeric_limits<T>::infinity();
  return {counted, counted && (others > 0 || positive != positive)};
}

// The loss, and which rows are counted.
struct Share : torch::autograd::Function<Share> {
  static variable_list forward(AutogradContext* ctx, const Tensor& value_in,
                               const Tensor& others_in) {
    ctx->save_for_backward({value_in, others_in});
    const Tensor value = value_in.contiguous(), others = others_in.contiguous();
    const Tensor out = at::empty(others.sizes(), value.options());
    const Tensor counted = at::empty(others.sizes(), value.options().dtype(at::kBool));
    bool* counts = counted.data_ptr<bool>();
    of_wide_type(value, [&](auto type) {
      using T = decltype(type);
      const int64_t n = out.numel();
      const T *positive = value.const_data_ptr<T>(), *negative = positive + n;
      const T* further = others.const_data_ptr<T>();
      T* to = out.data_ptr<T>();
      for (int64_t i = 0; i < n; ++i) {
        const Standing row = standing(positive[i], further[i]);
        counts[i] = row.counted;
        to[i] = row.both ? static_cast<T>(softplus(static_cast<T>(negative[i] - positive[i]))) : 0;
      }
    });
    ctx->set_materialize_grads(false);
    return {out, counted};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return {Tensor(), Tensor()};
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &value_in = saved[0], &others_in = saved[1];
    if (at::GradMode::is_enabled()) {
      const Tensor leaf = leaf_of(value_in);
      const Tensor positive = leaf.select(0, 0), zero = at::zeros_like(positive);
      const Tensor none = at::full_like(positive, -std::numeric_limits<double>::infinity());
      const Tensor some = at::logical_or(at::gt(others_in, zero), at::ne(positive, positive));
      const Tensor both = at::logical_and(at::ne(positive, none), some);
      const Tensor gap = at::where(both, at::sub(leaf.select(0, 1), positive), zero);
      const Tensor out = at::where(both, softplus_graph(gap), zero);
      return {further(out, {leaf}, grads[0])[0], Tensor()};
    }
    const Tensor value = value_in.contiguous(), others = others_in.contiguous();
    const Tensor grad = grads[0].contiguous(), out = at::empty(value.sizes(), value.options());
    of_wide_type(value, [&](auto type) {
      using T = decltype(type);
      const int64_t n = others.numel();
      const T *positive = value.const_data_ptr<T>(), *negative = positive + n;
      const T *more = others.const_data_ptr<T>(), *from = grad.const_data_ptr<T>();
      T *down = out.data_ptr<T>(), *up = down + n;
      for (int64_t i = 0; i < n; ++i) {
        const T gap = static_cast<T>(negative[i] - positive[i]);
        const bool both = standing(positive[i], more[i]).both;
        up[i] = both ? static_cast<T>(from[i] * sigmoid(gap)) : T(0);
        down[i] = -up[i];
      }
    });
    return {out, Tensor()};
  }
};

struct Reduced : torch::autograd::Function<Reduced> {
  static Tensor forward(AutogradContext* ctx, const Tensor& loss_in, const Tensor& counted_in,
                        bool mean, at::ScalarType dtype) {
    const Tensor loss = loss_in.contiguous(), counted = counted_in.contiguous();
    const bool* counts = counted.const_data_ptr<bool>();
    const int64_t n = loss.numel();
    const int64_t count = std::max<int64_t>(1, std::count(counts, counts + n, true));
    double total = 0;
    of_wide_type(loss, [&](auto type) {
      using T = decltype(type);
      const T* in = loss.const_data_ptr<T>();
      total = static_cast<T>(summed(n, [&](int64_t i) { return counts[i] ? in[i] : 0; }));
      if (mean) total = static_cast<T>(total) / static_cast<T>(count);
    });
    ctx->save_for_backward({counted_in});
    ctx->saved_data["share"] = mean ? count : int64_t{1};
    ctx->saved_data["type"] = static_cast<int64_t>(loss.scalar_type());
    const Tensor out = at::empty({}, loss.options().dtype(dtype));
    out.fill_(total);
    return out;
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor counted_in = ctx->get_saved_variables()[0];
    const int64_t share = ctx->saved_data["share"].toInt();
    const auto type = static_cast<at::ScalarType>(ctx->saved_data["type"].toInt());
    if (at::GradMode::is_enabled()) {
      const Tensor of_row = at::div(grads[0].to(type), share);
      return {at::where(counted_in, of_row, at::zeros_like(of_row)), Tensor(), Tensor(), Tensor()};
    }
    const Tensor counted = counted_in.contiguous();
    const bool* counts = counted.const_data_ptr<bool>();
    const Tensor out = at::empty(counted.sizes(), counted.options().dtype(type));
    const double grad = grads[0].item<double>();
    of_wide_type(out, [&](auto type) {
      using T = decltype(type);
      const T value = static_cast<T>(grad) / static_cast<T>(share);
      T* to = out.data_ptr<T>();
      for (int64_t i = 0; i < out.numel(); ++i) to[i] = counts[i] ? value : 0;
    });
    return {out, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

Tensor softplus_of(const Tensor& z) { return Softplus::apply(z); }

std::tuple<Tensor, Tensor> share_loss(const Tensor& value, const Tensor& others) {
  TORCH_CHECK_VALUE(value.dim() > 0 && value.size(0) == 2, "value: expected [2, ...], got ",
                    value.sizes());
  check_alike(value.select(0, 0), others, "others");
  TORCH_CHECK_TYPE(value.scalar_type() == others.scalar_type(), "others: expected ",
                   value.scalar_type());
  const variable_list found = Share::apply(value, others);
  return {found[0], found[1]};
}

Tensor reduced_loss(const Tensor& loss, const Tensor& counted, bool mean, bool wide) {
  check_alike(loss, counted, "counted");
  return Reduced::apply(loss, counted, mean, wide ? at::kDouble : at::kFloat);
}

}  // namespace fused_losses
