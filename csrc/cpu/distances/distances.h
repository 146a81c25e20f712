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

// Of the metrics that are made of products.
template <class P, class T>
constexpr DistanceKernels products_table() {
  DistanceKernels k;
  k.forward_bytes = [](const DistanceProblem& p, int threads) {
    const ProductsPlan<P, T> plan(simplified(p), nullptr);
    return plan.shared_bytes + threads * plan.thread_bytes;
  };
  k.forward = [](const DistanceProblem& p, void* out, void* buffer, const Parallel& parallel) {
    products_forward<P, T>(simplified(p), static_cast<T*>(out), buffer, parallel);
  };
  k.backward_bytes = [](const DistanceProblem& p, const DistanceBackwardOut& out, int threads) {
    return products_backward_bytes<P, T>(simplified(p), out, threads);
  };
  k.backward = [](const DistanceProblem& p, const DistanceBackwardIn& in,
                  const DistanceBackwardOut& out, void* buffer, const Parallel& parallel) {
    products_backward<P, T>(simplified(p), in, out, buffer, parallel);
  };
  return k;
}

#if !defined(__AVX512BF16__)

template <class T>
constexpr DistanceKernels kProducts = products_table<Plain<T>, T>();

constexpr DistanceKernels distance_table() {
  DistanceKernels k;
  k.forward_bytes = [](const DistanceProblem& given, int threads) {
    const DistanceProblem p = simplified(given);
    if (p.is_bool) return bits_bytes(p);
    if (made_of_products(p)) {
      return (p.is_double ? kProducts<double> : kProducts<float>).forward_bytes(p, threads);
    }
    return p.is_double ? sums_forward_bytes<double>(p, threads)
                       : sums_forward_bytes<float>(p, threads);
  };
  k.forward = [](const DistanceProblem& given, void* out, void* buffer, const Parallel& parallel) {
    const DistanceProblem p = simplified(given);
    if (p.is_bool) return bits_forward(p, static_cast<float*>(out), buffer, parallel);
    if (made_of_products(p)) {
      return (p.is_double ? kProducts<double> : kProducts<float>).forward(p, out, buffer, parallel);
    }
    if (p.is_double) return any_sums_forward<double>(p, out, buffer, parallel);
    any_sums_forward<float>(p, out, buffer, parallel);
  };
  k.backward_bytes = [](const DistanceProblem& given, const DistanceBackwardOut& out, int threads) {
    const DistanceProblem p = simplified(given);
    if (made_of_products(p)) {
      return (p.is_double ? kProducts<double> : kProducts<float>).backward_bytes(p, out, threads);
    }
    return p.is_double ? sums_backward_bytes<double>(p, out, threads)
                       : sums_backward_bytes<float>(p, out, threads);
  };
  k.backward = [](const DistanceProblem& given, const DistanceBackwardIn& in,
                  const DistanceBackwardOut& out, void* buffer, const Parallel& parallel) {
    const DistanceProblem p = simplified(given);
    if (made_of_products(p)) {
      return (p.is_double ? kProducts<double> : kProducts<float>)
          .backward(p, in, out, buffer, parallel);
    }
    if (p.is_double) return sums_backward<double>(p, in, out, buffer, parallel);
    sums_backward<float>(p, in, out, buffer, parallel);
  };
  return k;
}

#endif

}  // namespace fused_losses::FL_ISA
