// The ends of losses, a number a row, in one pass each, with gradients of any order.
//
// In plain eager mode alone (`base/compiled.py`): else the same formulas run in PyTorch.
#include <ATen/ops/add.h>
#include <ATen/ops/clamp_min.h>
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
#include <optional>
#include <tuple>
#include <utility>

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

// The truth of `numerics.share_loss`, to be differentiated further.
Tensor share_graph(const Tensor& value, const Tensor& others) {
  const Tensor positive = value.select(0, 0), zero = at::zeros_like(positive);
  const Tensor none = at::full_like(positive, -std::numeric_limits<double>::infinity());
  const Tensor some = at::logical_or(at::gt(others, zero), at::ne(positive, positive));
  const Tensor both = at::logical_and(at::ne(positive, none), some);
  const Tensor gap = at::where(both, at::sub(value.select(0, 1), positive), zero);
  return at::where(both, softplus_graph(gap), zero);
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
      return {further(share_graph(leaf, others_in), {leaf}, grads[0])[0], Tensor()};
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

// A side of `pair_sums.reduced_shares`: logsumexps [2, N] and the number of negatives [N]; where
// the positives' mean stands for their logsumexp, totals [2, N] and the number of positives [N],
// too.
struct ShareSide {
  Tensor value, others, total, count;

  ShareSide(const Tensor& value_in, const Tensor& others_in, const Tensor& total_in = {},
            const Tensor& count_in = {})
      : value(value_in.contiguous()), others(others_in.contiguous()) {
    if (!total_in.defined()) return;
    total = total_in.contiguous();
    count = count_in.contiguous();
  }
};

template <class T>
struct ShareRows {
  int64_t n;
  const T *positive, *negative, *others, *total = nullptr, *count = nullptr;

  explicit ShareRows(const ShareSide& side)
      : n(side.others.numel()),
        positive(side.value.const_data_ptr<T>()),
        negative(positive + n),
        others(side.others.const_data_ptr<T>()) {
    if (!side.total.defined()) return;
    total = side.total.const_data_ptr<T>();
    count = side.count.const_data_ptr<T>();
  }

  Standing at(int64_t i) const { return standing(positive[i], others[i]); }
  T gap(int64_t i) const { return static_cast<T>(negative[i] - positive[i]); }
  T positives(int64_t i) const { return std::max(count[i], T(1)); }
  T loss(int64_t i) const {
    const Standing row = at(i);
    const T share = row.both ? static_cast<T>(softplus(gap(i))) : T(0);
    return total && row.counted ? share + (positive[i] - total[i] / positives(i)) : share;
  }
  // What the sum of the rows is divided by.
  T divisor(bool mean, bool everyone) const {
    int64_t rows = everyone ? n : 0;
    for (int64_t i = 0; i < n && !everyone; ++i) rows += at(i).counted;
    return mean ? static_cast<T>(std::max<int64_t>(1, rows)) : T(1);
  }
};

// The reduced losses of one side, or the mean of those of two.
struct ReducedShares : torch::autograd::Function<ReducedShares> {
  struct Beside {
    Tensor others, count, second_others;
    bool mean, everyone;
    at::ScalarType dtype;
  };

  static Tensor forward(AutogradContext* ctx, const Tensor& value,
                        const std::optional<Tensor>& total, const std::optional<Tensor>& second,
                        const Beside& beside) {
    const auto or_none = [](const std::optional<Tensor>& t) { return t ? *t : Tensor(); };
    ctx->save_for_backward({value, or_none(total), or_none(second), beside.others, beside.count,
                            beside.second_others});
    ctx->saved_data["mean"] = beside.mean;
    ctx->saved_data["everyone"] = beside.everyone;
    double result = 0;
    of_wide_type(value, [&](auto type) {
      using T = decltype(type);
      const auto add = [&](const ShareSide& side) {
        const ShareRows<T> rows(side);
        const T sum = static_cast<T>(summed(rows.n, [&](int64_t i) { return rows.loss(i); }));
        result += sum / rows.divisor(beside.mean, beside.everyone);
      };
      add(ShareSide(value, beside.others, or_none(total), beside.count));
      if (second) add(ShareSide(*second, beside.second_others));
    });
    return single(second ? result / 2 : result, value.options().dtype(beside.dtype));
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor &value = saved[0], &total = saved[1], &second = saved[2], &others = saved[3];
    const Tensor &count = saved[4], &second_others = saved[5];
    const bool mean = ctx->saved_data["mean"].toBool();
    const bool everyone = ctx->saved_data["everyone"].toBool();
    const bool again = at::GradMode::is_enabled();
    variable_list out(4);
    of_wide_type(value, [&](auto type) {
      using T = decltype(type);
      const auto slopes = [&](const ShareSide& side, const Tensor& given, const Tensor& sum) {
        const T divisor = ShareRows<T>(side).divisor(mean, everyone) * (second.defined() ? 2 : 1);
        return again ? slopes_graph(given, side.others, sum, side.count, divisor, grads[0])
                     : slopes_of<T>(side, static_cast<T>(number_of(grads[0])) / divisor);
      };
      std::tie(out[0], out[1]) = slopes(ShareSide(value, others, total, count), value, total);
      if (second.defined()) out[2] = slopes(ShareSide(second, second_others), second, {}).first;
    });
    return out;
  }

 private:
  // Of value, and of total where there is one.
  template <class T>
  static std::pair<Tensor, Tensor> slopes_of(const ShareSide& side, T grad) {
    const ShareRows<T> rows(side);
    const Tensor value = at::empty(side.value.sizes(), side.value.options());
    const Tensor total = side.total.defined() ? at::zeros_like(side.total) : Tensor();
    T *down = value.data_ptr<T>(), *up = down + rows.n;
    T* of_total = total.defined() ? total.data_ptr<T>() : nullptr;
    for (int64_t i = 0; i < rows.n; ++i) {
      const Standing row = rows.at(i);
      up[i] = row.both ? static_cast<T>(grad * sigmoid(rows.gap(i))) : T(0);
      down[i] = -up[i];
      if (!of_total || !row.counted) continue;
      down[i] += grad;
      of_total[i] = -grad / rows.positives(i);
    }
    return {value, total};
  }

  // The same by operations that can be differentiated further.
  static std::pair<Tensor, Tensor> slopes_graph(const Tensor& value, const Tensor& others,
                                                const Tensor& total, const Tensor& count,
                                                double divisor, const Tensor& grad) {
    variable_list leaves = {leaf_of(value)};
    const Tensor positive = leaves[0].select(0, 0);
    Tensor loss = share_graph(leaves[0], others);
    if (total.defined()) {
      leaves.push_back(leaf_of(total));
      const Tensor mean = at::div(leaves[1].select(0, 0), at::clamp_min(count, 1));
      const Tensor none = at::full_like(positive, -std::numeric_limits<double>::infinity());
      const Tensor spread = at::sub(positive, mean);
      loss = at::add(loss, at::where(at::ne(positive, none), spread, at::zeros_like(spread)));
    }
    const Tensor of_row = at::div(grad.to(value.scalar_type()), divisor);
    const variable_list found =
        torch::autograd::grad({loss}, leaves, {of_row.expand_as(loss)}, true, true, true);
    return {found[0], total.defined() ? found[1] : Tensor()};
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
    return single(total, loss.options().dtype(dtype));
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
    const double grad = number_of(grads[0]);
    of_wide_type(out, [&](auto type) {
      using T = decltype(type);
      const T value = static_cast<T>(grad) / static_cast<T>(share);
      T* to = out.data_ptr<T>();
      for (int64_t i = 0; i < out.numel(); ++i) to[i] = counts[i] ? value : 0;
    });
    return {out, Tensor(), Tensor(), Tensor()};
  }
};

// The mean of the positives' terms and that of the negatives', added: of totals and counts [2, N].
struct MeanOfEach : torch::autograd::Function<MeanOfEach> {
  static Tensor forward(AutogradContext* ctx, const Tensor& total_in, const Tensor& count_in,
                        at::ScalarType dtype) {
    const Tensor total = total_in.contiguous(), count = count_in.contiguous();
    const int64_t n = total.size(1);
    // what each class is divided by
    const Tensor divisors = at::empty({2, 1}, total.options());
    double result = 0;
    of_wide_type(total, [&](auto type) {
      using T = decltype(type);
      for (int64_t c = 0; c < 2; ++c) {
        const T *terms = total.const_data_ptr<T>() + c * n, *of = count.const_data_ptr<T>() + c * n;
        const T sum = static_cast<T>(summed(n, [&](int64_t i) { return terms[i]; }));
        const T pairs = static_cast<T>(summed(n, [&](int64_t i) { return of[i]; }));
        divisors.data_ptr<T>()[c] = std::max(pairs, T(1));
        result += sum / divisors.data_ptr<T>()[c];
      }
    });
    ctx->save_for_backward({divisors});
    ctx->saved_data["rows"] = n;
    return single(result, total.options().dtype(dtype));
  }

  // The slopes know the gradient alone, so these operations have all further derivatives.
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Tensor divisors = ctx->get_saved_variables()[0];
    const Tensor slopes = at::div(grads[0].to(divisors.scalar_type()), divisors);
    return {slopes.expand({2, ctx->saved_data["rows"].toInt()}), Tensor(), Tensor()};
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

Tensor reduced_shares(const Tensor& value, const Tensor& others, const std::optional<Tensor>& total,
                      const std::optional<Tensor>& count, const std::optional<Tensor>& second,
                      const std::optional<Tensor>& second_others, bool mean, bool everyone,
                      bool wide) {
  const auto check_side = [](const Tensor& of, const Tensor& negatives) {
    TORCH_CHECK_VALUE(of.dim() > 0 && of.size(0) == 2, "value: expected [2, ...], got ",
                      of.sizes());
    check_alike(of.select(0, 0), negatives, "others");
    TORCH_CHECK_TYPE(of.scalar_type() == negatives.scalar_type(), "others: expected ",
                     of.scalar_type());
  };
  check_side(value, others);
  TORCH_CHECK_VALUE(
      total.has_value() == count.has_value() && second.has_value() == second_others.has_value(),
      "reduced_shares: expected both or neither");
  if (second) check_side(*second, *second_others);
  if (total) {
    check_alike(value, *total, "total");
    check_side(*total, *count);
  }
  const auto or_none = [](const std::optional<Tensor>& t) { return t ? *t : Tensor(); };
  const ReducedShares::Beside beside = {others, or_none(count), or_none(second_others),
                                        mean,   everyone,       wide ? at::kDouble : at::kFloat};
  return ReducedShares::apply(value, total, second, beside);
}

Tensor reduced_loss(const Tensor& loss, const Tensor& counted, bool mean, bool wide) {
  check_alike(loss, counted, "counted");
  return Reduced::apply(loss, counted, mean, wide ? at::kDouble : at::kFloat);
}

Tensor mean_of_each(const Tensor& total, const Tensor& count, bool wide) {
  TORCH_CHECK_VALUE(total.dim() == 2 && total.size(0) == 2, "total: expected [2, N], got ",
                    total.sizes());
  check_alike(total, count, "count");
  TORCH_CHECK_TYPE(total.scalar_type() == count.scalar_type(), "count: expected ",
                   total.scalar_type());
  return MeanOfEach::apply(total, count, wide ? at::kDouble : at::kFloat);
}

}  // namespace fused_losses
