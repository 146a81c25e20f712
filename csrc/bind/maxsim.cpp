// The cpu ops of MaxSim; module.cpp registers them.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <string>
#include <tuple>

#include "bind.h"

namespace fused_losses {
namespace {

using at::Tensor;

MaxSimProblem maxsim_problem(const Tensor& queries, const Tensor& documents,
                             const Tensor& query_offsets, const Tensor& document_offsets,
                             c10::string_view precision) {
  TORCH_CHECK_VALUE(
      queries.dim() == 2 && documents.dim() == 2 && queries.size(1) == documents.size(1),
      "maxsim: expected tokens [Tq, D] and [Td, D], got ", queries.sizes(), " and ",
      documents.sizes());
  const auto check = [](const Tensor& t, int64_t tokens, const char* name) {
    TORCH_CHECK_VALUE(
        t.dim() == 1 && t.numel() > 0 && t.scalar_type() == at::kLong && t.is_contiguous(), name,
        ": expected int64 offsets, got ", t.scalar_type(), " ", t.sizes());
    const int64_t *o = t.const_data_ptr<int64_t>(), n = t.numel() - 1;
    bool fine = o[0] == 0 && o[n] == tokens;
    for (int64_t i = 0; i < n; ++i) fine = fine && o[i] <= o[i + 1];
    TORCH_CHECK_VALUE(fine, name, ": expected offsets that grow from 0 to ", tokens);
  };
  check(query_offsets, queries.size(0), "query_offsets");
  check(document_offsets, documents.size(0), "document_offsets");
  return {queries.const_data_ptr(),
          documents.const_data_ptr(),
          query_offsets.const_data_ptr<int64_t>(),
          document_offsets.const_data_ptr<int64_t>(),
          query_offsets.numel() - 1,
          document_offsets.numel() - 1,
          queries.size(1),
          queries.scalar_type() == at::kDouble,
          precision_of(precision),
          stored_as(documents)};
}

// float or double, as kernels read tokens.
Tensor as_read(const Tensor& t) {
  return t.to(t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
}

std::tuple<Tensor, Tensor> maxsim(const Tensor& queries_in, const Tensor& documents_in,
                                  const Tensor& query_offsets, const Tensor& document_offsets,
                                  c10::string_view precision) {
  const Tensor queries = as_read(queries_in), documents = dense_as_stored(documents_in);
  const MaxSimProblem p =
      maxsim_problem(queries, documents, query_offsets, document_offsets, precision);
  const Tensor scores = at::empty({p.query_count, p.document_count}, queries.options());
  const Tensor index =
      at::empty({p.query_tokens(), p.document_count}, queries.options().dtype(at::kInt));
  advise_huge(index);
  const MaxSimKernels& kernels = best_kernels().maxsim;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.forward_bytes(p, parallel.threads));
  kernels.forward(p, scores.data_ptr(), index.data_ptr<int32_t>(), aligned(buffer), parallel);
  return {scores, index};
}

std::tuple<Tensor, Tensor> maxsim_backward(const Tensor& grad_in, const Tensor& index,
                                           const Tensor& queries_in, const Tensor& documents_in,
                                           const Tensor& query_offsets,
                                           const Tensor& document_offsets, bool need_queries,
                                           bool need_documents) {
  const Tensor queries = as_read(queries_in), documents = dense_as_stored(documents_in);
  const MaxSimProblem p =
      maxsim_problem(queries, documents, query_offsets, document_offsets, "fp32");
  const Tensor grad = grad_in.to(queries.scalar_type()).contiguous();
  const auto like = [&](const Tensor& t, bool need) {
    const auto options = queries.options();
    const Tensor out = need ? at::empty(t.sizes(), options) : at::empty({0}, options);
    advise_huge(out);
    return out;
  };
  const Tensor dq = like(queries, need_queries), dd = like(documents, need_documents);
  best_kernels().maxsim.backward(p, grad.const_data_ptr(), index.const_data_ptr<int32_t>(),
                                 need_queries ? dq.data_ptr() : nullptr,
                                 need_documents ? dd.data_ptr() : nullptr, torch_threads());
  return {dq.to(queries_in.scalar_type()), dd.to(documents_in.scalar_type())};
}

}  // namespace

void register_maxsim(torch::Library& m) {
  m.impl("maxsim_cpu", &maxsim);
  m.impl("maxsim_cpu_backward", &maxsim_backward);
}

size_t maxsim_workspace(int64_t query_tokens, int64_t document_tokens, int64_t d, int64_t item,
                        const std::string& precision, bool document_gradient) {
  const std::array<int64_t, 2> queries = {0, query_tokens}, documents = {0, document_tokens};
  MaxSimProblem p = {};
  p.query_offsets = queries.data();
  p.document_offsets = documents.data();
  p.query_count = p.document_count = 1;
  p.d = d;
  p.is_double = item == sizeof(double);
  p.precision = precision_of(precision);
  p.stored = item == 2 ? Stored::kBFloat16 : Stored::kWide;
  // queries and both gradients; documents are read where they lie
  const int64_t rows = 2 * query_tokens + (document_gradient ? document_tokens : 0);
  const size_t widened = item == 2 ? kWidened * rows * d : 0;
  return scratch_bytes(best_kernels().maxsim.forward_bytes(p, torch_threads().threads)) + widened;
}

}  // namespace fused_losses
