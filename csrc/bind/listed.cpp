// The cpu ops of listed pairs (schemas: primitives/listed), and their call in plain eager code.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "bind.h"
#include "streamed.h"

namespace fused_losses {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A ListedProblem and what it points to.
struct ListedCall {
  Tensor x, y, rows, columns;
  at::ScalarType accumulate;
  ListedProblem problem;

  ListedCall(const Tensor& x_in, const OptionalTensor& y_in, const Tensor& rows_in,
             const Tensor& columns_in, bool apart) {
    TORCH_CHECK_VALUE(
        x_in.dim() == 2 && (!y_in || (y_in->dim() == 2 && y_in->size(1) == x_in.size(1))),
        "listed_scores: expected x [N, D] and y [M, D], got ", x_in.sizes(), " and ",
        y_in ? y_in->sizes() : x_in.sizes());
    TORCH_CHECK_TYPE(!y_in || y_in->scalar_type() == x_in.scalar_type(),
                     "listed_scores: expected x and y of one dtype, got ", x_in.scalar_type(),
                     " and ", y_in ? y_in->scalar_type() : x_in.scalar_type());
    x = dense_rows(x_in);
    y = y_in ? dense_rows(*y_in) : x;
    accumulate = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    rows = indices("rows", rows_in, x.size(0));
    columns = indices("columns", columns_in, y.size(0));
    TORCH_CHECK_VALUE(rows.numel() == columns.numel(),
                      "listed_scores: expected rows and columns of one length, got ", rows.numel(),
                      " and ", columns.numel());
    problem = {{x.const_data_ptr(), type_of(x), x.stride(0)},
               {y.const_data_ptr(), type_of(y), y.stride(0)},
               rows.const_data_ptr<int64_t>(),
               columns.const_data_ptr<int64_t>(),
               x.size(0),
               y.size(0),
               x.size(1),
               rows.numel(),
               !y_in,
               apart};
  }

  static Tensor indices(const char* name, const Tensor& given, int64_t count) {
    TORCH_CHECK_TYPE(given.scalar_type() == at::kLong && given.dim() == 1, name,
                     ": expected int64 [P], got ", given.scalar_type(), " ", given.sizes());
    const Tensor out = given.contiguous();
    const int64_t* at = out.const_data_ptr<int64_t>();
    const bool fit =
        std::all_of(at, at + out.numel(), [&](int64_t i) { return i >= 0 && i < count; });
    TORCH_CHECK_INDEX(fit, name, ": expected rows in [0, ", count, ")");
    return out;
  }
};

Tensor listed_forward(const Tensor& x, const OptionalTensor& y, const Tensor& rows,
                      const Tensor& columns, bool apart) {
  const ListedCall call(x, y, rows, columns, apart);
  const Tensor out = at::empty({call.problem.pairs}, x.options().dtype(call.accumulate));
  const ListedKernels& kernels = best_kernels().listed;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.bytes(call.problem, parallel.threads, false));
  kernels.forward(call.problem, out.data_ptr(), aligned(buffer), parallel);
  return out;
}

std::tuple<Tensor, Tensor> listed_backward(const Tensor& grad, const Tensor& x,
                                           const OptionalTensor& y, const Tensor& rows,
                                           const Tensor& columns, bool apart, bool need_x,
                                           bool need_y) {
  const ListedCall call(x, y, rows, columns, apart);
  TORCH_CHECK_VALUE(grad.sizes() == call.rows.sizes(), "grad: expected [", call.problem.pairs,
                    "], got ", grad.sizes());
  const Tensor given = grad.to(call.accumulate).contiguous();
  const auto room = [&](const Tensor& of, bool needed) {
    const Tensor out = needed ? at::empty(of.sizes(), of.options()) : at::empty({0}, of.options());
    advise_huge(out);
    return out;
  };
  const bool of_y = need_y && y;
  const Tensor dx = room(call.x, need_x), dy = room(call.y, of_y);
  const ListedKernels& kernels = best_kernels().listed;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.bytes(call.problem, parallel.threads, true));
  kernels.backward(call.problem, given.const_data_ptr(), need_x ? dx.data_ptr() : nullptr,
                   of_y ? dy.data_ptr() : nullptr, aligned(buffer), parallel);
  return {dx, dy};
}

struct ListedScores {
  static constexpr const char* kName = "listed_scores_cpu";
  static constexpr size_t kMoving = 2, kTold = 0;

  static variable_list outputs(const Stack& found) { return {found[0].toTensor()}; }

  static Stack before(const variable_list& grads, const variable_list&, const variable_list&,
                      bool) {
    return {grads[0].contiguous()};
  }
};

}  // namespace

Tensor listed_scores(const Tensor& x, const OptionalTensor& y, const Tensor& rows,
                     const Tensor& columns, bool apart) {
  Stack found;
  const auto or_none = [](const OptionalTensor& t) { return t ? c10::IValue(*t) : c10::IValue(); };
  return Streamed<ListedScores>::run({x, or_none(y), rows, columns, apart}, found)[0];
}

size_t listed_workspace(int64_t n, int64_t m, int64_t d, int64_t pairs, int64_t item, bool own,
                        bool gradient) {
  ListedProblem p = {};
  p.x.type = p.y.type = item == sizeof(double) ? Type::kFloat64 : Type::kFloat32;
  p.n = n, p.m = m, p.d = d, p.pairs = pairs, p.own = own;
  return scratch_bytes(best_kernels().listed.bytes(p, torch_threads().threads, gradient));
}

void register_listed(torch::Library& m) {
  m.impl("listed_scores_cpu", &listed_forward);
  m.impl("listed_scores_cpu_backward", &listed_backward);
}

}  // namespace fused_losses
