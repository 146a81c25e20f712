// The ops of the cpu backend, the module's build information, and what all ops share.
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../threads.h"
#include "bind.h"
#include "calls.h"

namespace fused_losses {
namespace {

using at::Tensor;

// A block of Python in which this thread's float32 products on a GPU are no tf32 products, whatever
// the process allows, or are again what it allows. By torch's own guard: all its other switches are
// the whole process's.
class Tf32Block {
 public:
  explicit Tf32Block(bool allowed) : allowed_(allowed) {}
  void enter() {
    before_ = guard.has_value();
    set(!allowed_);
  }
  void exit() { set(before_); }

 private:
  static void set(bool guarded) {
    if (!guarded) {
      guard.reset();
    } else if (!guard) {
      guard.emplace();
    }
  }
  static thread_local std::optional<at::NoTF32Guard> guard;
  bool allowed_, before_ = false;
};

thread_local std::optional<at::NoTF32Guard> Tf32Block::guard;

// base/compiled.py finds it in the file: what another torch loads may crash before it can be asked
constexpr char kBuiltFor[] = "fused_losses built for torch " TORCH_VERSION;

}  // namespace

Type type_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kFloat:
      return Type::kFloat32;
    case at::kDouble:
      return Type::kFloat64;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kFloat16;
    default:
      TORCH_CHECK_TYPE(false, "expected a floating point tensor, got ", t.scalar_type());
  }
}

Stored stored_as(const Tensor& t) {
  if (t.scalar_type() == at::kBFloat16) return Stored::kBFloat16;
  return t.scalar_type() == at::kHalf ? Stored::kHalf : Stored::kWide;
}

Tensor dense_as_stored(const Tensor& t) {
  const bool wide = stored_as(t) == Stored::kWide && t.scalar_type() != at::kDouble;
  return (wide ? t.to(at::kFloat) : t).contiguous();
}

Precision precision_of(c10::string_view name) {
  const bool known = name == "fp32" || name == "mixed" || name == "bf16";
  TORCH_CHECK_VALUE(known, "precision: expected fp32, mixed or bf16 on a CPU, got ", name);
  if (name == "fp32") return Precision::kFull;
  TORCH_CHECK(best_kernels().bf16, "precision: this CPU has no AVX512_BF16 products");
  return name == "mixed" ? Precision::kMixed : Precision::kBFloat16;
}

void advise_huge([[maybe_unused]] const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = 2 << 20;
  const auto begin = round_up(reinterpret_cast<uintptr_t>(t.data_ptr()), kHuge);
  const auto end = reinterpret_cast<uintptr_t>(t.data_ptr()) + t.nbytes();
  if (end > begin + 4 * kHuge) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Room for the first aligned address.
size_t scratch_bytes(size_t bytes) { return bytes + 64; }

// A small call's scratch stays with its thread for the next one: pages that are given back and
// faulted in again take longer than such a call computes. Never two calls' at once.
Tensor scratch(size_t bytes) {
  thread_local Tensor held;
  const auto count = static_cast<int64_t>(scratch_bytes(bytes));
  const at::Context& context = at::globalContext();
  // whoever asks for fresh memory that is filled gets it
  const bool fills =
      context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  const bool small = bytes <= kHeldScratch && !fills, free = held.use_count() == 1;
  if (small && free && held.numel() >= count) return held;
  // before another is allocated
  if (free) held.reset();
  const Tensor buffer = at::empty({count}, at::TensorOptions().dtype(at::kByte));
  advise_huge(buffer);
  if (small && !held.defined()) held = buffer;
  return buffer;
}

void* aligned(const Tensor& buffer) {
  return reinterpret_cast<void*>(round_up(reinterpret_cast<intptr_t>(buffer.data_ptr()), 64));
}

// The schemas are the Python side's (primitives/op.py).
TORCH_LIBRARY_IMPL(fused_losses, CPU, m) {
  register_row_statistics(m);
  register_pairs(m);
  register_maxsim(m);
  register_topk(m);
  register_distances(m);
  register_triplets(m);
  register_listed(m);
  register_row_update(m);
  register_divergence(m);
}

}  // namespace fused_losses

PYBIND11_MODULE(_C, m) {
  using namespace fused_losses;
  m.doc() = "Build information of the compiled kernels, and what tests need to steer them.";
  m.def(
      "capability", [] { return std::string(best_kernels().capability); },
      "The instruction set that runs: default, avx2, avx512, avx512_bf16 or amx_bf16.");
  m.def("has_bf16", [] { return best_kernels().bf16; }, "Whether bf16 products can run.");
  m.def(
      "force_capability",
      [](std::optional<std::string> name) {
        TORCH_CHECK_VALUE(force_kernels(name ? name->c_str() : nullptr), "capability: cannot run ",
                          *name, " on this CPU");
      },
      "Run another instruction set of this CPU (for tests); None: the best again.");
  m.def(
      "split_blocks",
      [](std::optional<int64_t> least) {
        int64_t* own = best_kernels().split_least;
        TORCH_CHECK_VALUE(own, "split_blocks: ", best_kernels().capability,
                          " splits no factors of float32");
        static const int64_t usual = *own;
        *own = least.value_or(usual);
      },
      "Split float32 factors in calls of so many products and more (for tests); None: the usual.");
  m.def("has_threads", &ran_on_threads,
        "Whether a kernel of this process, or of the one it is a fork of, ran on several threads.");
  m.def("started_workers", &started_workers, "How many threads kernels have beside OpenMP's.");
  m.def("own_threads", &own_threads, "Run kernels on those for so many seconds (for tests).");
  // What a call allocates beyond inputs, outputs and gradients, on torch's number of threads: of
  // forward or backward, whichever is more. `item`: bytes of an element of the inputs.
  m.def("row_workspace", &row_workspace);
  m.def("pair_workspace", &pair_workspace);
  // how many products over pairs are kept of a room for `most`: whole strips of rows
  m.def("pair_kept", &pair_kept);
  m.def("maxsim_workspace", &maxsim_workspace);
  m.def("distance_workspace", &distance_workspace);
  m.def("topk_workspace", &topk_workspace);
  m.def("listed_workspace", &listed_workspace);
  m.def("divergence_workspace", &divergence_workspace);
  m.def("class_rules_workspace", &class_rules_workspace);
  const py::call_guard<py::gil_scoped_release> unlocked;
  m.def("class_rules_forward", &class_rules_forward, unlocked);
  m.def("class_rules_backward", &class_rules_backward, unlocked);
  m.def("all_plain", &all_plain);
  m.def("rows_meet", &rows_meet);
  m.def("pairs_fit", &pairs_fit);
  m.def("pair_statistics", &pair_statistics);
  m.def("listed_scores", &listed_scores, unlocked);
  m.def("unit_rows", &unit_rows, unlocked);
  m.def("row_marks", &row_marks, unlocked);
  m.def("exact_center", &exact_center, unlocked);
  m.def("dense_numbers", &dense_numbers, unlocked);
  m.def("row_statistics", &row_statistics, unlocked);
  m.def("label_names", &label_names, unlocked);
  m.def("all_labelled", &all_labelled, unlocked);
  m.def("target_losses", &target_losses, unlocked);
  m.def("extreme_columns", &extreme_columns, unlocked);
  m.def("root", &root_of, unlocked);
  m.def("inverse", &inverse, unlocked);
  m.def("counted_up", &counted_up, unlocked);
  m.def("softplus", &softplus_of, unlocked);
  m.def("share_loss", &share_loss, unlocked);
  m.def("shares_reduced", &shares_reduced);
  m.def("reduced_loss", &reduced_loss, unlocked);
  m.def("mean_of_each", &mean_of_each, unlocked);
  py::class_<Tf32Block>(m, "tf32_products")
      .def(py::init<bool>())
      .def("__enter__", &Tf32Block::enter)
      .def("__exit__", [](Tf32Block& block, const py::args&) { block.exit(); });
  m.def("tf32_is_off", &at::NoTF32Guard::should_disable_tf32, "In this thread.");
  m.def(
      "multiply_registers",
      [](const std::string& precision, int64_t steps) {
        const PeakKernels& peaks = best_kernels().peaks;
        const auto run = precision_of(precision) == Precision::kFull ? peaks.fp32 : peaks.bf16;
        return run(steps);
      },
      unlocked, "Multiply-adds on this thread in registers, fp32 or bf16; the FLOPs done.");
  // For tests: what the screen of the top-k makes of every pair, and how far it may be wrong.
  m.def("topk_scores", &topk_scores);
  m.def("topk_head_scores", &topk_head_scores);
  m.def("build", [] {
    return std::vector<std::pair<std::string, std::string>>{
        {"compiler", __VERSION__}, {"c++", std::to_string(__cplusplus)}, {"torch", TORCH_VERSION}};
  });
  m.attr("built_for") = kBuiltFor;
}
