// The cpu ops of the row statistics (schemas: primitives/row_statistics); module.cpp registers
// them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "bind.h"

namespace fused_losses {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Torch's own product on views; c is column-major, so the row-major view of it is transposed.
template <class T>
void host_gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda,
               const T* b, int64_t ldb, T beta, T* c, int64_t ldc) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  const auto view = [&](const T* data, int64_t rows, int64_t columns, int64_t ld, bool turned) {
    const std::vector<int64_t> strides =
        turned ? std::vector<int64_t>{1, ld} : std::vector<int64_t>{ld, 1};
    return at::from_blob(const_cast<T*>(data), {rows, columns}, strides, options);
  };
  const c10::InferenceMode quiet;
  Tensor out = view(c, n, m, ldc, false);
  at::addmm_out(out, out, view(b, n, k, ldb, tb), view(a, k, m, lda, ta), beta, 1);
}

// A Problem and what it points to.
struct RowCall {
  Tensor x, weight, labels;
  OptionalTensor classes, bias, column_weight, bend;
  std::vector<Target> targets;
  at::ScalarType accumulate;
  Problem problem;

  RowCall(const Tensor& x_in, const Tensor& weight_in, const Tensor& labels_in,
          const OptionalTensor& classes_in, const OptionalTensor& bias_in,
          const OptionalTensor& column_weight_in, bool normalize, bool weighted,
          c10::string_view precision, const OptionalTensor& bend_in, const Tensor* kept)
      : x(dense_rows(x_in)), weight(dense_rows(weight_in)), labels(labels_in.contiguous()) {
    TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                      "row_statistics: expected x [N, D] and weight [C, D], got ", x.sizes(),
                      " and ", weight.sizes());
    TORCH_CHECK_VALUE(
        labels.dim() == 1 && labels.size(0) == x.size(0) && labels.scalar_type() == at::kLong,
        "labels: expected int64 [", x.size(0), "], got ", labels.scalar_type(), " ",
        labels.sizes());
    accumulate = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    TORCH_CHECK_TYPE((x.scalar_type() == at::kDouble) == (accumulate == at::kDouble),
                     "row_statistics: expected x and weight both in float64 or neither");
    if (classes_in) classes = classes_in->contiguous();
    bias = accumulated(bias_in, accumulate);
    column_weight = accumulated(column_weight_in, accumulate);
    for (const OptionalTensor* v : {&bias, &column_weight}) {
      TORCH_CHECK_VALUE(!*v || (*v)->numel() == weight.size(0),
                        "row_statistics: expected bias and column_weight [", weight.size(0), "]");
    }
    bend = accumulated(bend_in, accumulate);
    TORCH_CHECK_VALUE(
        !bend || (bend->dim() == 2 && bend->size(0) == 4 && bend->size(1) == x.size(0)),
        "bend: expected [4, ", x.size(0), "], got ", bend->sizes());
    targets = find_targets(labels, classes, weight.size(0));
    problem = {
        {x.const_data_ptr(), type_of(x), x.stride(0)},
        {weight.const_data_ptr(), type_of(weight), weight.stride(0)},
        x.size(0),
        x.size(1),
        classes ? classes->numel() : weight.size(0),
        classes ? classes->const_data_ptr<int64_t>() : nullptr,
        bias ? bias->const_data_ptr() : nullptr,
        column_weight ? column_weight->const_data_ptr() : nullptr,
        bend ? bend->const_data_ptr() : nullptr,
        targets.data(),
        static_cast<int64_t>(targets.size()),
        normalize,
        weighted,
        precision_of(precision),
        kept && kept->numel() ? kept->data_ptr() : nullptr,
        kept && kept->numel() ? kept->size(0) : 0,
        host_products(),
    };
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> row_statistics_forward(
    const Tensor& x, const Tensor& weight, const Tensor& labels, const OptionalTensor& classes,
    const OptionalTensor& bias, const OptionalTensor& column_weight, bool normalize, bool weighted,
    c10::string_view precision, const OptionalTensor& bend, int64_t kept_classes) {
  const int64_t n = x.size(0);
  const auto options =
      x.options().dtype(weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  const Tensor kept = kept_scores({kept_classes, round_up(n, kKeptPadding)}, options);
  const RowCall call(x, weight, labels, classes, bias, column_weight, normalize, weighted,
                     precision, bend, &kept);
  const auto doubles = options.dtype(at::kDouble);
  const Tensor lse = at::empty({n}, doubles), target = at::empty({n}, doubles);
  const Tensor weighted_sum = at::empty({weighted ? n : 0}, options);
  const Tensor hardest = at::empty({n}, labels.options().dtype(at::kLong));
  const Tensor hardest_score = at::empty({n}, options);
  if (n > 0) {
    const Kernels& kernels = best_kernels();
    const Parallel parallel = parallel_for_classes(call.problem.k);
    const Tensor buffer = scratch(kernels.rows.forward_bytes(call.problem, parallel.threads));
    const ForwardOut out = {lse.data_ptr<double>(), target.data_ptr<double>(),
                            weighted ? weighted_sum.data_ptr() : nullptr,
                            hardest.data_ptr<int64_t>(), hardest_score.data_ptr()};
    kernels.rows.forward(call.problem, out, aligned(buffer), parallel);
  }
  return {lse, target, weighted_sum, hardest, hardest_score, kept};
}

std::tuple<Tensor, Tensor, Tensor> row_statistics_backward(
    const Tensor& grad_lse, const Tensor& grad_target, const OptionalTensor& grad_weighted,
    const Tensor& x, const Tensor& weight, const Tensor& labels, const OptionalTensor& classes,
    const OptionalTensor& bias, const OptionalTensor& column_weight, const Tensor& lse,
    const Tensor& kept, bool normalize, bool weighted, c10::string_view precision,
    const OptionalTensor& bend, bool compact, bool need_x, bool need_weight, bool need_bias) {
  const RowCall call(x, weight, labels, classes, bias, column_weight, normalize, weighted,
                     precision, bend, &kept);
  const Tensor nothing = at::empty({0}, weight.options());
  const bool part = compact && call.classes;
  const bool whole = (!classes || part) && x.size(0) > 0;
  const Tensor dx = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor dw = nothing;
  if (need_weight) {
    const std::vector<int64_t> shape = {part ? call.problem.k : weight.size(0), weight.size(1)};
    dw = whole ? at::empty(shape, weight.options()) : at::zeros(shape, weight.options());
    advise_huge(dw);
  }
  Tensor db = at::empty({0}, weight.options());
  if (need_bias && bias) {
    db = at::zeros(bias->sizes(), weight.options().dtype(call.accumulate));
  }
  if (x.size(0) > 0) {
    const Kernels& kernels = best_kernels();
    const Parallel parallel = parallel_for_classes(call.problem.k);
    const size_t bytes =
        kernels.rows.backward_bytes(call.problem, parallel.threads, need_x, need_weight);
    const Tensor buffer = scratch(bytes);
    const auto vector = [&](const Tensor& t) { return t.to(call.accumulate).contiguous(); };
    const Tensor g_lse = vector(grad_lse), g_target = vector(grad_target), kept_lse = vector(lse);
    const Tensor g_weighted = grad_weighted ? vector(*grad_weighted) : nothing;
    const BackwardIn in = {g_lse.const_data_ptr(), g_target.const_data_ptr(),
                           weighted ? g_weighted.const_data_ptr() : nullptr,
                           kept_lse.const_data_ptr()};
    const BackwardOut out = {need_x ? dx.data_ptr() : nullptr,
                             need_weight ? dw.data_ptr() : nullptr,
                             need_bias && bias ? db.data_ptr() : nullptr, part};
    kernels.rows.backward(call.problem, in, out, aligned(buffer), parallel);
  }
  if (need_bias && bias) db = db.to(bias->scalar_type());
  return {dx, dw, db};
}

}  // namespace

Gemm host_products() { return {host_gemm<float>, host_gemm<double>}; }

Parallel parallel_for_classes(int64_t k) {
  const Parallel all = torch_threads();
  const int64_t most = std::max<int64_t>(1, k / 24);
  const bool blas = best_kernels().blas;
  return {static_cast<int>(std::min<int64_t>(all.threads, most)), blas ? run_in_region : all.run};
}

Tensor dense_rows(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
}

OptionalTensor accumulated(const OptionalTensor& t, at::ScalarType type) {
  return t ? OptionalTensor(t->to(type).contiguous()) : std::nullopt;
}

std::vector<Target> find_targets(const Tensor& labels, const OptionalTensor& classes, int64_t c) {
  const int64_t n = labels.numel();
  const int64_t* y = labels.const_data_ptr<int64_t>();
  int64_t low = 0, high = 0, wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (y[i] >= -1 && y[i] < c) continue;
    low = wrong ? std::min(low, y[i]) : y[i];
    high = wrong ? std::max(high, y[i]) : y[i];
    ++wrong;
  }
  TORCH_CHECK_INDEX(wrong == 0, "labels: expected class ids in [0, ", c, "), got values from ", low,
                    " to ", high, " in ", wrong, " of ", n, " rows");
  const int64_t* ids = classes ? classes->const_data_ptr<int64_t>() : nullptr;
  const int64_t k = classes ? classes->numel() : c;
  for (int64_t j = 0; ids && j < k; ++j) {
    TORCH_CHECK_INDEX(ids[j] >= 0 && ids[j] < c, "classes: expected class ids in [0, ", c,
                      "), got ", ids[j]);
    TORCH_CHECK_VALUE(j == 0 || ids[j] > ids[j - 1],
                      "classes: expected distinct class ids in increasing order, got ", ids[j],
                      " after ", j ? ids[j - 1] : 0);
  }
  std::vector<Target> targets;
  targets.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    if (y[i] < 0) continue;
    const int64_t at = ids ? std::lower_bound(ids, ids + k, y[i]) - ids : y[i];
    TORCH_CHECK_VALUE(!ids || (at < k && ids[at] == y[i]),
                      "classes: expected every label among the classes that take part, but class ",
                      y[i], " is not");
    targets.push_back({at, i});
  }
  const auto before = [](const Target& a, const Target& b) {
    return a.position != b.position ? a.position < b.position : a.row < b.row;
  };
  std::sort(targets.begin(), targets.end(), before);
  return targets;
}

// With many classes.
size_t row_workspace(int64_t n, int64_t d, int64_t itemsize, bool bf16) {
  Problem p = {};
  p.x.type = itemsize == 8 ? Type::kFloat64 : Type::kFloat32;
  p.w.type = itemsize == 2 ? Type::kBFloat16 : p.x.type;
  p.n = n;
  p.d = d;
  p.k = int64_t(1) << 30;
  p.normalize = true;
  p.gemm = host_products();
  p.precision = bf16 ? Precision::kBFloat16 : Precision::kFull;
  const Kernels& kernels = best_kernels();
  const int threads = torch_threads().threads;
  return scratch_bytes(std::max(kernels.rows.forward_bytes(p, threads),
                                kernels.rows.backward_bytes(p, threads, true, true)));
}

void register_row_statistics(torch::Library& m) {
  m.impl("row_statistics_cpu", &row_statistics_forward);
  m.impl("row_statistics_cpu_backward", &row_statistics_backward);
}

}  // namespace fused_losses
