// The cpu ops that step some rows of a table (schemas: fused_losses/row_update.py).
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>

#include "bind.h"

namespace fused_losses {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

double number(const OptionalTensor& tensor, double value) {
  return tensor ? tensor->item<double>() : value;
}

// 1 - beta^step, without its cancellation.
double debias(double beta, double step) { return -std::expm1(step * std::log(beta)); }

// A RowUpdate and what it points to.
class Rows {
 public:
  RowUpdate problem = {};

  Rows(const Tensor& weight, const Tensor& rows, std::optional<int64_t> rounding_key,
       int64_t row_offset)
      : shape_(weight.sizes()), rows_(rows.contiguous()) {
    TORCH_CHECK_VALUE(weight.dim() == 2, "weight: expected [C, D], got ", weight.sizes());
    TORCH_CHECK_TYPE(rows.scalar_type() == at::kLong, "rows: expected int64, got ",
                     rows.scalar_type());
    TORCH_CHECK_VALUE(rows.dim() == 1, "rows: expected [K], got ", rows.sizes());
    problem.weight = table(weight, "weight");
    problem.rows = rows_.const_data_ptr<int64_t>();
    problem.count = rows.numel();
    problem.width = weight.size(1);
    problem.stochastic = rounding_key.has_value();
    problem.key = static_cast<uint64_t>(rounding_key.value_or(0));
    problem.row_offset = row_offset;
    for (int64_t k = 0; k < problem.count; ++k) {
      TORCH_CHECK_INDEX(problem.rows[k] >= 0 && problem.rows[k] < weight.size(0),
                        "rows: expected values in [0, ", weight.size(0), "), got ",
                        problem.rows[k]);
    }
  }

  void state(int slot, const Tensor& t, const char* name) {
    TORCH_CHECK_VALUE(t.sizes() == shape_, name, ": expected ", shape_, ", got ", t.sizes());
    problem.states[slot] = table(t, name);
  }

  void grad(const Tensor& t) {
    const std::array<int64_t, 2> wanted = {problem.count, problem.width};
    TORCH_CHECK_VALUE(t.sizes() == at::IntArrayRef(wanted), "grad: expected ",
                      at::IntArrayRef(wanted), ", got ", t.sizes());
    grad_ = t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous();
    problem.grad = {grad_.const_data_ptr(), type_of(grad_), grad_.stride(0)};
  }

 private:
  // What autograd kept of a table is stale now.
  RowTable table(const Tensor& t, const char* name) {
    TORCH_CHECK_VALUE(t.size(1) <= 1 || t.stride(1) == 1, name,
                      ": expected rows that lie contiguous, got strides ", t.strides());
    if (!t.is_inference()) t.unsafeGetTensorImpl()->bump_version();
    return {t.data_ptr(), type_of(t), t.stride(0)};
  }

  at::IntArrayRef shape_;
  Tensor rows_, grad_;
};

void sgd(const Tensor& weight, const Tensor& rows, const Tensor& grad, const OptionalTensor& buffer,
         const OptionalTensor& lr_tensor, double lr, double momentum, double dampening,
         double weight_decay, bool nesterov, bool maximize, std::optional<int64_t> rounding_key,
         int64_t row_offset) {
  Rows call(weight, rows, rounding_key, row_offset);
  call.grad(grad);
  if (buffer) call.state(0, *buffer, "momentum_buffer");
  const SgdStep step = {number(lr_tensor, lr), momentum, 1 - dampening,
                        weight_decay,          nesterov, maximize};
  best_kernels().row_update.sgd(call.problem, step, torch_threads());
}

void adamw(const Tensor& weight, const Tensor& rows, const Tensor& grad, const Tensor& exp_avg,
           const Tensor& exp_avg_sq, const OptionalTensor& lr_tensor, double lr,
           const OptionalTensor& step_tensor, double step_number, double beta1, double beta2,
           double eps, double weight_decay, bool maximize, std::optional<int64_t> rounding_key,
           int64_t row_offset) {
  Rows call(weight, rows, rounding_key, row_offset);
  call.grad(grad);
  call.state(0, exp_avg, "exp_avg");
  call.state(1, exp_avg_sq, "exp_avg_sq");
  const double rate = number(lr_tensor, lr), t = number(step_tensor, step_number);
  const AdamwStep step = {
      rate / debias(beta1, t), 1 - beta1, beta2, 1 - beta2, 1 / std::sqrt(debias(beta2, t)), eps,
      rate * weight_decay,     maximize};
  best_kernels().row_update.adamw(call.problem, step, torch_threads());
}

void adagrad(const Tensor& weight, const Tensor& rows, const Tensor& grad, const Tensor& sum,
             double lr, double eps, double weight_decay, double initial, bool maximize,
             std::optional<int64_t> rounding_key, int64_t row_offset) {
  Rows call(weight, rows, rounding_key, row_offset);
  call.grad(grad);
  call.state(0, sum, "sum");
  const AdagradStep step = {lr, eps, initial, lr * weight_decay, maximize};
  best_kernels().row_update.adagrad(call.problem, step, torch_threads());
}

void catch_up(const Tensor& weight, const Tensor& rows, const Tensor& factors_in,
              const OptionalTensor& buffer, std::optional<int64_t> rounding_key,
              int64_t row_offset) {
  Rows call(weight, rows, rounding_key, row_offset);
  if (buffer) call.state(0, *buffer, "momentum_buffer");
  TORCH_CHECK_VALUE(factors_in.dim() == 2 && factors_in.size(0) == rows.size(0) &&
                        factors_in.size(1) == 4 && factors_in.scalar_type() == at::kDouble,
                    "factors: expected float64 [K, 4], got ", factors_in.scalar_type(), " ",
                    factors_in.sizes());
  const Tensor factors = factors_in.contiguous();
  best_kernels().row_update.catch_up(call.problem, factors.const_data_ptr<double>(),
                                     torch_threads());
}

}  // namespace

void register_row_update(torch::Library& m) {
  m.impl("sgd_rows_cpu", &sgd);
  m.impl("adamw_rows_cpu", &adamw);
  m.impl("adagrad_rows_cpu", &adagrad);
  m.impl("catch_up_rows_cpu", &catch_up);
}

}  // namespace fused_losses
