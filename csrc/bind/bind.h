// What the files that see torch share.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "../kernels.h"

namespace fused_losses {

Precision precision_of(c10::string_view name);
Type type_of(const at::Tensor& t);
Parallel torch_threads();

// Large pages for large outputs: a fresh gradient is gigabytes of page faults otherwise.
void advise_huge(const at::Tensor& t);

// Scratch of so many bytes, and its first address that is aligned to 64.
at::Tensor scratch(size_t bytes);
void* aligned(const at::Tensor& buffer);

// The ops of the sweep over pairs (schemas: fused_losses/pairs.py), pairs.cpp.
void register_pairs(torch::Library& m);

// The k best columns (schema: fused_losses/selection.py), topk.cpp.
void register_topk(torch::Library& m);

// The matrix of distances (schema: fused_losses/distance_matrix.py), distances.cpp.
void register_distances(torch::Library& m);

// Steps of an optimiser on some rows (schemas: fused_losses/row_update.py), bind_row_update.cpp.
void register_row_update(torch::Library& m);

}  // namespace fused_losses
