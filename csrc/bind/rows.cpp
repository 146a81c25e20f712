// What precedes a sweep, in one pass each: rows of norm 1 with their gradient, marks of rows that
// are not finite, labels as numbers.
//
// In plain eager mode alone (`base/compiled.py`): else the same formulas run in PyTorch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/le.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/logical_not.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "helpers.h"

namespace fused_losses {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kGrain = 1 << 15;  // elements that are no work for a second thread

template <class Run>
void of_type(const Tensor& t, const Run& run) {
  switch (type_of(t)) {
    case Type::kFloat32:
      return run(float{});
    case Type::kFloat64:
      return run(double{});
    case Type::kBFloat16:
      return run(at::BFloat16{});
    case Type::kFloat16:
      return run(at::Half{});
  }
}

template <class Run>
void each_row(int64_t n, int64_t d, const Run& run) {
  on_runs(n, std::max<int64_t>(1, kGrain / std::max<int64_t>(d, 1)),
          [&](int64_t first, int64_t end) {
            for (int64_t i = first; i < end; ++i) run(i);
          });
}

// Of a row: a power of two that brings it near 1, 1 / |row| after that, and whether it is no row of
// zeros, whose inverse is 0. Squares of narrower types are numbers of double as they are.
struct Norm {
  double factor, inverse;
  bool alive;
};

template <class T>
Norm norm_of(const T* x, int64_t d) {
  double factor = 1;
  if constexpr (std::is_same_v<T, double>) {
    double top = 0;
    for (int64_t e = 0; e < d; ++e) top = std::abs(x[e]) > top ? std::abs(x[e]) : top;
    constexpr double kMost = 0x1p1020;
    int exponent;
    const double limited = std::min(std::max(top, 1 / kMost), kMost);
    factor = std::frexp(limited, &exponent) / limited;
  }
  const double square = summed(d, [&](int64_t e) {
    const double v = static_cast<double>(x[e]) * factor;
    return v * v;
  });
  // so written, a NaN stays one
  const bool alive = !(square <= 0);
  return {factor, alive ? 1 / std::sqrt(square) : 0, alive};
}

// Where row i of the result stands in x.
class Order {
 public:
  Order(const std::optional<Tensor>& order, int64_t n) {
    if (!order) return;
    TORCH_CHECK_INDEX(order->scalar_type() == at::kLong && order->sizes() == at::IntArrayRef({n}),
                      "order: expected int64 [", n, "], got ", order->sizes());
    held_ = order->contiguous();
    at_ = held_.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < n; ++i) {
      TORCH_CHECK_INDEX(at_[i] >= 0 && at_[i] < n, "order: ", at_[i], " of ", n, " rows");
    }
  }
  int64_t operator[](int64_t i) const { return at_ ? at_[i] : i; }

 private:
  Tensor held_;
  const int64_t* at_ = nullptr;
};

Tensor unit_values(const Tensor& x, const std::optional<Tensor>& order) {
  const int64_t n = x.size(0), d = x.size(1), stride = x.stride(0);
  const Order from(order, n);
  const Tensor out = at::empty({n, d}, x.options());
  of_type(x, [&](auto type) {
    using T = decltype(type);
    const T* rows = x.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    each_row(n, d, [&](int64_t i) {
      const T* row = rows + from[i] * stride;
      const Norm norm = norm_of(row, d);
      for (int64_t e = 0; e < d; ++e) {
        to[i * d + e] = static_cast<T>(static_cast<double>(row[e]) * norm.factor * norm.inverse);
      }
    });
  });
  return out;
}

Tensor unit_slopes(const Tensor& x, const std::optional<Tensor>& order, const Tensor& grad) {
  const int64_t n = x.size(0), d = x.size(1), stride = x.stride(0), step = grad.stride(0);
  check_alike(x, grad, "grad");
  TORCH_CHECK_TYPE(x.scalar_type() == grad.scalar_type(), "grad: expected ", x.scalar_type());
  const Order from(order, n);
  const Tensor out = at::empty({n, d}, x.options());
  of_type(x, [&](auto type) {
    using T = decltype(type);
    const T *rows = x.const_data_ptr<T>(), *grads = grad.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    each_row(n, d, [&](int64_t i) {
      const T *row = rows + from[i] * stride, *g = grads + i * step;
      T* dx = to + from[i] * d;
      const Norm norm = norm_of(row, d);
      if (!norm.alive) {
        std::fill(dx, dx + d, T(0));
        return;
      }
      const auto unit = [&](int64_t e) {
        return static_cast<double>(row[e]) * norm.factor * norm.inverse;
      };
      const double along =
          summed(d, [&](int64_t e) { return unit(e) * static_cast<double>(g[e]); });
      for (int64_t e = 0; e < d; ++e) {
        dx[e] = static_cast<T>((static_cast<double>(g[e]) - unit(e) * along) * norm.inverse *
                               norm.factor);
      }
    });
  });
  return out;
}

// dL/dx of dL/du by operations that can be differentiated further; a row of zeros has none.
Tensor unit_slopes_graph(const Tensor& x, const std::optional<Tensor>& order, const Tensor& given) {
  Tensor factor = at::empty({x.size(0), 1}, x.options());
  of_type(x, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < x.size(0); ++i) {
      const Norm norm = norm_of(x.const_data_ptr<T>() + i * x.stride(0), x.size(1));
      factor.data_ptr<T>()[i] = static_cast<T>(norm.factor);
    }
  });
  const auto wide = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  factor = factor.to(wide);
  const Tensor rows = at::mul(x.to(wide), factor);
  const Tensor norm = at::linalg_vector_norm(rows, 2, at::IntArrayRef({1}), true);
  const Tensor alive = at::logical_not(at::le(norm, 0));
  const Tensor inverse = at::reciprocal(at::where(alive, norm, at::ones_like(norm)));
  const Tensor u = at::mul(rows, at::where(alive, inverse, at::zeros_like(inverse)));
  const Tensor grad = (order ? at::index_select(given, 0, at::argsort(*order)) : given).to(wide);
  const Tensor along = at::mul(u, at::sum(at::mul(u, grad), at::IntArrayRef({1}), true));
  const Tensor found = at::mul(at::mul(inverse, at::sub(grad, along)), factor);
  return at::where(alive, found, at::zeros_like(found)).to(x.scalar_type());
}

struct UnitRows : torch::autograd::Function<UnitRows> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const std::optional<Tensor>& order) {
    ctx->save_for_backward({x, order ? *order : Tensor()});
    return unit_values(x, order);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& x = saved[0];
    const auto order = saved[1].defined() ? std::optional<Tensor>(saved[1]) : std::nullopt;
    if (at::GradMode::is_enabled()) {
      return {unit_slopes_graph(x, order, grads[0]), Tensor()};
    }
    const Tensor& given = grads[0];
    const bool dense = given.size(1) <= 1 || given.stride(1) == 1;
    return {unit_slopes(x, order, dense ? given : given.contiguous()), Tensor()};
  }
};

}  // namespace

Tensor row_marks(const Tensor& x) {
  const bool matrix = x.dim() == 2;
  TORCH_CHECK_VALUE(matrix || x.is_contiguous(), "x: expected a matrix or contiguous rows");
  const at::IntArrayRef shape = x.sizes().slice(0, x.dim() - 1);
  const int64_t n = c10::multiply_integers(shape), d = x.size(-1);
  const int64_t stride = matrix ? x.stride(0) : d;
  const Tensor out = at::empty(shape, x.options());
  of_type(x, [&](auto type) {
    using T = decltype(type);
    const T* rows = x.const_data_ptr<T>();
    T* to = out.data_ptr<T>();
    each_row(n, d, [&](int64_t i) {
      const T* row = rows + i * stride;
      // 0 of what is finite, else NaN
      float lanes[kLanes] = {};
      int64_t e = 0;
      for (; e + kLanes <= d; e += kLanes) {
        for (int64_t l = 0; l < kLanes; ++l) lanes[l] += static_cast<float>(row[e + l] * T(0));
      }
      for (; e < d; ++e) lanes[0] += static_cast<float>(row[e] * T(0));
      const float mark = std::accumulate(lanes, lanes + kLanes, 0.0f);
      to[i] = mark == 0 ? T(0) : std::numeric_limits<T>::quiet_NaN();
    });
  });
  return out;
}

// `numerics.exact_center` of rows of one type, each coordinate by itself.
Tensor exact_center(const std::vector<Tensor>& sides) {
  const Tensor& last = sides.back();
  const int64_t d = last.size(1);
  const Tensor out = at::empty({d}, last.options());
  of_type(last, [&](auto type) {
    using T = decltype(type);
    using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
    constexpr Wide kInfinity = std::numeric_limits<Wide>::infinity();
    std::vector<Wide> low(d, kInfinity), high(d, -kInfinity);
    std::vector<double> sums(d);
    for (const Tensor& side : sides) {
      for (int64_t i = 0; i < side.size(0); ++i) {
        const T* row = side.const_data_ptr<T>() + i * side.stride(0);
        const bool counts = side.is_same(last);
        for (int64_t e = 0; e < d; ++e) {
          const Wide v = static_cast<Wide>(row[e]);
          // so written, a NaN stays one
          low[e] = low[e] <= v || low[e] != low[e] ? low[e] : v;
          high[e] = high[e] >= v || high[e] != high[e] ? high[e] : v;
          sums[e] += counts ? v : 0;
        }
      }
    }
    const Wide eps = static_cast<Wide>(std::numeric_limits<T>::epsilon());
    const Wide tiny = static_cast<Wide>(std::numeric_limits<T>::min());
    const Wide largest = static_cast<Wide>(std::numeric_limits<T>::max());
    for (int64_t e = 0; e < d; ++e) {
      const Wide first = std::abs(low[e]), second = std::abs(high[e]);
      const Wide least = std::min(first, second), most = std::max(first, second);
      if (!((low[e] > 0 || high[e] < 0) && most < largest)) {
        out.data_ptr<T>()[e] = T(0);
        continue;
      }
      const Wide mean = std::abs(static_cast<Wide>(sums[e] / last.size(0)));
      // 2^exponent <= most; below the normal numbers the unit is the least of them
      const Wide binade =
          most < std::numeric_limits<Wide>::min() ? Wide(0) : std::ldexp(Wide(1), std::ilogb(most));
      const Wide unit = std::max(binade * eps, tiny);
      const Wide center = std::floor(std::min(mean, 2 * least) / unit) * unit;
      out.data_ptr<T>()[e] = static_cast<T>(std::copysign(center, low[e]));
    }
  });
  return out;
}

Tensor dense_numbers(const Tensor& labels_in) {
  const Tensor labels = labels_in.to(at::kLong).contiguous();
  const int64_t n = labels.numel();
  const int64_t* given = labels.const_data_ptr<int64_t>();
  const Tensor out = at::empty({n}, labels.options().dtype(at::kInt));
  int32_t* to = out.data_ptr<int32_t>();
  std::vector<std::pair<int64_t, int64_t>> sorted(n);
  for (int64_t i = 0; i < n; ++i) sorted[i] = {given[i], i};
  std::sort(sorted.begin(), sorted.end());
  int32_t number = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (i > 0 && sorted[i].first != sorted[i - 1].first) ++number;
    to[sorted[i].second] = number;
  }
  return out;
}

Tensor unit_rows(const Tensor& x, const std::optional<Tensor>& order) {
  return UnitRows::apply(x, order);
}

}  // namespace fused_losses
