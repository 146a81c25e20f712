// What precedes and follows a sweep over classes, a number a row, in one pass each: labels checked
// and renamed; the losses of a softmax whose target has moved, with their slopes.
//
// In plain eager mode alone (`base/compiled.py`): else the same formulas run in PyTorch.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include "helpers.h"

namespace fused_losses {
namespace {

using at::Tensor;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int64_t kNoTarget = -1;

enum class Beyond { kLinear, kNone, kEasy, kMonotone };

Beyond beyond_of(const std::string& name) {
  if (name == "linear") return Beyond::kLinear;
  if (name == "easy") return Beyond::kEasy;
  if (name == "monotone") return Beyond::kMonotone;
  TORCH_CHECK_VALUE(name == "none", "beyond_pi: expected linear, none, easy or monotone, got ",
                    name);
  return Beyond::kNone;
}

struct Point {
  double value, slope;
};

// An angle that is added to that of a cosine.
struct Turn {
  double cosine, sine, step;  // step: linear beyond pi, t - step
  Beyond beyond;

  Turn(double m, Beyond beyond_in)
      : cosine(std::cos(m)), sine(std::sin(m)), step(m * sine), beyond(beyond_in) {}

  // cos(acos(t) + m) and its slope in t, which is 0 from |t| = 1 on.
  Point operator()(double t) const {
    if (t != t) return {t, t};
    const bool inside = std::abs(t) < 1;
    const double near = inside ? t : t < 0 ? -1 : 1;
    const double height = std::sqrt((1 - near) * (1 + near));
    Point at = {near * cosine - height * sine, inside ? cosine + near * (sine / height) : 0};
    const bool within = near > -cosine;
    if (beyond == Beyond::kLinear && !within) at = {t - step, 1};
    if (beyond == Beyond::kEasy && !(t > 0)) at = {t, 1};
    if (beyond == Beyond::kMonotone && !within) at = {-at.value - 2, -at.slope};
    return at;
  }
};

void check_vector(const Tensor& t, at::ScalarType type, const char* name) {
  TORCH_CHECK_VALUE(t.dim() == 1 && t.scalar_type() == type, name, ": expected ", type,
                    " [N], got ", t.scalar_type(), " ", t.sizes());
}

}  // namespace

std::optional<Tensor> label_names(const Tensor& labels_in, int64_t classes, int64_t ignored,
                                  bool narrow) {
  check_vector(labels_in, at::kLong, "labels");
  const Tensor labels = labels_in.contiguous();
  const int64_t *given = labels.const_data_ptr<int64_t>(), n = labels.numel();
  const Tensor out = at::empty({n}, labels.options().dtype(narrow ? at::kInt : at::kLong));
  const auto name = [&](auto* to) {
    bool fine = true;
    for (int64_t i = 0; i < n; ++i) {
      const bool skipped = given[i] == ignored;
      fine = fine && (skipped || (given[i] >= 0 && given[i] < classes));
      to[i] = skipped ? kNoTarget : given[i];
    }
    return fine;
  };
  const bool fine = narrow ? name(out.data_ptr<int32_t>()) : name(out.data_ptr<int64_t>());
  return fine ? std::optional<Tensor>(out) : std::nullopt;
}

bool all_labelled(const Tensor& labels_in) {
  check_vector(labels_in, at::kLong, "labels");
  const Tensor labels = labels_in.contiguous();
  const int64_t* y = labels.const_data_ptr<int64_t>();
  return std::find(y, y + labels.numel(), kNoTarget) == y + labels.numel();
}

std::tuple<Tensor, Tensor> target_losses(const Tensor& lse_in, const Tensor& target_in,
                                         const Tensor& labels_in, double scale, bool moved,
                                         double m2, double m3, const std::string& beyond,
                                         bool mean) {
  check_vector(lse_in, at::kDouble, "lse");
  check_vector(target_in, at::kDouble, "target");
  check_vector(labels_in, at::kLong, "labels");
  check_alike(lse_in, target_in, "target");
  check_alike(lse_in, labels_in, "labels");
  const Tensor lse = lse_in.contiguous(), target = target_in.contiguous();
  const Tensor labels = labels_in.contiguous();
  const int64_t n = lse.numel();
  const double *over_others = lse.const_data_ptr<double>(), *of = target.const_data_ptr<double>();
  const int64_t* y = labels.const_data_ptr<int64_t>();
  const Turn turn(m2, beyond_of(beyond));
  const int64_t counted = n - std::count(y, y + n, kNoTarget);
  const double divisor = mean ? static_cast<double>(std::max<int64_t>(1, counted)) : 1;
  const Tensor slopes = at::empty({2, n}, lse.options());
  double *shares = slopes.data_ptr<double>(), *along = shares + n;

  const double total = summed(n, [&](int64_t i) {
    shares[i] = along[i] = 0;
    if (y[i] == kNoTarget) return 0.0;
    const double others = over_others[i];
    Point at = {of[i] / scale, 1};
    // a margin may be finite there, but a fault must show
    const bool fault = moved && at.value == kInfinity;
    if (fault) at.value = std::numeric_limits<double>::quiet_NaN();
    if (moved && m2 != 0) at = turn(at.value);
    if (moved) at.value -= m3;
    if (fault) at.slope = 0;
    double z = scale * at.value;
    const bool some = others != -kInfinity, reached = some || z != z;
    if (z == kInfinity) z = std::numeric_limits<double>::quiet_NaN();
    const double gap = (some ? others : 0) - z, e = std::exp(-std::abs(gap));
    const double share = (gap > 0 ? 1 : e) / (1 + e) / divisor;
    if (some) shares[i] = share;
    // where a margin is flat, so is the loss, whatever its share is
    if (reached && at.slope != 0) along[i] = -share * at.slope;
    // against nothing 0, and a fault as a fault
    return some ? (gap > 0 ? gap : 0) + std::log1p(e) : z * 0;
  });
  const Tensor loss = at::empty({}, lse.options().dtype(at::kFloat));
  *loss.data_ptr<float>() = static_cast<float>(total / divisor);
  return {loss, slopes};
}

}  // namespace fused_losses
