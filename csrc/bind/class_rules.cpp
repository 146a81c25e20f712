// The class rules' kernels for their form in Python, which has checked what it gives.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bind.h"

namespace fused_losses {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

struct NamedRule {
  const char* name;
  ClassRule rule;
  size_t params;
  int64_t statistics;
  int64_t value_rows[2];  // how many it may have
};

// as CLASS_FOLDS of primitives/class_rules/rules.py
constexpr NamedRule kRules[] = {
    {"softmax", ClassRule::kSoftmax, 1, 1, {0, 4}},
    {"summed_softmax", ClassRule::kSummedSoftmax, 1, 2, {0, 4}},
    {"sface", ClassRule::kSFace, 2, 1, {0, 0}},
    {"sphereface2", ClassRule::kSphereFace2, 4, 2, {1, 1}},
};

const NamedRule& rule_of(const std::string& name) {
  for (const NamedRule& each : kRules) {
    if (name == each.name) return each;
  }
  TORCH_CHECK_VALUE(false, "rule: expected one that is compiled, got ", name);
}

std::vector<ClassLabel> sorted_labels(const Tensor& place) {
  const int64_t slots = place.size(1);
  const int64_t* at = place.const_data_ptr<int64_t>();
  std::vector<ClassLabel> labels;
  labels.reserve(place.numel());
  for (int64_t i = 0; i < place.numel(); ++i) {
    if (at[i] >= 0) labels.push_back({at[i], i / slots, i % slots});
  }
  const auto before = [](const ClassLabel& a, const ClassLabel& b) {
    return std::tie(a.position, a.row, a.slot) < std::tie(b.position, b.row, b.slot);
  };
  std::sort(labels.begin(), labels.end(), before);
  return labels;
}

void expect_shape(const char* name, const Tensor& t, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(t.sizes() == shape, name, ": expected ", shape, ", got ", t.sizes());
}

// A ClassProblem and what it points to.
struct ClassCall {
  const NamedRule& rule;
  at::ScalarType accumulate;
  Tensor x, weight;
  OptionalTensor values;
  std::vector<int64_t> rows;  // the centres of the classes that take part
  std::vector<ClassLabel> labels;
  ClassProblem problem;

  ClassCall(const Tensor& x_in, const Tensor& weight_in, const Tensor& place,
            const OptionalTensor& classes, const OptionalTensor& values_in,
            const std::string& rule_name, const std::vector<double>& params, int64_t centers,
            double softness, bool normalize, const std::string& precision, const Tensor& kept)
      : rule(rule_of(rule_name)),
        accumulate(weight_in.scalar_type() == at::kDouble ? at::kDouble : at::kFloat),
        x(dense_rows(x_in)),
        weight(dense_rows(weight_in)),
        labels(sorted_labels(place.contiguous())) {
    TORCH_CHECK_VALUE(params.size() == rule.params, "params: expected ", rule.params, " of ",
                      rule.name, ", got ", params.size());
    const int64_t given = values_in ? values_in->size(0) : 0;
    TORCH_CHECK_VALUE(given == rule.value_rows[0] || given == rule.value_rows[1],
                      "values: expected ", rule.value_rows[0], " or ", rule.value_rows[1],
                      " rows with ", rule.name, ", got ", given);
    if (values_in) {
      expect_shape("values", *values_in, {given, x.size(0)});
      values = values_in->to(accumulate).contiguous();
    }
    if (classes) {
      const Tensor ids = classes->contiguous();
      rows.reserve(ids.numel() * centers);
      for (int64_t j = 0; j < ids.numel(); ++j) {
        const int64_t first = ids.const_data_ptr<int64_t>()[j] * centers;
        for (int64_t k = 0; k < centers; ++k) rows.push_back(first + k);
      }
    }
    Problem p = {};
    p.x = {x.const_data_ptr(), type_of(x), x.stride(0)};
    p.w = {weight.const_data_ptr(), type_of(weight), weight.stride(0)};
    p.n = x.size(0);
    p.d = x.size(1);
    p.k = classes ? static_cast<int64_t>(rows.size()) : weight.size(0);
    p.ids = classes ? rows.data() : nullptr;
    p.normalize = normalize;
    p.precision = precision_of(precision);
    if (kept.numel()) {
      const bool fits = kept.dim() == 2 && kept.size(1) == round_up(p.n, kKeptPadding) &&
                        kept.scalar_type() == accumulate && kept.is_contiguous();
      TORCH_CHECK_VALUE(fits, "kept: expected rows of ", round_up(p.n, kKeptPadding), ", got ",
                        kept.sizes());
      advise_huge(kept);
      p.kept = kept.data_ptr();
      p.kept_classes = kept.size(0);
    }
    p.gemm = host_products();
    p.group = centers;
    problem.rows = p;
    problem.rule = rule.rule;
    std::copy(params.begin(), params.end(), problem.params);
    problem.values = values ? values->const_data_ptr() : nullptr;
    problem.value_rows = values ? values->size(0) : 0;
    problem.softness = softness;
    problem.labels = labels.data();
    problem.label_count = static_cast<int64_t>(labels.size());
    problem.slots = place.size(1);
  }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> class_rules_forward(
    const Tensor& x, const Tensor& weight, const Tensor& place, const OptionalTensor& classes,
    const OptionalTensor& values, const std::string& rule, const std::vector<double>& params,
    int64_t centers, double softness, bool normalize, const std::string& precision,
    const Tensor& kept) {
  const ClassCall call(x, weight, place, classes, values, rule, params, centers, softness,
                       normalize, precision, kept);
  const int64_t n = x.size(0);
  const Tensor statistics = at::empty({call.rule.statistics, n}, x.options().dtype(at::kDouble));
  const Tensor hardest = at::empty({n}, place.options());
  const Tensor score = at::empty({n}, x.options().dtype(call.accumulate));
  if (n > 0) {
    const ClassKernels& kernels = best_kernels().classes;
    const Parallel parallel = parallel_for_classes(call.problem.rows.k);
    const Tensor buffer = scratch(kernels.forward_bytes(call.problem, parallel.threads));
    const ClassForwardOut out = {statistics.data_ptr<double>(), hardest.data_ptr<int64_t>(),
                                 score.data_ptr()};
    kernels.forward(call.problem, out, aligned(buffer), parallel);
  }
  return {statistics, hardest, score};
}

std::tuple<Tensor, Tensor> class_rules_backward(
    const Tensor& grad_statistics, const Tensor& grad_targets, const Tensor& statistics,
    const Tensor& x, const Tensor& weight, const Tensor& place, const OptionalTensor& classes,
    const OptionalTensor& values, const std::string& rule, const std::vector<double>& params,
    int64_t centers, double softness, bool normalize, const std::string& precision,
    const Tensor& kept, bool compact, bool need_x, bool need_weight) {
  const ClassCall call(x, weight, place, classes, values, rule, params, centers, softness,
                       normalize, precision, kept);
  const Problem& p = call.problem.rows;
  expect_shape("grad_statistics", grad_statistics, {call.rule.statistics, p.n});
  expect_shape("statistics", statistics, {call.rule.statistics, p.n});
  expect_shape("grad_targets", grad_targets, place.sizes());
  const bool part = compact && classes;
  const bool whole = (!classes || part) && p.n > 0;
  const Tensor dx = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  Tensor dw = at::empty({0}, weight.options());
  if (need_weight) {
    const std::vector<int64_t> shape = {part ? p.k : weight.size(0), weight.size(1)};
    dw = whole ? at::empty(shape, weight.options()) : at::zeros(shape, weight.options());
    advise_huge(dw);
  }
  if (p.n > 0 && (need_x || need_weight)) {
    const ClassKernels& kernels = best_kernels().classes;
    const Parallel parallel = parallel_for_classes(p.k);
    const Tensor buffer =
        scratch(kernels.backward_bytes(call.problem, parallel.threads, need_x, need_weight));
    const auto given = [&](const Tensor& t) { return t.to(call.accumulate).contiguous(); };
    const Tensor g = given(grad_statistics), of_targets = given(grad_targets);
    const Tensor merged = given(statistics);
    const ClassBackwardIn in = {g.const_data_ptr(), of_targets.const_data_ptr(),
                                merged.const_data_ptr()};
    const BackwardOut out = {need_x ? dx.data_ptr() : nullptr,
                             need_weight ? dw.data_ptr() : nullptr, nullptr, part};
    kernels.backward(call.problem, in, out, aligned(buffer), parallel);
  }
  return {dx, dw};
}

size_t class_rules_workspace(int64_t n, int64_t d, int64_t classes, int64_t centers, int64_t item,
                             const std::string& rule, int64_t value_rows, bool bf16,
                             bool gradient) {
  ClassProblem c = {};
  Problem& p = c.rows;
  p.x.type = item == 8 ? Type::kFloat64 : Type::kFloat32;
  p.w.type = item == 2 ? Type::kBFloat16 : p.x.type;
  p.n = n;
  p.d = d;
  p.k = classes * centers;
  p.normalize = true;
  p.precision = bf16 ? Precision::kBFloat16 : Precision::kFull;
  p.gemm = host_products();
  p.group = centers;
  c.rule = rule_of(rule).rule;
  c.value_rows = value_rows;
  const ClassKernels& kernels = best_kernels().classes;
  const int threads = parallel_for_classes(p.k).threads;
  return scratch_bytes(gradient ? kernels.backward_bytes(c, threads, true, true)
                                : kernels.forward_bytes(c, threads));
}

}  // namespace fused_losses
