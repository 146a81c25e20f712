// Fills the table of the distances from the templates.
#pragma once

#include "bits.h"
#include "products.h"
#include "products_backward.h"
#include "sums.h"

namespace fused_losses::FL_ISA {

// Minkowski's p = 1, 2 and inf have kernels of their own.
inline DistanceProblem simplified(DistanceProblem p) {
  if (p.kind != Distance::kMinkowski) return p;
  if (p.p == 1) p.kind = Distance::kCityblock;
  if (p.p == 2) p.kind = Distance::kEuclidean;
  if (p.p == std::numeric_limits<double>::infinity()) p.kind = Distance::kChebyshev;
  return p;
}

inline bool made_of_products(const DistanceProblem& p) {
  return p.kind == Distance::kDot || p.kind == Distance::kSquared || p.kind == Distance::kEuclidean;
}

// Calls f.template operator()<P, T>() with the products of a forward (or of a backward).
template <class F>
inline auto with_distance_products(const DistanceProblem& p, [[maybe_unused]] bool backward,
                                   F&& f) {
  if (p.is_double) return f.template operator()<Plain<double>, double>();
#if defined(__AVX512BF16__)
  if (p.precision == Precision::kBFloat16 || (backward && p.precision == Precision::kMixed)) {
    return f.template operator()<Pairs, float>();
  }
#endif
  return f.template operator()<Plain<float>, float>();
}

template <class T>
inline size_t sums_forward_bytes(const DistanceProblem& p, int threads) {
  return with_metric<T>(p, [&]<class M>(const M&) {
    const SumsPlan<M, T> plan(p, nullptr);
    return plan.shared_bytes + threads * plan.thread_bytes;
  });
}

template <class T>
inline void any_sums_forward(const DistanceProblem& p, void* out, void* buffer,
                             const Parallel& parallel) {
  with_metric<T>(p, [&]<class M>(const M& metric) {
    sums_forward<M, T>(metric, p, static_cast<T*>(out), buffer, parallel);
  });
}

constexpr DistanceKernels distance_table() {
  DistanceKernels k;
  k.forward_bytes = [](const DistanceProblem& given, int threads) {
    const DistanceProblem p = simplified(given);
    if (p.is_bool) return bits_bytes(p);
    if (made_of_products(p)) {
      return with_distance_products(p, false, [&]<class P, class T>() {
        const ProductsPlan<P, T> plan(p, nullptr);
        return plan.shared_bytes + threads * plan.thread_bytes;
      });
    }
    return p.is_double ? sums_forward_bytes<double>(p, threads)
                       : sums_forward_bytes<float>(p, threads);
  };
  k.forward = [](const DistanceProblem& given, void* out, void* buffer, const Parallel& parallel) {
    const DistanceProblem p = simplified(given);
    if (p.is_bool) return bits_forward(p, static_cast<float*>(out), buffer, parallel);
    if (made_of_products(p)) {
      return with_distance_products(p, false, [&]<class P, class T>() {
        products_forward<P, T>(p, static_cast<T*>(out), buffer, parallel);
      });
    }
    if (p.is_double) return any_sums_forward<double>(p, out, buffer, parallel);
    any_sums_forward<float>(p, out, buffer, parallel);
  };
  k.backward_bytes = [](const DistanceProblem& given, const DistanceBackwardOut& out, int threads) {
    const DistanceProblem p = simplified(given);
    if (made_of_products(p)) {
      return with_distance_products(p, true, [&]<class P, class T>() {
        return products_backward_bytes<P, T>(p, out, threads);
      });
    }
    return p.is_double ? sums_backward_bytes<double>(p, out, threads)
                       : sums_backward_bytes<float>(p, out, threads);
  };
  k.backward = [](const DistanceProblem& given, const DistanceBackwardIn& in,
                  const DistanceBackwardOut& out, void* buffer, const Parallel& parallel) {
    const DistanceProblem p = simplified(given);
    if (made_of_products(p)) {
      return with_distance_products(p, true, [&]<class P, class T>() {
        products_backward<P, T>(p, in, out, buffer, parallel);
      });
    }
    if (p.is_double) return sums_backward<double>(p, in, out, buffer, parallel);
    sums_backward<float>(p, in, out, buffer, parallel);
  };
  return k;
}

}  // namespace fused_losses::FL_ISA
