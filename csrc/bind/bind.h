// What the files that see torch share.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../kernels.h"

namespace fused_losses {

Precision precision_of(c10::string_view name);
Type type_of(const at::Tensor& t);

// Rows of any dtype as a kernel reads them a block at a time: 16 bits where they lie, others in the
// type that sums are held in.
Stored stored_as(const at::Tensor& t);
at::Tensor dense_as_stored(const at::Tensor& t);
// As many threads as torch has. `on_runs`: body(first, end) of runs of [0, count), `grain` long or
// shorter. `own_threads`: none of OpenMP's for so many seconds.
Parallel torch_threads();
bool ran_on_threads();
void own_threads(double seconds);
void on_runs(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// Large pages for large outputs: a fresh gradient is gigabytes of page faults otherwise.
void advise_huge(const at::Tensor& t);
// Room for scores that a forward keeps.
at::Tensor kept_scores(at::IntArrayRef shape, const at::TensorOptions& options);

// Scratch of so many bytes, what it takes, and its first address that is aligned to 64. A thread
// keeps that of at most kHeldScratch between calls.
constexpr size_t kHeldScratch = 1 << 20;
at::Tensor scratch(size_t bytes);
size_t scratch_bytes(size_t bytes);
void* aligned(const at::Tensor& buffer);

// 16-bit elements are widened to float, and their gradients are float before they are narrowed.
constexpr size_t kWidened = sizeof(float);

// Torch's own products, rows that are dense, and threads enough for so many classes: OpenMP's where
// they multiply by torch's own products, which run on one thread within its regions alone.
Gemm host_products();
void run_in_region(int count, void (*body)(void*, int), void* context);
at::Tensor dense_rows(const at::Tensor& t);
Parallel parallel_for_classes(int64_t k);

// A vector in the type that accumulates, and where each row's target stands among the classes that
// take part (`classes`, or all c), by position; both checked.
std::optional<at::Tensor> accumulated(const std::optional<at::Tensor>& t, at::ScalarType type);
std::vector<Target> find_targets(const at::Tensor& labels, const std::optional<at::Tensor>& classes,
                                 int64_t c);

// Each file's ops, whose schemas are the Python side's, and the peak of what their calls allocate
// beyond inputs, outputs and gradients: by the plans that the kernels themselves allocate by, on
// torch's number of threads. `item`: bytes of an element of the inputs.
void register_row_statistics(torch::Library& m);
size_t row_workspace(int64_t n, int64_t d, int64_t itemsize, bool bf16);

// `width`: of an attention's values, 0: none.
void register_pairs(torch::Library& m);
size_t pair_workspace(int64_t n, int64_t m, int64_t d, int64_t item, const std::string& precision,
                      int64_t width, bool apart);
int64_t pair_kept(int64_t n, int64_t m, int64_t d, int64_t item, const std::string& precision,
                  bool triangle, int64_t most);

void register_maxsim(torch::Library& m);
size_t maxsim_workspace(int64_t query_tokens, int64_t document_tokens, int64_t d, int64_t item,
                        const std::string& precision, bool document_gradient);

void register_distances(torch::Library& m);
size_t distance_workspace(int64_t n, int64_t m, int64_t d, int64_t item, const std::string& kind,
                          const std::string& precision, bool gradient);

void register_topk(torch::Library& m);
// For tests: the screen's scores of all pairs, its bounds and what rows are moved by.
std::tuple<at::Tensor, at::Tensor, at::Tensor> topk_scores(
    const at::Tensor& x, const at::Tensor& y, const std::string& kind, bool largest,
    const std::string& screen, const std::optional<at::Tensor>& codes,
    const std::optional<at::Tensor>& codes_scale, const std::optional<at::Tensor>& codes_error,
    const std::optional<at::Tensor>& codes_signs);
// The same of the coordinates up to a level: a score is at most the first and the second.
std::tuple<at::Tensor, at::Tensor> topk_head_scores(const at::Tensor& x, const at::Tensor& y,
                                                    const std::string& kind, bool largest,
                                                    const at::Tensor& heads, const at::Tensor& rest,
                                                    const at::Tensor& tails, const at::Tensor& axes,
                                                    double moved, int64_t level);
// `symmetric`: rows against themselves without i == j; `codes`: a narrow copy screens, and with a
// width coordinates do.
size_t topk_workspace(int64_t n, int64_t d, int64_t k, int64_t item, bool symmetric, bool codes,
                      int64_t width, int64_t levels, int64_t kept);
// In plain eager mode: the extreme positive of each row, then the extreme negative, as listed pairs
// (rows, columns [2 n], where there is none column 0), which rows have both and whether all have;
// whether all of y is finite. y None: x itself.
using Extremes = std::tuple<at::Tensor, at::Tensor, at::Tensor, bool, bool>;
Extremes extreme_columns(const at::Tensor& x, const std::optional<at::Tensor>& y,
                         const at::Tensor& x_labels, const at::Tensor& y_labels,
                         const std::string& kind, bool largest_positive, bool largest_negative,
                         bool skip_self, bool symmetric, const std::string& screen);

// Of the form in Python (primitives/class_rules/cpu.py), which has checked: `place` [n, slots] of
// labels among the classes that take part, or -1; `statistics` merged, [S, n].
std::tuple<at::Tensor, at::Tensor, at::Tensor> class_rules_forward(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& place,
    const std::optional<at::Tensor>& classes, const std::optional<at::Tensor>& values,
    const std::string& rule, const std::vector<double>& params, int64_t centers, double softness,
    bool normalize, const std::string& precision, const at::Tensor& kept);
std::tuple<at::Tensor, at::Tensor> class_rules_backward(
    const at::Tensor& grad_statistics, const at::Tensor& grad_targets, const at::Tensor& statistics,
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& place,
    const std::optional<at::Tensor>& classes, const std::optional<at::Tensor>& values,
    const std::string& rule, const std::vector<double>& params, int64_t centers, double softness,
    bool normalize, const std::string& precision, const at::Tensor& kept, bool compact, bool need_x,
    bool need_weight);
size_t class_rules_workspace(int64_t n, int64_t d, int64_t classes, int64_t centers, int64_t item,
                             const std::string& rule, int64_t value_rows, bool bf16, bool gradient);

// `teacher_d`: 0 of dense scores.
void register_divergence(torch::Library& m);
size_t divergence_workspace(int64_t n, int64_t d, int64_t teacher_d, int64_t item,
                            const std::string& precision, bool gradient, bool teacher_gradient);

// Of plain eager mode (base/compiled.py): x [N, D] whose rows are dense, `order` a permutation.
at::Tensor unit_rows(const at::Tensor& x, const std::optional<at::Tensor>& order);
// 0 a row, NaN where an entry is not finite. [N]
at::Tensor row_marks(const at::Tensor& x);
at::Tensor exact_center(const std::vector<at::Tensor>& sides);
// int32 numbers in the labels' order, equal where these are.
at::Tensor dense_numbers(const at::Tensor& labels);
// The op on Inputs (primitives/row_statistics/inputs.py), but for what it kept, with its gradient.
std::vector<at::Tensor> row_statistics(const at::Tensor& x, const at::Tensor& weight,
                                       const at::Tensor& labels,
                                       const std::optional<at::Tensor>& classes,
                                       const std::optional<at::Tensor>& bias,
                                       const std::optional<at::Tensor>& column_weight,
                                       bool normalize, bool weighted, const std::string& precision,
                                       const std::optional<at::Tensor>& bend, int64_t kept_classes);
// Labels [N] with -1 for what is ignored, in int32 if `narrow`; none if one is neither ignored nor
// in [0, classes). Whether none is -1.
std::optional<at::Tensor> label_names(const at::Tensor& labels, int64_t classes, int64_t ignored,
                                      bool narrow);
bool all_labelled(const at::Tensor& labels);
// `base/target_loss.py`: a loss [] in float32 and its slopes [2, N] in lse and target, float64 [N].
std::tuple<at::Tensor, at::Tensor> target_losses(const at::Tensor& lse, const at::Tensor& target,
                                                 const at::Tensor& labels, double scale, bool moved,
                                                 double m2, double m3, const std::string& beyond,
                                                 bool mean);
// 1 / t in float64 of a scalar t > 0, with gradients of any order; none of what is no such scalar.
std::optional<at::Tensor> inverse(const at::Tensor& t);
// start, start + 1, ... in int32.
at::Tensor counted_up(int64_t count, int64_t start);
// `numerics.root`; log(1 + e^z); `numerics.share_loss`; a sum or mean over what is counted. All
// with gradients of any order.
at::Tensor root_of(const at::Tensor& v);
at::Tensor softplus_of(const at::Tensor& z);
std::tuple<at::Tensor, at::Tensor> share_loss(const at::Tensor& value, const at::Tensor& others);
// `pair_sums.reduced_shares`: of one side, whose positives may stand by their mean (total, count),
// or of two.
at::Tensor reduced_shares(const at::Tensor& value, const at::Tensor& others,
                          const std::optional<at::Tensor>& total,
                          const std::optional<at::Tensor>& count,
                          const std::optional<at::Tensor>& second,
                          const std::optional<at::Tensor>& second_others, bool mean, bool everyone,
                          bool wide);
at::Tensor mean_of_each(const at::Tensor& total, const at::Tensor& count, bool wide);
at::Tensor reduced_loss(const at::Tensor& loss, const at::Tensor& counted, bool mean, bool wide);

// In plain eager mode: with the gradient in C++. y None: x itself.
at::Tensor listed_scores(const at::Tensor& x, const std::optional<at::Tensor>& y,
                         const at::Tensor& rows, const at::Tensor& columns, bool apart);
void register_listed(torch::Library& m);
size_t listed_workspace(int64_t n, int64_t m, int64_t d, int64_t pairs, int64_t item, bool own,
                        bool gradient);

void register_triplets(torch::Library& m);
void register_row_update(torch::Library& m);

}  // namespace fused_losses
