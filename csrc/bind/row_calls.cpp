// A sweep over classes in plain eager code on the CPU (base/compiled.py): the op called with its
// gradient in C++.
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "streamed.h"

namespace fused_losses {
namespace {

using at::Tensor;

// The arguments are those of Inputs (primitives/row_statistics/inputs.py), and kept_classes.
struct RowStatistics {
  static constexpr const char* kName = "row_statistics_cpu";
  static constexpr size_t kMoving = 5, kTold = 1;
  // x, weight and bias; labels and classes stand between them
  static constexpr bool moves(size_t i) { return i < 2 || i == 4; }

  // lse, target, and weighted_sum if it was asked for
  static variable_list outputs(const Stack& found) {
    variable_list out;
    for (size_t i = 0; i < 3; ++i) {
      if (i < 2 || found[i].toTensor().numel() > 0) out.push_back(found[i].toTensor());
    }
    return out;
  }

  static Stack before(const variable_list& grads, const variable_list& outputs,
                      const variable_list& found, bool) {
    Stack given;
    for (size_t i = 0; i < outputs.size(); ++i) {
      given.emplace_back(grads[i].defined() ? grads[i].contiguous() : at::zeros_like(found[i]));
    }
    if (outputs.size() < 3) given.emplace_back();
    return given;
  }

  // The backward takes lse and what was kept before `normalize`, and `compact` behind all.
  static void between(Stack& given, size_t i, const variable_list& found) {
    if (i == 6) given.insert(given.end(), {found[0], found[5]});
    if (i == 10) given.emplace_back(false);
  }
};

}  // namespace

std::vector<Tensor> row_statistics(const Tensor& x, const Tensor& weight, const Tensor& labels,
                                   const std::optional<Tensor>& classes,
                                   const std::optional<Tensor>& bias,
                                   const std::optional<Tensor>& column_weight, bool normalize,
                                   bool weighted, const std::string& precision,
                                   const std::optional<Tensor>& bend, int64_t kept_classes) {
  Stack found;
  const Stack given = {x,         weight,   labels,    classes, bias,        column_weight,
                       normalize, weighted, precision, bend,    kept_classes};
  const variable_list moving = Streamed<RowStatistics>::run(given, found);
  std::vector<Tensor> out;
  for (size_t i = 0; i < 5; ++i) {
    out.push_back(i < moving.size() ? moving[i] : found[i].toTensor());
  }
  return out;
}

}  // namespace fused_losses
