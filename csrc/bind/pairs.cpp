// The cpu ops of the sweep over pairs; module.cpp registers them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vecdot.h>
#include <ATen/ops/sub.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "helpers.h"

namespace fused_losses {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Rule rule_of(c10::ArrayRef<double> r, const char* name) {
  TORCH_CHECK_VALUE(r.size() == 3, name, ": expected factor, center and reach, got ", r.size());
  return {r[0], r[1], r[2]};
}

template <class From, class T>
void half_norms(const From* x, int64_t first, int64_t end, int64_t d, T* out) {
  for (int64_t i = first; i < end; ++i) {
    double sums[8] = {};
    for (int64_t e = 0; e < d; ++e) sums[e % 8] += double(x[i * d + e]) * double(x[i * d + e]);
    out[i] = static_cast<T>(std::accumulate(sums, sums + 8, 0.0) / -2);
  }
}

// Of a small problem the caller alone: to wake others takes longer than their share of it.
Parallel threads_of(const PairProblem& p) {
  constexpr double kAlone = 1 << 20;  // multiply-adds of a product
  Parallel threads = torch_threads();
  if (double(p.rows.count) * p.columns.count * p.d <= kAlone) threads.threads = 1;
  return threads;
}

// -|x|^2 / 2 a row, in the type that sums are held in.
Tensor half_norms(const Tensor& x, at::ScalarType accumulate) {
  const Tensor out = at::empty({x.size(0)}, x.options().dtype(accumulate));
  const auto of = [&](const auto* rows, auto* to) {
    on_runs(x.size(0), 256,
            [&](int64_t first, int64_t end) { half_norms(rows, first, end, x.size(1), to); });
  };
  if (x.scalar_type() == at::kDouble) {
    of(x.const_data_ptr<double>(), out.data_ptr<double>());
  } else if (x.scalar_type() == at::kBFloat16) {
    of(x.const_data_ptr<at::BFloat16>(), out.data_ptr<float>());
  } else if (x.scalar_type() == at::kHalf) {
    of(x.const_data_ptr<at::Half>(), out.data_ptr<float>());
  } else {
    of(x.const_data_ptr<float>(), out.data_ptr<float>());
  }
  return out;
}

// A PairProblem and what it points to.
struct PairCall {
  Tensor x, y;
  std::vector<Tensor> held;
  at::ScalarType accumulate;
  PairProblem problem;

  const void* vector(const OptionalTensor& t, at::ScalarType type, at::IntArrayRef shape,
                     const char* name) {
    if (!t) return nullptr;
    TORCH_CHECK_VALUE(t->sizes() == shape, name, ": expected ", shape, ", got ", t->sizes());
    held.push_back(t->to(type).contiguous());
    return held.back().const_data_ptr();
  }

  const int32_t* indices(const OptionalTensor& t, at::IntArrayRef shape, const char* name) {
    TORCH_CHECK_TYPE(!t || t->scalar_type() == at::kInt, name, ": expected int32");
    return static_cast<const int32_t*>(vector(t, at::kInt, shape, name));
  }

  PairCall(const Tensor& x_in, const Tensor& y_in, const Tensor& scale,
           const OptionalTensor& x_bias, const OptionalTensor& y_bias,
           const OptionalTensor& x_labels, const OptionalTensor& y_labels,
           const OptionalTensor& x_ids, const OptionalTensor& y_ids, const OptionalTensor& x_groups,
           const OptionalTensor& y_groups, const OptionalTensor& exclude,
           const OptionalTensor& x_window, const OptionalTensor& y_window, c10::string_view score,
           c10::ArrayRef<double> positive, c10::ArrayRef<double> negative, bool skip_self,
           bool triangle, bool apart, c10::string_view precision,
           c10::string_view reduction = "lse", bool cols = false, const Tensor* values = nullptr) {
    TORCH_CHECK_VALUE(x_in.dim() == 2 && y_in.dim() == 2 && x_in.size(1) == y_in.size(1),
                      "pairs: expected x [N, D] and y [M, D], got ", x_in.sizes(), " and ",
                      y_in.sizes());
    TORCH_CHECK_TYPE(x_in.scalar_type() == y_in.scalar_type(),
                     "pairs: expected x and y of one dtype, got ", x_in.scalar_type(), " and ",
                     y_in.scalar_type());
    accumulate = x_in.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    x = x_in.to(accumulate).contiguous();
    // 16-bit columns are read where they lie
    const bool alike = !values || values->scalar_type() == y_in.scalar_type();
    const Stored stored = triangle || !alike ? Stored::kWide : stored_as(y_in);
    y = triangle ? x : alike ? dense_as_stored(y_in) : y_in.to(accumulate).contiguous();
    const int64_t n = x.size(0), m = y.size(0);
    const auto paired = [&](const OptionalTensor& a, const OptionalTensor& b, const char* name) {
      TORCH_CHECK_VALUE(triangle || a.has_value() == b.has_value(), name,
                        ": expected of both sides or of neither");
    };
    paired(x_labels, y_labels, "labels");
    paired(x_ids, y_ids, "ids");
    paired(x_groups, y_groups, "groups");
    const auto side = [&](const Tensor& t, const OptionalTensor& bias, const OptionalTensor& labels,
                          const OptionalTensor& ids, const OptionalTensor& groups,
                          const OptionalTensor& window, const std::array<const char*, 5>& names) {
      const int64_t count = t.size(0);
      return PairSide{t.const_data_ptr(),
                      count,
                      vector(bias, accumulate, {count}, names[0]),
                      indices(labels, {count}, names[1]),
                      indices(ids, {count}, names[2]),
                      indices(groups, {count}, names[3]),
                      vector(window, accumulate, {4, count}, names[4]),
                      nullptr};
    };
    problem = {};
    problem.rows = side(x, x_bias, x_labels, x_ids, x_groups, x_window,
                        {"x_bias", "x_labels", "x_ids", "x_groups", "x_window"});
    problem.columns = triangle ? problem.rows
                               : side(y, y_bias, y_labels, y_ids, y_groups, y_window,
                                      {"y_bias", "y_labels", "y_ids", "y_groups", "y_window"});
    TORCH_CHECK_VALUE(!exclude || !triangle, "exclude: not with triangle");
    problem.d = x.size(1);
    problem.scale = number_of(scale);
    if (apart) lower();
    problem.excluded = exclude ? exclude->size(1) : 0;
    problem.exclude = indices(exclude, {n, problem.excluded}, "exclude");
    TORCH_CHECK_VALUE(score == "linear" || score == "root", "score: expected linear or root, got ",
                      score);
    problem.score = score == "root" ? Score::kRoot : Score::kLinear;
    problem.rule[kPositive] = rule_of(positive, "positive");
    problem.rule[kNegative] = rule_of(negative, "negative");
    TORCH_CHECK_VALUE(reduction == "lse" || reduction == "softplus" || reduction == "relu",
                      "reduction: expected lse, softplus or relu, got ", reduction);
    problem.reduction = reduction == "lse"    ? Reduction::kLse
                        : reduction == "relu" ? Reduction::kRelu
                                              : Reduction::kSoftplus;
    problem.skip_self = skip_self;
    problem.triangle = triangle;
    problem.both = cols || triangle;
    problem.is_double = accumulate == at::kDouble;
    problem.precision = precision_of(precision);
    problem.stored = stored;
    TORCH_CHECK(n < std::numeric_limits<int32_t>::max() && m < std::numeric_limits<int32_t>::max(),
                "pairs: expected fewer than 2^31 rows");
  }

  // -scale |x - y|^2 as the kernels want it.
  void lower() {
    const bool one = y.const_data_ptr() == x.const_data_ptr() && y.size(0) == x.size(0);
    problem.apart = true;
    held.push_back(half_norms(x, accumulate));
    problem.rows.half_norms = held.back().const_data_ptr();
    if (!one) held.push_back(half_norms(y, accumulate));
    problem.columns.half_norms = held.back().const_data_ptr();
    problem.scale *= 2;
  }

  // As the columns are stored, or of the sums' type.
  Tensor of_columns(at::IntArrayRef shape) const {
    const Tensor t = at::empty(shape, y.options());
    advise_huge(t);
    return t;
  }

  // Room for the products of the first strips of rows.
  void keep(const Tensor& kept) {
    problem.kept = kept.numel() ? kept.data_ptr() : nullptr;
    problem.kept_count = kept.numel();
  }

  Tensor empty(at::IntArrayRef shape) const {
    const Tensor t = at::empty(shape, x.options());
    advise_huge(t);
    return t;
  }
};

Tensor doubles(at::IntArrayRef shape) {
  return at::empty(shape, at::TensorOptions().dtype(at::kDouble));
}

Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

std::tuple<Tensor, Tensor, Tensor> statistics(
    const Tensor& x, const Tensor& y, const Tensor& scale, const OptionalTensor& x_bias,
    const OptionalTensor& y_bias, const OptionalTensor& x_labels, const OptionalTensor& y_labels,
    const OptionalTensor& x_ids, const OptionalTensor& y_ids, const OptionalTensor& x_groups,
    const OptionalTensor& y_groups, const OptionalTensor& exclude, const OptionalTensor& x_window,
    const OptionalTensor& y_window, c10::string_view score, c10::ArrayRef<double> positive,
    c10::ArrayRef<double> negative, bool skip_self, bool triangle, bool apart,
    c10::string_view precision, c10::string_view reduction, bool cols, int64_t kept_scores) {
  PairCall call(x, y, scale, x_bias, y_bias, x_labels, y_labels, x_ids, y_ids, x_groups, y_groups,
                exclude, x_window, y_window, score, positive, negative, skip_self, triangle, apart,
                precision, reduction, cols);
  const Tensor kept = fused_losses::kept_scores({kept_scores}, call.x.options());
  call.keep(kept);
  const PairProblem& p = call.problem;
  const Tensor rows = doubles({kStatistics, kClasses, p.rows.count});
  const Tensor columns = doubles({kStatistics, kClasses, cols && !triangle ? p.columns.count : 0});
  const PairKernels& kernels = best_kernels().pairs;
  const Parallel parallel = threads_of(p);
  const Tensor buffer = scratch(kernels.forward_bytes(p, parallel.threads));
  kernels.forward(p, {rows.data_ptr<double>(), columns.data_ptr<double>()}, aligned(buffer),
                  parallel);
  return {rows, columns, kept};
}

// The gradients' tensors, and the pointers that a kernel writes through.
struct Gradients {
  Tensor dx, dy, dscale, dx_bias, dy_bias;
  PairBackwardOut out = {};
  at::TensorOptions narrow;  // of the sums

  Gradients(const PairCall& call, const OptionalTensor& x_bias, const OptionalTensor& y_bias,
            bool need_x, bool need_y, bool need_scale, bool need_x_bias, bool need_y_bias)
      : narrow(call.x.options()) {
    const PairProblem& p = call.problem;
    TORCH_CHECK_NOT_IMPLEMENTED(!p.apart || !(need_x_bias || need_y_bias),
                                "x_bias, y_bias: have no gradient with apart");
    if (need_x) {
      dx = call.empty(call.x.sizes());
      out.dx = dx.data_ptr();
    }
    if (need_y) {
      dy = call.of_columns(call.y.sizes());
      out.dy = dy.data_ptr();
    }
    if (need_scale) {
      dscale = doubles({});
      out.dscale = dscale.data_ptr<double>();
    }
    if (need_x_bias && x_bias) {
      dx_bias = call.empty({p.rows.count});
      out.dx_bias = dx_bias.data_ptr();
    }
    if (need_y_bias && y_bias) {
      dy_bias = call.empty({p.columns.count});
      out.dy_bias = dy_bias.data_ptr();
    }
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> as(const Tensor& x, const Tensor& y,
                                                        const Tensor& scale) const {
    // what was not asked for is empty
    const auto found = [](const Tensor& t, const at::TensorOptions& like) {
      return t.defined() ? t.to(c10::typeMetaToScalarType(like.dtype())) : at::empty({0}, like);
    };
    return {found(dx, x.options()), found(dy, y.options()), found(dscale, scale.options()),
            found(dx_bias, narrow), found(dy_bias, narrow)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> statistics_backward(
    const Tensor& grad_rows, const Tensor& grad_columns, const Tensor& rows, const Tensor& columns,
    const Tensor& kept, const Tensor& x, const Tensor& y, const Tensor& scale,
    const OptionalTensor& x_bias, const OptionalTensor& y_bias, const OptionalTensor& x_labels,
    const OptionalTensor& y_labels, const OptionalTensor& x_ids, const OptionalTensor& y_ids,
    const OptionalTensor& x_groups, const OptionalTensor& y_groups, const OptionalTensor& exclude,
    const OptionalTensor& x_window, const OptionalTensor& y_window, c10::string_view score,
    c10::ArrayRef<double> positive, c10::ArrayRef<double> negative, bool skip_self, bool triangle,
    bool apart, c10::string_view precision, c10::string_view reduction, bool cols, bool need_x,
    bool need_y, bool need_scale, bool need_x_bias, bool need_y_bias) {
  PairCall call(x, y, scale, x_bias, y_bias, x_labels, y_labels, x_ids, y_ids, x_groups, y_groups,
                exclude, x_window, y_window, score, positive, negative, skip_self, triangle, apart,
                precision, reduction, cols);
  TORCH_CHECK_VALUE(kept.scalar_type() == call.accumulate && kept.is_contiguous(),
                    "kept: expected what the forward gave, got ", kept.sizes());
  call.keep(kept);
  const PairProblem& p = call.problem;
  const Gradients g(call, x_bias, y_bias, need_x, need_y, need_scale, need_x_bias, need_y_bias);
  std::vector<Tensor> held;
  for (const Tensor* t : {&grad_rows, &grad_columns, &rows, &columns}) {
    held.push_back(t->to(at::kDouble).contiguous());
  }
  const PairBackwardIn in = {held[0].const_data_ptr<double>(), held[1].const_data_ptr<double>(),
                             held[2].const_data_ptr<double>(), held[3].const_data_ptr<double>()};
  const PairKernels& kernels = best_kernels().pairs;
  const Parallel parallel = threads_of(p);
  const Tensor buffer = scratch(kernels.backward_bytes(p, g.out, parallel.threads));
  kernels.backward(p, in, g.out, aligned(buffer), parallel);
  // of 2 scale
  if (p.apart && g.out.dscale) *g.out.dscale *= 2;
  return g.as(x, y, scale);
}

AttentionIn attention_in(const Tensor& values, const PairCall& call, bool positives) {
  TORCH_CHECK_VALUE(values.dim() == 2 && values.size(0) == call.y.size(0), "values: expected [",
                    call.y.size(0), ", Dv], got ", values.sizes());
  return {values.const_data_ptr(), values.size(1), positives};
}

std::tuple<Tensor, Tensor> attention(const Tensor& values_in, const Tensor& x, const Tensor& y,
                                     const Tensor& scale, const OptionalTensor& x_bias,
                                     const OptionalTensor& y_bias, const OptionalTensor& x_labels,
                                     const OptionalTensor& y_labels, const OptionalTensor& x_ids,
                                     const OptionalTensor& y_ids, const OptionalTensor& x_groups,
                                     const OptionalTensor& y_groups, const OptionalTensor& exclude,
                                     const OptionalTensor& x_window, const OptionalTensor& y_window,
                                     c10::string_view score, c10::ArrayRef<double> positive,
                                     c10::ArrayRef<double> negative, bool skip_self, bool triangle,
                                     bool apart, c10::string_view precision, bool positives) {
  TORCH_CHECK_VALUE(!triangle, "pair_attention: not with triangle");
  const PairCall call(x, y, scale, x_bias, y_bias, x_labels, y_labels, x_ids, y_ids, x_groups,
                      y_groups, exclude, x_window, y_window, score, positive, negative, skip_self,
                      triangle, apart, precision, "lse", false, &values_in);
  const PairProblem& p = call.problem;
  const Tensor values = values_in.to(call.y.scalar_type()).contiguous();
  const AttentionIn in = attention_in(values, call, positives);
  const Tensor out = call.empty({p.rows.count, in.width}), lse = doubles({p.rows.count});
  const PairKernels& kernels = best_kernels().pairs;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.attention_bytes(p, in, parallel.threads));
  kernels.attention(p, in, {out.data_ptr(), lse.data_ptr<double>()}, aligned(buffer), parallel);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_out, const Tensor& grad_lse, const Tensor& out, const Tensor& lse,
    const Tensor& values_in, const Tensor& x, const Tensor& y, const Tensor& scale,
    const OptionalTensor& x_bias, const OptionalTensor& y_bias, const OptionalTensor& x_labels,
    const OptionalTensor& y_labels, const OptionalTensor& x_ids, const OptionalTensor& y_ids,
    const OptionalTensor& x_groups, const OptionalTensor& y_groups, const OptionalTensor& exclude,
    const OptionalTensor& x_window, const OptionalTensor& y_window, c10::string_view score,
    c10::ArrayRef<double> positive, c10::ArrayRef<double> negative, bool skip_self, bool triangle,
    bool apart, c10::string_view precision, bool positives, bool need_values, bool need_x,
    bool need_y, bool need_scale, bool need_x_bias, bool need_y_bias) {
  const PairCall call(x, y, scale, x_bias, y_bias, x_labels, y_labels, x_ids, y_ids, x_groups,
                      y_groups, exclude, x_window, y_window, score, positive, negative, skip_self,
                      triangle, apart, precision, "lse", false, &values_in);
  const PairProblem& p = call.problem;
  const Tensor values = values_in.to(call.y.scalar_type()).contiguous();
  const AttentionIn in = attention_in(values, call, positives);
  const Gradients g(call, x_bias, y_bias, need_x, need_y, need_scale, need_x_bias, need_y_bias);
  const Tensor dvalues = need_values ? call.of_columns(values.sizes()) : nothing(values);
  const Tensor grad = grad_out.to(call.accumulate).contiguous();
  const Tensor shift =
      at::sub(at::linalg_vecdot(grad, out, 1).to(at::kDouble), grad_lse).contiguous();
  const Tensor lse_in = lse.to(at::kDouble).contiguous();
  const AttentionBackwardIn given = {grad.const_data_ptr(), shift.const_data_ptr<double>(),
                                     lse_in.const_data_ptr<double>()};
  const PairKernels& kernels = best_kernels().pairs;
  const Parallel parallel = torch_threads();
  const Tensor buffer =
      scratch(kernels.attention_backward_bytes(p, in, g.out, need_values, parallel.threads));
  kernels.attention_backward(p, in, given, g.out, need_values ? dvalues.data_ptr() : nullptr,
                             aligned(buffer), parallel);
  // of 2 scale
  if (p.apart && g.out.dscale) *g.out.dscale *= 2;
  return std::tuple_cat(std::tuple(dvalues.to(values_in.scalar_type())), g.as(x, y, scale));
}

}  // namespace

void register_pairs(torch::Library& m) {
  m.impl("pair_statistics_cpu", &statistics);
  m.impl("pair_statistics_cpu_backward", &statistics_backward);
  m.impl("pair_attention_cpu", &attention);
  m.impl("pair_attention_cpu_backward", &attention_backward);
}

}  // namespace fused_losses
