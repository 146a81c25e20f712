// A sweep over pairs in plain eager code on the CPU (base/compiled.py): its arguments checked in
// one pass, its rows marked, the op called with its gradient in C++.
#include <ATen/ops/add.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/select.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <utility>

#include "calls.h"
#include "streamed.h"

namespace fused_losses {
namespace {

using at::Tensor;

// Where PairInputs (primitives/pairs/inputs.py) has its fields, as the op's schema has them.
enum Field : size_t {
  kX,
  kY,
  kScale,
  kXBias,
  kYBias,
  kXLabels,
  kYLabels,
  kXIds,
  kYIds,
  kXGroups,
  kYGroups,
  kExclude,
  kXWindow,
  kYWindow,
  kScore,
  kPositiveRule,
  kNegativeRule,
  kSkipSelf,
  kTriangle,
  kApart,
  kPrecision,
  kFields
};
constexpr size_t kTensors = kScore;

// A view that is no view to autograd, but notices a change as one does.
Tensor part(const Tensor& t, int64_t i) {
  // past the dispatcher, which takes longer than the rest
  const Tensor out = at::native::as_strided_tensorimpl(t, t.sizes().slice(1), t.strides().slice(1),
                                                       t.storage_offset() + i * t.stride(0));
  torch::autograd::impl::set_version_counter(out, torch::autograd::impl::version_counter(t));
  return out;
}

struct PairStatistics {
  static constexpr const char* kName = "pair_statistics_cpu";
  static constexpr size_t kMoving = kXLabels, kTold = 1;

  // Value and total of the rows, and of the columns if they were asked for.
  static variable_list outputs(const Stack& found) {
    variable_list out;
    for (size_t side = 0; side < 2; ++side) {
      const Tensor& all = found[side].toTensor();
      if (side > 0 && all.numel() == 0) break;
      out.insert(out.end(), {part(all, kValue), part(all, kTotal)});
    }
    return out;
  }

  static Stack before(const variable_list& grads, const variable_list& outputs,
                      const variable_list& found, bool further) {
    std::array<Tensor, 2> of_grads, statistics = {found[0], found[1]};
    for (size_t side = 0; side < 2; ++side) {
      const bool some = 2 * side < outputs.size();
      const Tensor* given = some ? &grads[2 * side] : nullptr;
      if (!further || !some) {
        of_grads[side] = joined(given, found[side].size(2));
        continue;
      }
      const Tensor &value = outputs[2 * side], &total = outputs[2 * side + 1];
      const auto or_zeros = [](const Tensor& g, const Tensor& like) {
        return g.defined() ? g : at::zeros_like(like);
      };
      of_grads[side] = at::stack({or_zeros(given[0], value), or_zeros(given[1], total)});
      statistics[side] =
          at::stack({value, total, found[side].select(0, kCount), found[side].select(0, kBest)});
    }
    return {of_grads[0], of_grads[1], statistics[0], statistics[1], found[2]};
  }

 private:
  // The gradients of value and total in one tensor, null: of nothing.
  static Tensor joined(const Tensor* given, int64_t count) {
    const Tensor out = at::empty({2, kClasses, count}, at::TensorOptions().dtype(at::kDouble));
    const int64_t size = kClasses * count;
    for (int64_t k = 0; k < 2; ++k) {
      double* to = out.data_ptr<double>() + k * size;
      if (given && given[k].defined()) {
        const Tensor from = given[k].contiguous();
        std::copy_n(from.const_data_ptr<double>(), size, to);
      } else {
        std::fill_n(to, size, 0.0);
      }
    }
    return out;
  }
};

// A field's tensor, undefined for None; null where it is neither, or not as helpers have them.
const Tensor* tensor_of(const py::handle& field) {
  static const Tensor nothing;
  if (field.is_none()) return &nothing;
  return is_plain(field) ? &THPVariable_Unpack(field.ptr()) : nullptr;
}

bool has_shape(const Tensor& t, at::IntArrayRef shape) { return t.sizes() == shape; }

bool is_rows(const Tensor& t) {
  return t.defined() && t.dim() == 2 && (t.size(1) <= 1 || t.stride(1) == 1);
}

bool is_known(const py::handle& field, std::initializer_list<const char*> names) {
  if (!py::isinstance<py::str>(field)) return false;
  const auto name = field.cast<std::string_view>();
  return std::any_of(names.begin(), names.end(), [&](const char* known) { return name == known; });
}

bool is_rule(const py::handle& field) {
  if (!py::isinstance<py::tuple>(field)) return false;
  const auto rule = py::reinterpret_borrow<py::tuple>(field);
  return rule.size() == 3 && std::all_of(rule.begin(), rule.end(), [](const py::handle& number) {
           return PyFloat_Check(number.ptr()) || PyLong_CheckExact(number.ptr());
         });
}

c10::List<double> rule_of(const py::handle& field) {
  c10::List<double> out;
  for (const py::handle& number : field) out.push_back(number.cast<double>());
  return out;
}

// How many scores a small call keeps: all, if a gradient is asked for and they fit `bytes`.
int64_t small_kept(const Stack& arguments, int64_t bytes, bool triangle) {
  const auto moves = [](const c10::IValue& t) {
    return t.isTensor() && t.toTensor().requires_grad();
  };
  const auto moving = arguments.begin() + PairStatistics::kMoving;
  if (!at::GradMode::is_enabled() || std::none_of(arguments.begin(), moving, moves)) return 0;
  const Tensor &x = arguments[kX].toTensor(), &y = arguments[kY].toTensor();
  const int64_t n = x.size(0), m = y.size(0), item = x.element_size();
  const int64_t most = bytes / std::max<int64_t>(item, sizeof(float));
  if (n * m > most) return 0;
  return pair_kept(n, m, x.size(1), item, arguments[kPrecision].toStringRef(), triangle, most);
}

Tensor marked(const Tensor& rows, const Tensor& bias) {
  const auto wide = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor marks = row_marks(rows);
  return bias.defined() ? at::add(bias, marks.to(wide).to(bias.scalar_type())) : marks.to(wide);
}

}  // namespace

bool pairs_fit(const py::tuple& inputs) {
  if (inputs.size() != kFields || !is_eager()) return false;
  std::array<const Tensor*, kTensors> t;
  for (size_t i = 0; i < kTensors; ++i) {
    t[i] = tensor_of(inputs[i]);
    if (!t[i]) return false;
  }
  for (const size_t flag : {kSkipSelf, kTriangle, kApart}) {
    if (!PyBool_Check(inputs[flag].ptr())) return false;
  }
  // powers run in PyTorch alone
  if (!is_known(inputs[kScore], {"linear", "root"}) || !is_rule(inputs[kPositiveRule]) ||
      !is_rule(inputs[kNegativeRule]) ||
      !is_known(inputs[kPrecision], {"fp32", "tf32", "mixed", "bf16"})) {
    return false;
  }
  const Tensor &x = *t[kX], &y = *t[kY];
  if (!is_rows(x) || !is_rows(y) || x.size(1) != y.size(1) || x.scalar_type() != y.scalar_type() ||
      !at::isFloatingType(x.scalar_type()) || x.element_size() == 1 || !t[kScale]->defined()) {
    return false;
  }
  // the node takes columns of which there are none for columns that were not asked for
  if (y.size(0) == 0) return false;
  const bool triangle = inputs[kTriangle].ptr() == Py_True, apart = inputs[kApart].ptr() == Py_True;
  if (triangle && t[kExclude]->defined()) return false;
  for (size_t side = 0; side < (triangle ? 1 : 2); ++side) {
    const int64_t n = t[kX + side]->size(0);
    const Tensor &bias = *t[kXBias + side], &window = *t[kXWindow + side];
    if (bias.defined() && (!has_shape(bias, {n}) || !at::isFloatingType(bias.scalar_type()))) {
      return false;
    }
    // of pairs apart it has no gradient, which is refused
    if (apart && bias.defined() && bias.requires_grad() && at::GradMode::is_enabled()) return false;
    if (window.defined() && !has_shape(window, {4, n})) return false;
    for (const size_t kind : {kXLabels, kXIds, kXGroups}) {
      const Tensor& numbers = *t[kind + side];
      if (numbers.defined() && (!has_shape(numbers, {n}) || numbers.scalar_type() != at::kInt)) {
        return false;
      }
      if (!triangle && numbers.defined() != t[kind + 1 - side]->defined()) return false;
    }
  }
  return true;
}

py::tuple pair_statistics(const py::tuple& inputs, const std::string& reduction, bool cols,
                          int64_t kept_scores) {
  Stack arguments, found;
  arguments.reserve(kFields + 3);
  for (size_t i = 0; i < kTensors; ++i) {
    const Tensor* t = tensor_of(inputs[i]);
    TORCH_CHECK_TYPE(t, "pair_statistics: expected what pairs_fit has let pass");
    arguments.push_back(t->defined() ? c10::IValue(*t) : c10::IValue());
  }
  arguments.emplace_back(inputs[kScore].cast<std::string>());
  arguments.emplace_back(rule_of(inputs[kPositiveRule]));
  arguments.emplace_back(rule_of(inputs[kNegativeRule]));
  for (const size_t flag : {kSkipSelf, kTriangle, kApart}) {
    arguments.emplace_back(inputs[flag].cast<bool>());
  }
  arguments.emplace_back(inputs[kPrecision].cast<std::string>());
  if (kept_scores < 0) {
    kept_scores = small_kept(arguments, -kept_scores, arguments[kTriangle].toBool());
  }
  arguments.emplace_back(reduction);
  arguments.emplace_back(cols);
  arguments.emplace_back(kept_scores);

  std::array<std::array<Tensor, kStatistics>, 2> sides;
  {
    const py::gil_scoped_release unlocked;
    const bool triangle = arguments[kTriangle].toBool();
    const auto given = [&](size_t i) {
      return arguments[i].isNone() ? Tensor() : arguments[i].toTensor();
    };
    const Tensor x = given(kX), y = given(kY), x_bias = given(kXBias), y_bias = given(kYBias);
    const bool one =
        y.is_same(x) && (x_bias.defined() ? y_bias.is_same(x_bias) : !y_bias.defined());
    const Tensor of_x = marked(x, x_bias);
    arguments[kXBias] = of_x;
    arguments[kYBias] = triangle ? c10::IValue() : one ? of_x : marked(y, y_bias);
    // with triangle y is x, whose gradient x alone gets
    if (triangle) arguments[kY] = x.detach();
    const variable_list out = Streamed<PairStatistics>::run(arguments, found);
    for (size_t side = 0; side < 2; ++side) {
      const Tensor& all = found[side].toTensor();
      for (int64_t k = 0; k < kStatistics; ++k) {
        const size_t at = 2 * side + k;
        sides[side][k] = k < 2 && at < out.size() ? out[at] : part(all, k);
      }
    }
  }
  const auto row = [&](size_t side) { return py::cast(sides[side]); };
  return py::make_tuple(row(0), cols ? row(1) : py::none());
}

py::object shares_reduced(const py::tuple& rows, const py::object& columns, bool mean,
                          bool everyone, bool wide, int64_t most) {
  constexpr size_t kShares = 4;  // value, others, total, count
  std::array<std::optional<Tensor>, 2 * kShares> given;
  const auto take = [&](const py::tuple& side, size_t first) {
    for (size_t i = 0; i < kShares; ++i) {
      const Tensor* t = tensor_of(side[i]);
      if (!t) return false;
      if (!t->defined()) continue;
      if (t->numel() > most) return false;
      given[first + i] = *t;
    }
    return given[first] && given[first + 1] &&
           given[first]->scalar_type() == given[first + 1]->scalar_type();
  };
  if (!is_eager() || !take(rows, 0)) return py::none();
  if (!columns.is_none() && !take(columns, kShares)) return py::none();
  const at::ScalarType type = given[0]->scalar_type();
  if (type != at::kFloat && type != at::kDouble) return py::none();
  Tensor out;
  {
    const py::gil_scoped_release unlocked;
    out = reduced_shares(*given[0], *given[1], given[2], given[3], given[kShares],
                         given[kShares + 1], mean, everyone, wide);
  }
  return py::cast(out);
}

}  // namespace fused_losses
