// The cpu ops of the divergences (schemas: primitives/divergence); module.cpp registers them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
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
using Kind = DivergenceKind;

Kind kind_of(c10::string_view name) {
  const std::pair<const char*, Kind> kinds[] = {{"forward", Kind::kForward},
                                                {"reverse", Kind::kReverse},
                                                {"power", Kind::kPower},
                                                {"jensen_shannon", Kind::kJensenShannon},
                                                {"total_variation", Kind::kTotalVariation},
                                                {"bernoulli", Kind::kBernoulli},
                                                {"bernoulli_norm", Kind::kBernoulliNorm},
                                                {"squared", Kind::kSquared}};
  for (const auto& [known, kind] : kinds) {
    if (name == known) return kind;
  }
  TORCH_CHECK_VALUE(false, "kind: expected a kind of divergence, got ", name);
}

at::ScalarType accumulated_type(at::ScalarType weight) {
  return weight == at::kDouble ? at::kDouble : at::kFloat;
}

// Matrices of scores that are kept: u and v (near, u - v), or beside a dense teacher u alone.
int64_t planes(bool dense) { return dense ? 1 : 2; }

// A DivergenceProblem and what it points to.
struct DivergenceCall {
  Tensor x, weight, teacher, labels;
  OptionalTensor teacher_weight, classes, bias, teacher_bias, teacher_scale;
  std::vector<Target> targets;
  at::ScalarType accumulate;
  DivergenceProblem problem;

  DivergenceCall(const Tensor& x_in, const Tensor& weight_in, const Tensor& teacher_in,
                 const OptionalTensor& teacher_weight_in, const Tensor& labels_in,
                 const OptionalTensor& classes_in, const OptionalTensor& bias_in,
                 const OptionalTensor& teacher_bias_in, const OptionalTensor& teacher_scale_in,
                 bool normalize, bool teacher_normalize, c10::string_view kind,
                 at::ArrayRef<double> params, c10::string_view precision, const Tensor& kept)
      : x(dense_rows(x_in)),
        weight(dense_rows(weight_in)),
        teacher(teacher_weight_in ? dense_rows(teacher_in) : teacher_in),
        labels(labels_in.contiguous()) {
    if (teacher_weight_in) teacher_weight = dense_rows(*teacher_weight_in);
    accumulate = accumulated_type(weight.scalar_type());
    const int64_t n = x.size(0), c = weight.size(0);
    TORCH_CHECK_VALUE(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                      "divergence: expected x [N, D] and weight [C, D], got ", x.sizes(), " and ",
                      weight.sizes());
    check_side("teacher", teacher, n, teacher_weight ? teacher_weight->size(1) : c);
    if (teacher_weight) check_side("teacher_weight", *teacher_weight, c, teacher.size(1));
    for (const Tensor* t :
         {&x, teacher_weight ? &teacher : nullptr, teacher_weight ? &*teacher_weight : nullptr}) {
      TORCH_CHECK_TYPE(!t || (t->scalar_type() == at::kDouble) == (accumulate == at::kDouble),
                       "divergence: expected rows and weights all in float64 or none");
    }
    TORCH_CHECK_VALUE(labels.dim() == 1 && labels.size(0) == n && labels.scalar_type() == at::kLong,
                      "labels: expected int64 [", n, "], got ", labels.scalar_type(), " ",
                      labels.sizes());
    if (classes_in) classes = classes_in->contiguous();
    bias = accumulated(bias_in, accumulate);
    teacher_bias = accumulated(teacher_bias_in, accumulate);
    teacher_scale = accumulated(teacher_scale_in, accumulate);
    targets = find_targets(labels, classes, c);
    Problem side = {};
    side.n = n;
    side.k = classes ? classes->numel() : c;
    side.ids = classes ? classes->const_data_ptr<int64_t>() : nullptr;
    side.targets = targets.data();
    side.target_count = static_cast<int64_t>(targets.size());
    side.precision = precision_of(precision);
    side.gemm = host_products();
    problem = {side, side, {}, kind_of(kind), params.empty() ? 0 : params[0]};
    TORCH_CHECK_VALUE(kept.dim() == 3 && kept.size(0) == planes(!teacher_weight) &&
                          kept.size(2) == round_up(n, kKeptPadding) &&
                          kept.scalar_type() == accumulate && kept.is_contiguous(),
                      "kept: expected what the forward gave, got ", kept.sizes());
    for (int64_t at = 0; kept.numel() && at < kept.size(0); ++at) {
      Problem& of = at ? problem.teacher : problem.student;
      of.kept = static_cast<char*>(kept.data_ptr()) + at * kept.stride(0) * kept.element_size();
      of.kept_classes = kept.size(1);
    }
    set_side(problem.student, x, weight, bias, normalize);
    if (teacher_weight) {
      set_side(problem.teacher, teacher, *teacher_weight, teacher_bias, teacher_normalize);
      return;
    }
    problem.teacher.x.type = problem.teacher.w.type =
        accumulate == at::kDouble ? Type::kFloat64 : Type::kFloat32;
    problem.teacher.bias = teacher_bias ? teacher_bias->const_data_ptr() : nullptr;
    problem.dense = {teacher.const_data_ptr(), type_of(teacher), teacher.stride(0),
                     teacher.stride(1), teacher_scale ? teacher_scale->const_data_ptr() : nullptr};
  }

 private:
  static void check_side(const char* name, const Tensor& t, int64_t rows, int64_t columns) {
    TORCH_CHECK_VALUE(t.dim() == 2 && t.size(0) == rows && t.size(1) == columns, name,
                      ": expected [", rows, ", ", columns, "], got ", t.sizes());
  }

  static void set_side(Problem& side, const Tensor& rows, const Tensor& weights,
                       const OptionalTensor& bias, bool normalize) {
    side.x = {rows.const_data_ptr(), type_of(rows), rows.stride(0)};
    side.w = {weights.const_data_ptr(), type_of(weights), weights.stride(0)};
    side.d = rows.size(1);
    side.bias = bias ? bias->const_data_ptr() : nullptr;
    side.normalize = normalize;
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& x, const Tensor& weight, const Tensor& teacher,
    const OptionalTensor& teacher_weight, const Tensor& labels, const OptionalTensor& classes,
    const OptionalTensor& bias, const OptionalTensor& teacher_bias,
    const OptionalTensor& teacher_scale, bool normalize, bool teacher_normalize,
    c10::string_view kind, at::ArrayRef<double> params, c10::string_view precision,
    int64_t kept_classes) {
  const int64_t n = x.size(0);
  const Tensor kept =
      kept_scores({planes(!teacher_weight), kept_classes, round_up(n, kKeptPadding)},
                  weight.options().dtype(accumulated_type(weight.scalar_type())));
  const DivergenceCall call(x, weight, teacher, teacher_weight, labels, classes, bias, teacher_bias,
                            teacher_scale, normalize, teacher_normalize, kind, params, precision,
                            kept);
  const auto doubles = x.options().dtype(at::kDouble);
  const Tensor lse = at::empty({n}, doubles), teacher_lse = at::empty({n}, doubles);
  const Tensor target = at::empty({n}, doubles), teacher_target = at::empty({n}, doubles);
  const int rows = folds_of(call.problem.kind) + kept_of(call.problem.kind);
  const Tensor folds = at::empty({rows, n}, doubles);
  if (n > 0) {
    const DivergenceKernels& kernels = best_kernels().divergence;
    const Parallel parallel = parallel_for_classes(call.problem.student.k);
    const Tensor buffer = scratch(kernels.forward_bytes(call.problem, parallel.threads));
    const DivergenceForwardOut out = {lse.data_ptr<double>(), teacher_lse.data_ptr<double>(),
                                      target.data_ptr<double>(), teacher_target.data_ptr<double>(),
                                      folds.data_ptr<double>()};
    kernels.forward(call.problem, out, aligned(buffer), parallel);
  }
  return {lse, teacher_lse, target, teacher_target, folds, kept};
}

using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SevenTensors backward(const Tensor& grad_lse, const Tensor& grad_teacher_lse,
                      const Tensor& grad_target, const Tensor& grad_teacher_target,
                      const Tensor& grad_folds, const Tensor& x, const Tensor& weight,
                      const Tensor& teacher, const OptionalTensor& teacher_weight,
                      const Tensor& labels, const OptionalTensor& classes,
                      const OptionalTensor& bias, const OptionalTensor& teacher_bias,
                      const OptionalTensor& teacher_scale, bool normalize, bool teacher_normalize,
                      c10::string_view kind, at::ArrayRef<double> params,
                      c10::string_view precision, const Tensor& lse, const Tensor& teacher_lse,
                      const Tensor& folds, const Tensor& kept, bool compact, bool need_x,
                      bool need_weight, bool need_teacher, bool need_teacher_weight, bool need_bias,
                      bool need_teacher_bias, bool need_teacher_scale) {
  const DivergenceCall call(x, weight, teacher, teacher_weight, labels, classes, bias, teacher_bias,
                            teacher_scale, normalize, teacher_normalize, kind, params, precision,
                            kept);
  const auto wide = weight.options().dtype(call.accumulate);
  // one for each: an op's results share no memory
  const auto nothing = [&] { return at::empty({0}, weight.options()); };
  const bool part = compact && call.classes;
  const bool whole = (!classes || part) && x.size(0) > 0;
  const auto of_rows = [&](bool need, const Tensor& rows) {
    return need ? at::empty(rows.sizes(), rows.options()) : nothing();
  };
  const auto of_weight = [&](bool need, const OptionalTensor& w) {
    if (!need || !w) return nothing();
    const std::vector<int64_t> shape = {part ? call.problem.student.k : w->size(0), w->size(1)};
    const Tensor dw = whole ? at::empty(shape, w->options()) : at::zeros(shape, w->options());
    advise_huge(dw);
    return dw;
  };
  const auto of_vector = [&](bool need, const OptionalTensor& v) {
    return need && v ? at::zeros(v->sizes(), wide) : nothing();
  };
  const bool dense = !teacher_weight;
  const Tensor dx = of_rows(need_x, x), dw = of_weight(need_weight, weight);
  // classes outside those that take part have a gradient of zero
  Tensor dteacher =
      dense && need_teacher ? at::zeros(teacher.sizes(), wide) : of_rows(need_teacher, teacher);
  const Tensor dteacher_weight = of_weight(need_teacher_weight, teacher_weight);
  Tensor db = of_vector(need_bias, bias),
         dteacher_bias = of_vector(need_teacher_bias, teacher_bias);
  Tensor dscale = of_vector(need_teacher_scale, teacher_scale);
  if (x.size(0) > 0) {
    const auto pointer = [&](bool need, const Tensor& t) {
      return need && t.numel() ? t.data_ptr() : nullptr;
    };
    DivergenceBackwardOut out = {};
    out.student = {pointer(need_x, dx), pointer(need_weight, dw), pointer(need_bias, db), part};
    out.teacher = {pointer(need_teacher && !dense, dteacher),
                   pointer(need_teacher_weight, dteacher_weight),
                   pointer(need_teacher_bias, dteacher_bias), part};
    out.ddense = pointer(need_teacher && dense, dteacher);
    out.dense_columns = weight.size(0);
    out.dscale = pointer(need_teacher_scale, dscale);
    const DivergenceKernels& kernels = best_kernels().divergence;
    const Parallel parallel = parallel_for_classes(call.problem.student.k);
    const Tensor buffer = scratch(kernels.backward_bytes(call.problem, out, parallel.threads));
    const auto narrow = [&](const Tensor& t) { return t.to(call.accumulate).contiguous(); };
    const Tensor g_lse = narrow(grad_lse), g_teacher_lse = narrow(grad_teacher_lse);
    const Tensor g_target = narrow(grad_target), g_teacher_target = narrow(grad_teacher_target);
    const Tensor g_folds = narrow(grad_folds);
    const auto saved = [](const Tensor& t) { return t.to(at::kDouble).contiguous(); };
    const Tensor of_lse = saved(lse), of_teacher = saved(teacher_lse), of_folds = saved(folds);
    // folds that others joined stand alone
    const int rows = folds_of(call.problem.kind);
    const bool whole_folds = of_folds.size(0) == rows + kept_of(call.problem.kind);
    const double* of_kept =
        whole_folds ? of_folds.const_data_ptr<double>() + rows * x.size(0) : nullptr;
    const DivergenceBackwardIn in = {g_lse.const_data_ptr(),
                                     g_teacher_lse.const_data_ptr(),
                                     g_target.const_data_ptr(),
                                     g_teacher_target.const_data_ptr(),
                                     g_folds.const_data_ptr(),
                                     of_lse.const_data_ptr<double>(),
                                     of_teacher.const_data_ptr<double>(),
                                     of_folds.const_data_ptr<double>(),
                                     of_kept};
    kernels.backward(call.problem, in, out, aligned(buffer), parallel);
  }
  const auto as = [](const Tensor& t, bool need, const OptionalTensor& like) {
    return need && like ? t.to(like->scalar_type()) : t;
  };
  return {dx,
          dw,
          as(dteacher, need_teacher, teacher),
          dteacher_weight,
          as(db, need_bias, bias),
          as(dteacher_bias, need_teacher_bias, teacher_bias),
          as(dscale, need_teacher_scale, teacher_scale)};
}

}  // namespace

// With many classes; teacher_d = 0: of dense scores.
size_t divergence_workspace(int64_t n, int64_t d, int64_t teacher_d, int64_t item,
                            const std::string& precision, bool gradient, bool teacher_gradient) {
  DivergenceProblem p = {};
  for (Problem* side : {&p.student, &p.teacher}) {
    side->x.type = item == 8 ? Type::kFloat64 : Type::kFloat32;
    side->w.type = item == 2 ? Type::kBFloat16 : side->x.type;
    side->n = n;
    side->d = side == &p.student ? d : teacher_d;
    side->k = int64_t(1) << 30;
    side->normalize = true;
    side->gemm = host_products();
    side->precision = precision_of(precision);
  }
  int64_t scores = 0;
  if (teacher_d == 0) p.dense = {&scores, Type::kFloat32, 0, 0, nullptr};
  if (teacher_d == 0) p.teacher.w.type = p.student.x.type;
  DivergenceBackwardOut out = {};
  out.student = {&scores, &scores, nullptr, false};
  if (teacher_gradient && teacher_d) out.teacher = out.student;
  const DivergenceKernels& kernels = best_kernels().divergence;
  const int threads = torch_threads().threads;
  return scratch_bytes(gradient ? kernels.backward_bytes(p, out, threads)
                                : kernels.forward_bytes(p, threads));
}

void register_divergence(torch::Library& m) {
  m.impl("divergence_cpu", &forward);
  m.impl("divergence_cpu_backward", &backward);
}

}  // namespace fused_losses
