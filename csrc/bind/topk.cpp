// The cpu op of the k best columns (schema: primitives/topk); module.cpp registers it.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/nan_to_num.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "bind.h"

namespace fused_losses {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// What a problem points to, kept alive.
struct Held {
  std::vector<Tensor> tensors;

  Matrix matrix(const Tensor& t) {
    tensors.push_back(t.size(1) <= 1 || t.stride(1) == 1 ? t : t.contiguous());
    const Type type = t.scalar_type() == at::kChar ? Type::kInt8 : type_of(t);
    return {tensors.back().const_data_ptr(), type, tensors.back().stride(0)};
  }

  template <class T>
  const T* vector(const OptionalTensor& t, at::ScalarType type, at::IntArrayRef shape,
                  const char* name) {
    if (!t) return nullptr;
    TORCH_CHECK_TYPE(t->scalar_type() == type, name, ": expected ", type, ", got ",
                     t->scalar_type());
    TORCH_CHECK_VALUE(t->sizes() == shape, name, ": expected ", shape, ", got ", t->sizes());
    tensors.push_back(t->contiguous());
    return tensors.back().const_data_ptr<T>();
  }
};

Affinity affinity_of(c10::string_view kind) {
  if (kind == "dot") return Affinity::kDot;
  if (kind == "cosine") return Affinity::kCosine;
  TORCH_CHECK_VALUE(kind == "sqeuclidean", "kind: expected dot, cosine or sqeuclidean, got ", kind);
  return Affinity::kSquaredDistance;
}

Match match_of(c10::string_view match) {
  if (match == "any") return Match::kAny;
  if (match == "same") return Match::kSame;
  TORCH_CHECK_VALUE(match == "different", "match: expected any, same or different, got ", match);
  return Match::kDifferent;
}

// About what the candidates may take: a fixed size, or that of the queries.
size_t candidate_bytes(int64_t n, int64_t d) {
  return std::max<size_t>(16 << 20, sizeof(float) * n * d);
}

// The rows of a problem and how they are compared.
TopkProblem rows_of(Held& held, const Tensor& x, const Tensor& y, const OptionalTensor& y_scale,
                    const OptionalTensor& codes, const OptionalTensor& codes_scale,
                    const OptionalTensor& codes_error, const OptionalTensor& codes_signs,
                    c10::string_view kind, bool largest, bool symmetric, c10::string_view screen) {
  const int64_t n = x.size(0), m = y.size(0);
  TopkProblem p = {};
  p.x = held.matrix(x);
  // the same rows are then read by both sides
  p.y = symmetric ? p.x : held.matrix(y);
  p.y_scale = held.vector<float>(y_scale, at::kFloat, {m}, "y_scale");
  TORCH_CHECK_VALUE((p.y.type == Type::kInt8) == (p.y_scale != nullptr),
                    "y_scale: expected with int8 rows, and only with them");
  if (codes) {
    TORCH_CHECK_VALUE(codes->sizes() == y.sizes() && codes_scale && codes_error, "codes: expected ",
                      y.sizes(), " with scale and error, got ", codes->sizes());
    p.codes = {held.matrix(*codes), held.vector<float>(codes_scale, at::kFloat, {m}, "codes_scale"),
               held.vector<float>(codes_error, at::kFloat, {m}, "codes_error")};
    if (codes_signs && x.size(1) > 0) {
      p.codes.rounds = codes_signs->dim() == 2 ? codes_signs->size(0) : 0;
      p.codes.signs =
          held.vector<int8_t>(codes_signs, at::kChar, {p.codes.rounds, x.size(1)}, "codes_signs");
    }
  }
  p.n = n, p.m = m, p.d = x.size(1);
  p.affinity = affinity_of(kind);
  p.largest = largest;
  p.symmetric = symmetric;
  p.bf16 = screen == "bf16" && best_kernels().bf16;
  p.most_bytes = candidate_bytes(n, p.d);
  return p;
}

// Coordinates of y's rows, which screen, and those of x.
void add_heads(Held& held, TopkProblem& p, const Tensor& x, const Tensor& first,
               const OptionalTensor& rest, const OptionalTensor& tails, const OptionalTensor& axes,
               double moved) {
  TORCH_CHECK_VALUE(!p.codes.rows.data && !p.y_scale, "heads: expected without codes");
  TORCH_CHECK_VALUE(
      first.dim() == 2 && rest && rest->dim() == 3 && tails && axes && axes->dim() == 2,
      "heads: expected [M, W] with rest, tails and axes, got ", first.sizes());
  Heads h = {};
  h.width = first.size(1), h.levels = rest->size(1), h.kept = axes->size(1), h.moved = moved;
  TORCH_CHECK_VALUE(h.width <= h.kept && h.kept <= p.d && h.kept <= h.coordinates(),
                    "heads: expected [M, W] with W <= H of axes [D, H], got ", first.sizes());
  h.first = held.vector<float>(first, at::kFloat, {p.m, h.width}, "heads");
  h.rest = held.vector<float>(rest, at::kFloat, {p.m, h.levels, Heads::kStep}, "heads_rest");
  h.tails = held.vector<float>(tails, at::kFloat, {h.levels + 2, p.m}, "heads_tails");
  held.vector<double>(axes, at::kDouble, {p.d, h.kept}, "heads_axes");
  held.tensors.push_back(at::mm(x.to(at::kDouble), *axes).contiguous());
  h.queries = held.tensors.back().const_data_ptr<double>();
  p.heads = h;
  // these products are of few coordinates: float32 keeps the bound tight
  p.bf16 = false;
}

// What kernels read: 16-bit queries are widened.
Tensor queries(const Tensor& x) {
  const bool narrow = x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
  return (narrow ? x.to(at::kFloat) : x).contiguous();
}

std::tuple<Tensor, Tensor> topk(const Tensor& x_in, const Tensor& y, const OptionalTensor& y_scale,
                                const OptionalTensor& codes, const OptionalTensor& codes_scale,
                                const OptionalTensor& codes_error,
                                const OptionalTensor& codes_signs, const OptionalTensor& x_labels,
                                const OptionalTensor& y_labels, const OptionalTensor& x_ids,
                                const OptionalTensor& y_ids, const OptionalTensor& exclude,
                                c10::string_view kind, int64_t k, bool largest,
                                c10::string_view match, bool skip_self, bool symmetric,
                                c10::string_view screen, const OptionalTensor& heads,
                                const OptionalTensor& heads_rest, const OptionalTensor& heads_tails,
                                const OptionalTensor& heads_axes, double heads_moved) {
  TORCH_CHECK_VALUE(x_in.dim() == 2 && y.dim() == 2 && x_in.size(1) == y.size(1),
                    "pair_topk: expected x [N, D] and y [M, D], got ", x_in.sizes(), " and ",
                    y.sizes());
  TORCH_CHECK_VALUE(k >= 1, "k: expected a value >= 1, got ", k);
  TORCH_CHECK_VALUE(y.size(0) < std::numeric_limits<int32_t>::max(),
                    "y: expected fewer than 2^31 rows, got ", y.size(0));
  const Tensor x = queries(x_in);
  const int64_t n = x.size(0), m = y.size(0);
  Held held;
  TopkProblem p = rows_of(held, x, y, y_scale, codes, codes_scale, codes_error, codes_signs, kind,
                          largest, symmetric, screen);
  if (heads) add_heads(held, p, x, *heads, heads_rest, heads_tails, heads_axes, heads_moved);
  p.k = k;
  p.x_labels = held.vector<int32_t>(x_labels, at::kInt, {n}, "x_labels");
  p.y_labels = held.vector<int32_t>(y_labels, at::kInt, {m}, "y_labels");
  p.match = match_of(match);
  // an empty tensor has no address: ask the tensors
  TORCH_CHECK_VALUE(p.match == Match::kAny || (x_labels && y_labels),
                    "x_labels, y_labels: expected with match=", match);
  p.x_ids = held.vector<int32_t>(x_ids, at::kInt, {n}, "x_ids");
  p.y_ids = held.vector<int32_t>(y_ids, at::kInt, {m}, "y_ids");
  TORCH_CHECK_VALUE(x_ids.has_value() == y_ids.has_value(),
                    "x_ids, y_ids: expected both or neither");
  if (exclude) {
    p.excluded = exclude->dim() == 2 ? exclude->size(1) : 0;
    p.exclude = held.vector<int32_t>(exclude, at::kInt, {n, p.excluded}, "exclude");
  }
  p.skip_self = skip_self;
  const Tensor keys = at::empty({n, k}, x.options().dtype(at::kDouble));
  const Tensor index = at::empty({n, k}, x.options().dtype(at::kLong));
  const TopkKernels& kernels = best_kernels().topk;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.bytes(p, parallel.threads));
  kernels.run(p, {keys.data_ptr<double>(), index.data_ptr<int64_t>()}, aligned(buffer), parallel);
  return {keys, index};
}

}  // namespace

void register_topk(torch::Library& m) { m.impl("pair_topk_cpu", &topk); }

std::tuple<Tensor, Tensor, Tensor> topk_scores(
    const Tensor& x_in, const Tensor& y, const std::string& kind, bool largest,
    const std::string& screen, const OptionalTensor& codes, const OptionalTensor& codes_scale,
    const OptionalTensor& codes_error, const OptionalTensor& codes_signs) {
  const Tensor x = queries(x_in);
  Held held;
  TopkProblem p = rows_of(held, x, y, {}, codes, codes_scale, codes_error, codes_signs, kind,
                          largest, false, screen);
  p.k = 1;
  const auto floats = x.options().dtype(at::kFloat);
  const Tensor scores = at::empty({p.n, p.m}, floats), bounds = at::empty({p.n, p.m}, floats);
  const Tensor center = at::empty({p.d}, x.options().dtype(at::kDouble));
  const TopkKernels& kernels = best_kernels().topk;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.bytes(p, parallel.threads));
  kernels.scores(p, scores.data_ptr<float>(), bounds.data_ptr<float>(), center.data_ptr<double>(),
                 aligned(buffer), parallel);
  return {scores, bounds, center};
}

namespace {

// Without NaN, which is put back by the distances of what is chosen, and whether nothing changed.
std::pair<Tensor, bool> without_nan(const Tensor& t) {
  const Tensor rows = dense_rows(t), marks = row_marks(rows).to(at::kDouble);
  const double* mark = marks.const_data_ptr<double>();
  const bool finite = std::all_of(mark, mark + marks.numel(), [](double v) { return v == 0; });
  if (finite) return {rows, true};
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  return {at::nan_to_num(rows, 0, kInfinity, -kInfinity), false};
}

}  // namespace

Extremes extreme_columns(const Tensor& x_in, const OptionalTensor& y_in, const Tensor& x_labels,
                         const Tensor& y_labels, const std::string& kind, bool largest_positive,
                         bool largest_negative, bool skip_self, bool symmetric,
                         const std::string& screen) {
  const at::NoGradGuard no_gradient;
  const auto [x, x_finite] = without_nan(x_in);
  const auto [y, y_finite] = y_in ? without_nan(*y_in) : std::pair(x, x_finite);
  const auto best = [&, &x = x, &y = y](const char* match, bool largest) {
    return std::get<1>(topk(x, y, {}, {}, {}, {}, {}, x_labels, y_labels, {}, {}, {}, kind, 1,
                            largest, match, skip_self, symmetric, screen, {}, {}, {}, {}, 0));
  };
  const Tensor near = best("same", largest_positive), far = best("different", largest_negative);
  const int64_t n = x.size(0);
  const auto whole = x.options().dtype(at::kLong);
  const Tensor rows = at::empty({2 * n}, whole), columns = at::empty({2 * n}, whole);
  const Tensor found = at::empty({n}, x.options().dtype(at::kBool));
  const int64_t *p = near.const_data_ptr<int64_t>(), *q = far.const_data_ptr<int64_t>();
  int64_t *row = rows.data_ptr<int64_t>(), *column = columns.data_ptr<int64_t>();
  bool* both = found.data_ptr<bool>();
  for (int64_t i = 0; i < n; ++i) {
    row[i] = row[n + i] = i;
    both[i] = p[i] >= 0 && q[i] >= 0;
    column[i] = std::max<int64_t>(p[i], 0);
    column[n + i] = std::max<int64_t>(q[i], 0);
  }
  return {rows, columns, found, std::all_of(both, both + n, [](bool b) { return b; }), y_finite};
}

std::tuple<Tensor, Tensor> topk_head_scores(const Tensor& x_in, const Tensor& y,
                                            const std::string& kind, bool largest,
                                            const Tensor& heads, const Tensor& rest,
                                            const Tensor& tails, const Tensor& axes, double moved,
                                            int64_t level) {
  const Tensor x = queries(x_in);
  Held held;
  TopkProblem p = rows_of(held, x, y, {}, {}, {}, {}, {}, kind, largest, false, "fp32");
  add_heads(held, p, x, heads, rest, tails, axes, moved);
  p.k = 1;
  TORCH_CHECK_VALUE(p.heads.first && level >= 0 && level <= p.heads.levels,
                    "level: expected one of the heads', got ", level);
  p.heads.shown = level;
  const Tensor scores = at::empty({p.n, p.m}, x.options().dtype(at::kFloat));
  const Tensor bounds = at::empty_like(scores);
  const TopkKernels& kernels = best_kernels().topk;
  const Parallel parallel = torch_threads();
  const Tensor buffer = scratch(kernels.bytes(p, parallel.threads));
  kernels.scores(p, scores.data_ptr<float>(), bounds.data_ptr<float>(), nullptr, aligned(buffer),
                 parallel);
  return {scores, bounds};
}

size_t topk_workspace(int64_t n, int64_t d, int64_t k, int64_t item, bool symmetric, bool codes,
                      int64_t width, int64_t levels, int64_t kept) {
  const int8_t code = 0;
  const float head = 0;
  TopkProblem p = {};
  p.x.type = p.y.type = item == sizeof(double) ? Type::kFloat64 : Type::kFloat32;
  if (codes) p.codes.rows.data = &code;
  if (width > 0) p.heads.first = &head;
  p.heads.width = width, p.heads.levels = levels, p.heads.kept = kept;
  p.n = n, p.d = d, p.k = k;
  p.skip_self = p.symmetric = symmetric;
  p.most_bytes = candidate_bytes(n, d);
  const TopkKernels& kernels = best_kernels().topk;
  const int threads = torch_threads().threads;
  size_t most = kernels.bytes(p, threads);
  p.bf16 = best_kernels().bf16 && width == 0;
  most = std::max(most, kernels.bytes(p, threads));
  // x in double and its coordinates
  if (width > 0) most += sizeof(double) * n * (d + kept);
  return scratch_bytes(most) + (item == 2 ? kWidened * n * d : 0);
}

}  // namespace fused_losses
