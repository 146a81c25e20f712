// Rows by index into a chunk, cast to what a product multiplies, and their 1/|w| in the same pass.
#include "rows.h"

namespace fused_losses::cuda::gather {

#define GATHER_FIELDS(F)     \
  F(const void*, rows)       \
  F(const int64_t*, classes) \
  F(void*, out)              \
  F(void*, inverse)          \
  F(int64_t, stride)         \
  F(int64_t, count)          \
  F(int64_t, d)              \
  F(int32_t, type)           \
  F(int32_t, out_type)

// rows [*, d]; classes [count] or null for 0 .. count-1; out [count, d] or null; inverse [count] or
// null
FL_ARGUMENTS(GatherArguments, GATHER_FIELDS)

// A warp a row.
template <class From, class To>
FL_KERNEL(128)
gather_rows(GatherArguments a) {
  constexpr int kStep = kPack<To>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const From* rows = static_cast<const From*>(a.rows);
  To* out = static_cast<To*>(a.out);
  const bool wide = packs(rows, a.stride) && (out == nullptr || packs(out, a.d));
  const int64_t packed = wide ? a.d / kStep * kStep : 0;
  for (int64_t j = int64_t(blockIdx.x) * warps + threadIdx.x / kWarp; j < a.count;
       j += int64_t(gridDim.x) * warps) {
    const From* row = rows + (a.classes ? ld(a.classes + j) : j) * a.stride;
    To* to = out == nullptr ? nullptr : out + j * a.d;
    float square = 0;
    FL_ROLLED
    for (int64_t k = lane * kStep; k < packed; k += kWarp * kStep) {
      const Pack<From, kStep> v = ld_many<kStep>(row + k);
      Pack<To, kStep> w;
      for (int i = 0; i < kStep; ++i) {
        const float f = to_float(v[i]);
        square += f * f;
        w[i] = from_float<To>(f);
      }
      if (to != nullptr) st_pack(to + k, w);
    }
    FL_ROLLED
    for (int64_t k = packed + lane; k < a.d; k += kWarp) {
      const float f = to_float(ld(row + k));
      square += f * f;
      if (to != nullptr) st(to + k, from_float<To>(f));
    }
    if (a.inverse == nullptr) continue;
    const float inverse = inverse_norm(warp_sum(square), row, a.d);
    if (lane == 0) st(static_cast<float*>(a.inverse) + j, inverse);
  }
}

template <class From, class To>
int launch_gather(const GatherArguments& a, Stream stream) {
  return launch(gather_rows<From, To>, blocks_of_warps(a.count, 128), 128, 0, stream, a);
}

int run_gather(const GatherArguments& a, Stream stream) {
  if (a.type == kTypeFloat && a.out_type == kTypeBf16) {
    return launch_gather<float, Bf16>(a, stream);
  }
  return with_float_type(a.type, [&](auto zero) {
    using T = decltype(zero);
    return launch_gather<T, T>(a, stream);
  });
}

FL_EXPORT(gather, GatherArguments, GATHER_FIELDS, run_gather)

#if defined(__CUDACC__)
// Why a device has no code of these kernels, 0: it has, or its driver makes it from their PTX. All
// files are compiled for the same devices, so that one kernel stands for every one.
FL_PUBLIC int fused_losses_kernels_on(int device) {
  int before = 0;
  cudaFuncAttributes found;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&found, gather_rows<float, float>);
  cudaSetDevice(before);
  cudaGetLastError();  // so that the next launch does not report this
  return error;
}
#endif

}  // namespace fused_losses::cuda::gather
