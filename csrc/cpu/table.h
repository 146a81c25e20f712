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

inline bool is_double(const Problem& p) { return p.w.type == Type::kFloat64; }
inline bool is_double(const ClassProblem& c) { return is_double(c.rows); }
inline bool is_double(const DivergenceProblem& p) { return is_double(p.student); }
inline bool is_double(const auto& p) { return p.is_double; }
inline Precision precision(const ClassProblem& c) { return c.rows.precision; }
inline Precision precision(const DivergenceProblem& p) { return p.student.precision; }
inline Precision precision(const auto& p) { return p.precision; }

// Calls f.template operator()<P, T>() with the products that a forward asks for. None of them is a
// gradient's: mixed rounds none.
template <class F>
inline auto with_scores([[maybe_unused]] const auto& p, F&& f) {
#if defined(__AMX_BF16__)
  constexpr bool kMaySplit = !std::is_same_v<std::decay_t<decltype(p)>, MaxSimProblem>;
  if constexpr (kMaySplit) {
    if (precision(p) != Precision::kBFloat16) return f.template operator()<F32, float>();
  }
#endif
#if defined(__AVX512BF16__)
  return f.template operator()<Pairs, float>();  // avx512 has the others: narrow_table.h
#else
  if (is_double(p)) return f.template operator()<F64, double>();
  return f.template operator()<F32, float>();
#endif
}

// Calls f.template operator()<PS, PG, T>() with those of scores and gradients in a backward.
template <class F>
inline auto with_gradients(const auto& p, F&& f) {
#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__)
  if (precision(p) == Precision::kFull) return f.template operator()<F32, F32, float>();
#endif
  if (precision(p) == Precision::kMixed) return f.template operator()<F32, Pairs, float>();
  return f.template operator()<Pairs, Pairs, float>();
#else
  if (is_double(p)) return f.template operator()<F64, F64, double>();
  return f.template operator()<F32, F32, float>();
#endif
}

constexpr RowKernels row_table() {
  RowKernels k;
  k.forward_bytes = [](const Problem& p, int threads) {
    return with_scores(p, [&]<class P, class T>() { return forward_bytes<P, T>(p, threads); });
  };
  k.forward = [](const Problem& p, const ForwardOut& out, void* buffer, const Parallel& parallel) {
    with_scores(p, [&]<class P, class T>() { forward<P, T>(p, out, buffer, parallel); });
  };
  k.backward_bytes = [](const Problem& p, int threads, bool dx, bool dw) {
    return with_gradients(p, [&]<class PS, class PG, class T>() {
      return backward_bytes<PS, PG, T>(p, threads, dx, dw);
    });
  };
  k.backward = [](const Problem& p, const BackwardIn& in, const BackwardOut& out, void* buffer,
                  const Parallel& parallel) {
    with_gradients(p, [&]<class PS, class PG, class T>() {
      backward<PS, PG, T>(p, in, out, buffer, parallel);
    });
  };
  return k;
}

constexpr ClassKernels class_table() {
  ClassKernels k;
  k.forward_bytes = [](const ClassProblem& c, int threads) {
    return with_scores(c,
                       [&]<class P, class T>() { return class_forward_bytes<P, T>(c, threads); });
  };
  k.forward = [](const ClassProblem& c, const ClassForwardOut& out, void* buffer,
                 const Parallel& parallel) {
    with_scores(c, [&]<class P, class T>() { class_forward<P, T>(c, out, buffer, parallel); });
  };
  k.backward_bytes = [](const ClassProblem& c, int threads, bool dx, bool dw) {
    return with_gradients(c, [&]<class PS, class PG, class T>() {
      return class_backward_bytes<PS, PG, T>(c, threads, dx, dw);
    });
  };
  k.backward = [](const ClassProblem& c, const ClassBackwardIn& in, const BackwardOut& out,
                  void* buffer, const Parallel& parallel) {
    with_gradients(c, [&]<class PS, class PG, class T>() {
      class_backward<PS, PG, T>(c, in, out, buffer, parallel);
    });
  };
  return k;
}

constexpr DivergenceKernels divergence_table() {
  DivergenceKernels k;
  k.forward_bytes = [](const DivergenceProblem& p, int threads) {
    return with_scores(
        p, [&]<class P, class T>() { return divergence_forward_bytes<P, T>(p, threads); });
  };
  k.forward = [](const DivergenceProblem& p, const DivergenceForwardOut& out, void* buffer,
                 const Parallel& parallel) {
    with_scores(p, [&]<class P, class T>() { divergence_forward<P, T>(p, out, buffer, parallel); });
  };
  k.backward_bytes = [](const DivergenceProblem& p, const DivergenceBackwardOut& out, int threads) {
    return with_gradients(p, [&]<class PS, class PG, class T>() {
      return divergence_backward_bytes<PS, PG, T>(p, out, threads);
    });
  };
  k.backward = [](const DivergenceProblem& p, const DivergenceBackwardIn& in,
                  const DivergenceBackwardOut& out, void* buffer, const Parallel& parallel) {
    with_gradients(p, [&]<class PS, class PG, class T>() {
      divergence_backward<PS, PG, T>(p, in, out, buffer, parallel);
    });
  };
  return k;
}

constexpr PairKernels pair_table() {
  PairKernels k;
  k.kept = [](const PairProblem& p, int64_t most) {
    return with_scores(p, [&]<class P, class T>() { return pair_kept<P, T>(p, most); });
  };
  k.forward_bytes = [](const PairProblem& p, int threads) {
    return with_scores(p, [&]<class P, class T>() { return pair_forward_bytes<P, T>(p, threads); });
  };
  k.forward = [](const PairProblem& p, const PairForwardOut& out, void* buffer,
                 const Parallel& parallel) {
    with_scores(p, [&]<class P, class T>() { pair_forward<P, T>(p, out, buffer, parallel); });
  };
  k.backward_bytes = [](const PairProblem& p, const PairBackwardOut& out, int threads) {
    return with_gradients(p, [&]<class PS, class PG, class T>() {
      return pair_backward_bytes<PS, PG, T>(p, out, threads);
    });
  };
  k.backward = [](const PairProblem& p, const PairBackwardIn& in, const PairBackwardOut& out,
                  void* buffer, const Parallel& parallel) {
    with_gradients(p, [&]<class PS, class PG, class T>() {
      pair_backward<PS, PG, T>(p, in, out, buffer, parallel);
    });
  };
  k.attention_bytes = [](const PairProblem& p, const AttentionIn& a, int threads) {
    return with_scores(p,
                       [&]<class P, class T>() { return attention_bytes<P, P, T>(p, a, threads); });
  };
  k.attention = [](const PairProblem& p, const AttentionIn& a, const AttentionForwardOut& out,
                   void* buffer, const Parallel& parallel) {
    with_scores(p, [&]<class P, class T>() { attention<P, P, T>(p, a, out, buffer, parallel); });
  };
  k.attention_backward_bytes = [](const PairProblem& p, const AttentionIn& a,
                                  const PairBackwardOut& out, bool dvalues, int threads) {
    return with_gradients(p, [&]<class PS, class PG, class T>() {
      return attention_backward_bytes<PS, PG, T>(p, a, out, dvalues, threads);
    });
  };
  k.attention_backward = [](const PairProblem& p, const AttentionIn& a,
                            const AttentionBackwardIn& in, const PairBackwardOut& out,
                            void* dvalues, void* buffer, const Parallel& parallel) {
    with_gradients(p, [&]<class PS, class PG, class T>() {
      attention_backward<PS, PG, T>(p, a, in, out, dvalues, buffer, parallel);
    });
  };
  return k;
}

// MaxSim's backward multiplies no matrices.
constexpr MaxSimKernels maxsim_table() {
  MaxSimKernels k;
  k.forward_bytes = [](const MaxSimProblem& p, int threads) {
    return with_scores(p, [&]<class P, class T>() { return maxsim_bytes<P, T>(p, threads); });
  };
  k.forward = [](const MaxSimProblem& p, void* scores, int32_t* index, void* buffer,
                 const Parallel& parallel) {
    with_scores(
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

// The products that screen.
#if defined(__AVX512BF16__)
using Screen = Pairs;
#else
using Screen = F32;
#endif

constexpr TopkKernels topk_table() {
  TopkKernels k;
  k.bytes = [](const TopkProblem& p, int threads) { return topk_bytes<Screen>(p, threads); };
  k.run = [](const TopkProblem& p, const TopkOut& out, void* buffer, const Parallel& parallel) {
    topk<Screen>(p, out, buffer, parallel);
  };
  k.scores = [](const TopkProblem& p, float* scores, float* bounds, double* center, void* buffer,
                const Parallel& parallel) {
    if (p.heads.first) return head_scores<F32>(p, scores, bounds, buffer, parallel);
    topk_scores<Screen>(p, scores, bounds, center, buffer, parallel);
  };
  return k;
}

#if !defined(__AVX512BF16__)
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

constexpr Kernels table(const char* capability) {
  return {capability,       false,           kPreferBlas,        row_table(),
          class_table(),    pair_table(),    maxsim_table(),     topk_table(),
          distance_table(), triplet_table(), row_update_table(), divergence_table(),
          peak_table(),     listed_table()};
}

#endif

}  // namespace fused_losses::FL_ISA
