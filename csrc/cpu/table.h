// Fills the table of one instruction set from the templates. It is a constant: code that filled it
// at run time would be of that instruction set, on a CPU that may not have it.
#pragma once

#include "class_rules/backward.h"
#include "distances/distances.h"
#include "divergence/backward.h"
#include "listed.h"
#include "maxsim.h"
#include "pairs/attention.h"
#include "pairs/gradients.h"
#include "peaks.h"
#include "row_statistics/backward.h"
#include "row_update.h"
#include "topk/topk.h"
#include "triplets.h"

namespace fused_losses::FL_ISA {

using F32 = Plain<float>;
using F64 = Plain<double>;

// Calls f.template operator()<PS, PG, T>() with the products that a problem asks for.
template <class F>
inline auto with_products(bool is_double, [[maybe_unused]] Precision precision, F&& f) {
  if (is_double) return f.template operator()<F64, F64, double>();
#if defined(__AVX512BF16__)
  if (precision == Precision::kMixed) return f.template operator()<F32, Pairs, float>();
  if (precision == Precision::kBFloat16) return f.template operator()<Pairs, Pairs, float>();
#endif
  return f.template operator()<F32, F32, float>();
}

template <class F>
inline auto with_products(const Problem& p, F&& f) {
  return with_products(p.w.type == Type::kFloat64, p.precision, f);
}

template <class F>
inline auto with_products(const PairProblem& p, F&& f) {
  return with_products(p.is_double, p.precision, f);
}

// of a forward no product is a gradient's: mixed rounds none
constexpr RowKernels row_table() {
  RowKernels k;
  k.forward_bytes = [](const Problem& p, int threads) {
    return with_products(
        p, [&]<class PS, class, class T>() { return forward_bytes<PS, T>(p, threads); });
  };
  k.forward = [](const Problem& p, const ForwardOut& out, void* buffer, const Parallel& parallel) {
    with_products(p, [&]<class PS, class, class T>() { forward<PS, T>(p, out, buffer, parallel); });
  };
  k.backward_bytes = [](const Problem& p, int threads, bool dx, bool dw) {
    return with_products(p, [&]<class PS, class PG, class T>() {
      return backward_bytes<PS, PG, T>(p, threads, dx, dw);
    });
  };
  k.backward = [](const Problem& p, const BackwardIn& in, const BackwardOut& out, void* buffer,
                  const Parallel& parallel) {
    with_products(p, [&]<class PS, class PG, class T>() {
      backward<PS, PG, T>(p, in, out, buffer, parallel);
    });
  };
  return k;
}

constexpr ClassKernels class_table() {
  ClassKernels k;
  k.forward_bytes = [](const ClassProblem& c, int threads) {
    return with_products(
        c.rows, [&]<class PS, class, class T>() { return class_forward_bytes<PS, T>(c, threads); });
  };
  k.forward = [](const ClassProblem& c, const ClassForwardOut& out, void* buffer,
                 const Parallel& parallel) {
    with_products(c.rows, [&]<class PS, class, class T>() {
      class_forward<PS, T>(c, out, buffer, parallel);
    });
  };
  k.backward_bytes = [](const ClassProblem& c, int threads, bool dx, bool dw) {
    return with_products(c.rows, [&]<class PS, class PG, class T>() {
      return class_backward_bytes<PS, PG, T>(c, threads, dx, dw);
    });
  };
  k.backward = [](const ClassProblem& c, const ClassBackwardIn& in, const BackwardOut& out,
                  void* buffer, const Parallel& parallel) {
    with_products(c.rows, [&]<class PS, class PG, class T>() {
      class_backward<PS, PG, T>(c, in, out, buffer, parallel);
    });
  };
  return k;
}

constexpr DivergenceKernels divergence_table() {
  DivergenceKernels k;
  k.forward_bytes = [](const DivergenceProblem& p, int threads) {
    return with_products(p.student, [&]<class PS, class, class T>() {
      return divergence_forward_bytes<PS, T>(p, threads);
    });
  };
  k.forward = [](const DivergenceProblem& p, const DivergenceForwardOut& out, void* buffer,
                 const Parallel& parallel) {
    with_products(p.student, [&]<class PS, class, class T>() {
      divergence_forward<PS, T>(p, out, buffer, parallel);
    });
  };
  k.backward_bytes = [](const DivergenceProblem& p, const DivergenceBackwardOut& out, int threads) {
    return with_products(p.student, [&]<class PS, class PG, class T>() {
      return divergence_backward_bytes<PS, PG, T>(p, out, threads);
    });
  };
  k.backward = [](const DivergenceProblem& p, const DivergenceBackwardIn& in,
                  const DivergenceBackwardOut& out, void* buffer, const Parallel& parallel) {
    with_products(p.student, [&]<class PS, class PG, class T>() {
      divergence_backward<PS, PG, T>(p, in, out, buffer, parallel);
    });
  };
  return k;
}

constexpr PairKernels pair_table() {
  PairKernels k;
  k.kept = [](const PairProblem& p, int64_t most) {
    return with_products(p, [&]<class PS, class, class T>() { return pair_kept<PS, T>(p, most); });
  };
  k.forward_bytes = [](const PairProblem& p, int threads) {
    return with_products(
        p, [&]<class PS, class, class T>() { return pair_forward_bytes<PS, T>(p, threads); });
  };
  k.forward = [](const PairProblem& p, const PairForwardOut& out, void* buffer,
                 const Parallel& parallel) {
    with_products(
        p, [&]<class PS, class, class T>() { pair_forward<PS, T>(p, out, buffer, parallel); });
  };
  k.backward_bytes = [](const PairProblem& p, const PairBackwardOut& out, int threads) {
    return with_products(p, [&]<class PS, class PG, class T>() {
      return pair_backward_bytes<PS, PG, T>(p, out, threads);
    });
  };
  k.backward = [](const PairProblem& p, const PairBackwardIn& in, const PairBackwardOut& out,
                  void* buffer, const Parallel& parallel) {
    with_products(p, [&]<class PS, class PG, class T>() {
      pair_backward<PS, PG, T>(p, in, out, buffer, parallel);
    });
  };
  k.attention_bytes = [](const PairProblem& p, const AttentionIn& a, int threads) {
    // of a forward no product is a gradient's: mixed rounds none
    return with_products(
        p, [&]<class PS, class, class T>() { return attention_bytes<PS, PS, T>(p, a, threads); });
  };
  k.attention = [](const PairProblem& p, const AttentionIn& a, const AttentionForwardOut& out,
                   void* buffer, const Parallel& parallel) {
    with_products(
        p, [&]<class PS, class, class T>() { attention<PS, PS, T>(p, a, out, buffer, parallel); });
  };
  k.attention_backward_bytes = [](const PairProblem& p, const AttentionIn& a,
                                  const PairBackwardOut& out, bool dvalues, int threads) {
    return with_products(p, [&]<class PS, class PG, class T>() {
      return attention_backward_bytes<PS, PG, T>(p, a, out, dvalues, threads);
    });
  };
  k.attention_backward = [](const PairProblem& p, const AttentionIn& a,
                            const AttentionBackwardIn& in, const PairBackwardOut& out,
                            void* dvalues, void* buffer, const Parallel& parallel) {
    with_products(p, [&]<class PS, class PG, class T>() {
      attention_backward<PS, PG, T>(p, a, in, out, dvalues, buffer, parallel);
    });
  };
  return k;
}

// As with_products; MaxSim's backward multiplies no matrices, so "mixed" is exact.
template <class F>
inline auto with_tokens(const MaxSimProblem& p, F&& f) {
  if (p.is_double) return f.template operator()<F64, double>();
#if defined(__AVX512BF16__)
  if (p.precision == Precision::kBFloat16) return f.template operator()<Pairs, float>();
#endif
  return f.template operator()<F32, float>();
}

constexpr MaxSimKernels maxsim_table() {
  MaxSimKernels k;
  k.forward_bytes = [](const MaxSimProblem& p, int threads) {
    return with_tokens(p, [&]<class P, class T>() { return maxsim_bytes<P, T>(p, threads); });
  };
  k.forward = [](const MaxSimProblem& p, void* scores, int32_t* index, void* buffer,
                 const Parallel& parallel) {
    with_tokens(
        p, [&]<class P, class T>() { maxsim_forward<P, T>(p, scores, index, buffer, parallel); });
  };
  k.backward = [](const MaxSimProblem& p, const void* grad, const int32_t* index, void* dqueries,
                  void* ddocuments, const Parallel& parallel) {
    if (p.is_double) {
      maxsim_backward<double>(p, grad, index, dqueries, ddocuments, parallel);
    } else {
      maxsim_backward<float>(p, grad, index, dqueries, ddocuments, parallel);
    }
  };
  return k;
}

// Calls f.template operator()<P>() with the products that screen.
template <class F>
inline auto with_screen([[maybe_unused]] const TopkProblem& p, F&& f) {
#if defined(__AVX512BF16__)
  if (p.bf16) return f.template operator()<Pairs>();
#endif
  return f.template operator()<F32>();
}

constexpr TopkKernels topk_table() {
  TopkKernels k;
  k.bytes = [](const TopkProblem& p, int threads) {
    return with_screen(p, [&]<class P>() { return topk_bytes<P>(p, threads); });
  };
  k.run = [](const TopkProblem& p, const TopkOut& out, void* buffer, const Parallel& parallel) {
    with_screen(p, [&]<class P>() { topk<P>(p, out, buffer, parallel); });
  };
  k.scores = [](const TopkProblem& p, float* scores, float* bounds, double* center, void* buffer,
                const Parallel& parallel) {
    if (p.heads.first) return head_scores<F32>(p, scores, bounds, buffer, parallel);
    with_screen(p, [&]<class P>() { topk_scores<P>(p, scores, bounds, center, buffer, parallel); });
  };
  return k;
}

constexpr TripletKernels triplet_table() {
  TripletKernels k;
  k.bytes = [](const TripletProblem& p, int threads) {
    return p.is_double ? triplet_bytes<double>(p, threads) : triplet_bytes<float>(p, threads);
  };
  k.forward = [](const TripletProblem& p, double* statistics, void* buffer,
                 const Parallel& parallel) {
    if (p.is_double) return triplets_forward<double>(p, statistics, buffer, parallel);
    triplets_forward<float>(p, statistics, buffer, parallel);
  };
  k.backward = [](const TripletProblem& p, const void* grad, void* slope, void* buffer,
                  const Parallel& parallel) {
    if (p.is_double) return triplets_backward<double>(p, grad, slope, buffer, parallel);
    triplets_backward<float>(p, grad, slope, buffer, parallel);
  };
  return k;
}

constexpr ListedKernels listed_table() {
  ListedKernels k;
  k.bytes = listed_bytes;
  k.forward = [](const ListedProblem& p, void* score, void* buffer, const Parallel& parallel) {
    if (p.x.type == Type::kFloat64) return listed_forward<double>(p, score, buffer, parallel);
    listed_forward<float>(p, score, buffer, parallel);
  };
  k.backward = [](const ListedProblem& p, const void* grad, void* dx, void* dy, void* buffer,
                  const Parallel& parallel) {
    if (p.x.type == Type::kFloat64) {
      return listed_backward<double>(p, grad, dx, dy, buffer, parallel);
    }
    listed_backward<float>(p, grad, dx, dy, buffer, parallel);
  };
  return k;
}

constexpr Kernels table(const char* capability, bool bf16) {
  return {capability,         bf16,
          kPreferBlas,        row_table(),
          class_table(),      pair_table(),
          maxsim_table(),     topk_table(),
          distance_table(),   triplet_table(),
          row_update_table(), divergence_table(),
          peak_table(),       listed_table()};
}

}  // namespace fused_losses::FL_ISA
