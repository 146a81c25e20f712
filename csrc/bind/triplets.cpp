// The cpu ops of triplets (schemas: fused_losses/primitives/row_rules/cpu.py); module.cpp registers
// them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "bind.h"

namespace fused_losses {
namespace {

using at::Tensor;

TripletProblem triplet_problem(const Tensor& score, const Tensor& positive, const Tensor& negative,
                               double margin, c10::string_view kind) {
  TORCH_CHECK_TYPE(score.scalar_type() == at::kFloat || score.scalar_type() == at::kDouble,
                   "score: expected float32 or float64, got ", score.scalar_type());
  TORCH_CHECK_VALUE(score.dim() == 2, "score: expected [rows, columns], got ", score.sizes());
  for (const Tensor* mask : {&positive, &negative}) {
    TORCH_CHECK_VALUE(mask->scalar_type() == at::kBool && mask->sizes() == score.sizes(),
                      "positive, negative: expected bool ", score.sizes(), ", got ",
                      mask->scalar_type(), " ", mask->sizes());
  }
  TORCH_CHECK_VALUE(score.is_contiguous() && positive.is_contiguous() && negative.is_contiguous(),
                    "score, positive, negative: expected contiguous tensors");
  TORCH_CHECK_VALUE(kind == "all" || kind == "hard" || kind == "semihard",
                    "kind: expected all, hard or semihard, got ", kind);
  return {score.const_data_ptr(),
          positive.const_data_ptr<bool>(),
          negative.const_data_ptr<bool>(),
          score.size(0),
          score.size(1),
          margin,
          kind == "all"    ? Triplet::kAll
          : kind == "hard" ? Triplet::kHard
                           : Triplet::kSemihard,
          score.scalar_type() == at::kDouble};
}

Tensor triplets(const Tensor& score, const Tensor& positive, const Tensor& negative, double margin,
                c10::string_view kind) {
  const TripletProblem p = triplet_problem(score, positive, negative, margin, kind);
  const Tensor out = at::empty({p.rows, 2}, score.options().dtype(at::kDouble));
  const TripletKernels& kernels = best_kernels().triplets;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.bytes(p, parallel.threads));
  kernels.forward(p, out.data_ptr<double>(), aligned(buffer), parallel);
  return out;
}

Tensor triplets_slope(const Tensor& grad, const Tensor& score, const Tensor& positive,
                      const Tensor& negative, double margin, c10::string_view kind) {
  const TripletProblem p = triplet_problem(score, positive, negative, margin, kind);
  TORCH_CHECK_VALUE(grad.sizes() == at::IntArrayRef({p.rows}), "grad: expected [", p.rows,
                    "], got ", grad.sizes());
  const Tensor given = grad.to(score.scalar_type()).contiguous();
  const Tensor out = at::empty(score.sizes(), score.options());
  const TripletKernels& kernels = best_kernels().triplets;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.bytes(p, parallel.threads));
  kernels.backward(p, given.const_data_ptr(), out.data_ptr(), aligned(buffer), parallel);
  return out;
}

}  // namespace

void register_triplets(torch::Library& m) {
  m.impl("row_triplets_cpu", &triplets);
  m.impl("row_triplets_cpu_slope", &triplets_slope);
}

}  // namespace fused_losses
