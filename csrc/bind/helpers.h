// What the helpers around a sweep share (rows.cpp, ends.cpp).
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <numeric>

#include "bind.h"

namespace fused_losses {

constexpr int64_t kLanes = 8;  // of a sum, in a fixed order

// sum_e f(e), in lanes.
template <class F>
double summed(int64_t d, const F& f) {
  double lanes[kLanes] = {};
  int64_t e = 0;
  for (; e + kLanes <= d; e += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += f(e + l);
  }
  for (int64_t l = 0; e < d; ++e, ++l) lanes[l] += f(e);
  return std::accumulate(lanes, lanes + kLanes, 0.0);
}

// What a tensor [] holds, past the dispatcher where it lies at hand.
inline double number_of(const at::Tensor& t) {
  const bool at_hand = t.is_cpu() && t.has_storage() && !t._is_zerotensor() && !t.is_neg();
  if (at_hand && t.scalar_type() == at::kFloat) return *t.const_data_ptr<float>();
  if (at_hand && t.scalar_type() == at::kDouble) return *t.const_data_ptr<double>();
  return t.item<double>();
}

// A tensor [] that holds it.
inline at::Tensor single(double value, const at::TensorOptions& options) {
  at::Tensor out = at::empty({}, options);
  if (out.is_cpu() && out.scalar_type() == at::kFloat) {
    *out.data_ptr<float>() = static_cast<float>(value);
  } else {
    out.fill_(value);
  }
  return out;
}

// The tensor itself, or where nothing moves it one that could be.
inline at::Tensor leaf_of(const at::Tensor& t) {
  return t.requires_grad() ? t : t.detach().requires_grad_();
}

inline torch::autograd::variable_list further(const at::Tensor& out,
                                              const torch::autograd::variable_list& of,
                                              const at::Tensor& grad) {
  return torch::autograd::grad({out}, of, {grad}, true, true, true);
}

template <class Run>
void of_wide_type(const at::Tensor& t, const Run& run) {
  if (t.scalar_type() == at::kDouble) return run(double{});
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat, "expected float32 or float64, got ",
                   t.scalar_type());
  run(float{});
}

inline void check_alike(const at::Tensor& a, const at::Tensor& b, const char* name) {
  TORCH_CHECK_VALUE(a.sizes() == b.sizes(), name, ": expected ", a.sizes(), ", got ", b.sizes());
}

}  // namespace fused_losses
