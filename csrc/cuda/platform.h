// What a kernel source needs of CUDA: under nvcc, and under any C++ compiler, which builds the same
// source to be executed on the host (host/simulator.h). No headers of torch.
//
// The rules that make this work:
//   - global memory is touched by `ld`, `st` and atomics only: the host checks and counts them;
//   - shared memory is declared by FL_SHARED or is `dynamic_shared()`;
//   - kernels take one plain struct and are launched by `launch` alone;
//   - each file, or folder of files, has its own namespace in fused_losses::cuda, which must not be
//     anonymous: names in the PTX are those of the host build, and files link into one library;
//   - no array of two dimensions of a struct with default member initialisers: nvcc 13.0 starts
//     all rows but the first at 0.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "../common.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define FL_FUNCTION __host__ __device__ __forceinline__
#define FL_DEVICE __device__ __forceinline__
#define FL_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)
#define FL_SHARED(type, name) __shared__ type name
// what an unrolled loop indexes stays in registers; one that runs once or twice need not be
// unrolled
#define FL_PRAGMA(text) _Pragma(#text)
#define FL_UNROLL FL_PRAGMA(unroll)
#define FL_UNROLL_TIMES(times) FL_PRAGMA(unroll(times))
#define FL_ROLLED FL_PRAGMA(unroll(1))
#else
#include "host/simulator.h"
#define FL_FUNCTION inline
#define FL_DEVICE inline
#define FL_KERNEL(...) void
#define FL_UNROLL
#define FL_UNROLL_TIMES(times)
#define FL_ROLLED
// one block runs at a time, and every block finds it full of NaN
#define FL_SHARED(type, name) \
  static char name##_key;     \
  type& name = *static_cast<type*>(::fused_losses::host::shared(&name##_key, sizeof(type)))
#endif

namespace fused_losses::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// ---- the 16-bit types: bits, and float for arithmetic ------------------------------------------

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FL_FUNCTION float to_float(float v) { return v; }

FL_FUNCTION float to_float(Bf16 v) {
  const uint32_t wide = uint32_t(v.bits) << 16;
  float out;
  memcpy(&out, &wide, 4);
  return out;
}

FL_FUNCTION float to_float(Half v) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(v.bits));
#else
  // the exponent of a half moved to that of a float; numbers below the normal ones by a product
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, rest = v.bits & 0x7fff;
  uint32_t wide = rest >= 0x7c00 ? 0x7f800000 | (rest & 0x3ff) << 13 : (rest << 13) + (112u << 23);
  float out;
  memcpy(&out, &wide, 4);
  if (rest < 0x400) out = float(rest) * 5.9604644775390625e-8f;
  memcpy(&wide, &out, 4);
  wide |= sign;
  memcpy(&out, &wide, 4);
  return out;
#endif
}

template <class T>
FL_FUNCTION T from_float(float v);

template <>
FL_FUNCTION float from_float<float>(float v) {
  return v;
}

template <>
FL_FUNCTION Bf16 from_float<Bf16>(float v) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
#else
  uint32_t bits;
  memcpy(&bits, &v, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return {0x7fff};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
#endif
}

template <>
FL_FUNCTION Half from_float<Half>(float v) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(v))};
#else
  uint32_t bits;
  memcpy(&bits, &v, 4);
  const uint16_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return {0x7fff};
  if (bits >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 2^16 or beyond
  float size;
  memcpy(&size, &bits, 4);
  if (bits < 0x38800000) {
    // below the normal halves: this sum rounds to steps of 2^-24
    const float moved = size + 0.5f;
    memcpy(&bits, &moved, 4);
    return {uint16_t(sign | (bits - 0x3f000000))};
  }
  bits += 0xfff + (bits >> 13 & 1);
  return {uint16_t(sign | ((bits >> 13) - (112u << 10)))};
#endif
}

// ---- global memory -----------------------------------------------------------------------------

// N neighbours at an address that is aligned to all of them.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
  FL_FUNCTION T& operator[](int i) { return v[i]; }
  FL_FUNCTION const T& operator[](int i) const { return v[i]; }
};

template <class T>
constexpr int kPack = 16 / sizeof(T);

template <class T>
FL_DEVICE T ld(const T* p) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 16) {
    const uint4 bits = *reinterpret_cast<const uint4*>(p);
    T out;
    memcpy(&out, &bits, 16);
    return out;
  } else if constexpr (sizeof(T) == 8 && alignof(T) == 8) {
    const uint2 bits = *reinterpret_cast<const uint2*>(p);
    T out;
    memcpy(&out, &bits, 8);
    return out;
  } else {
    return *p;
  }
#elif defined(__CUDACC__)
  return *p;
#else
  host::touch(p, sizeof(T), alignof(T), host::Access::kLoad);
  return *p;
#endif
}

template <class T>
FL_DEVICE void st(T* p, const T& v) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 16) {
    uint4 bits;
    memcpy(&bits, &v, 16);
    *reinterpret_cast<uint4*>(p) = bits;
  } else if constexpr (sizeof(T) == 8 && alignof(T) == 8) {
    uint2 bits;
    memcpy(&bits, &v, 8);
    *reinterpret_cast<uint2*>(p) = bits;
  } else {
    *p = v;
  }
#elif defined(__CUDACC__)
  *p = v;
#else
  host::touch(p, sizeof(T), alignof(T), host::Access::kStore);
  *p = v;
#endif
}

template <class T>
FL_DEVICE Pack<T, kPack<T>> ld_pack(const T* p) {
  return ld(reinterpret_cast<const Pack<T, kPack<T>>*>(p));
}

template <class T>
FL_DEVICE void st_pack(T* p, const Pack<T, kPack<T>>& v) {
  st(reinterpret_cast<Pack<T, kPack<T>>*>(p), v);
}

// Whether rows of `stride` elements at p can be read in packs.
template <class T>
FL_FUNCTION bool packs(const T* p, int64_t stride) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && stride % kPack<T> == 0;
}

// The block's dynamic shared memory, 16-byte aligned.
FL_DEVICE char* dynamic_shared() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) char fused_losses_dynamic_shared[];
  return fused_losses_dynamic_shared;
#else
  return host::dynamic_shared();
#endif
}

// ---- launches ----------------------------------------------------------------------------------

using Stream = void*;  // a cudaStream_t; unused on the host

// 0, or the code of the first error. A grid without blocks launches nothing.
template <class Arguments>
int launch(void (*kernel)(Arguments), int64_t blocks, int threads, size_t shared,
           [[maybe_unused]] Stream stream, const Arguments& a) {
  if (blocks == 0) return 0;
#if defined(__CUDACC__)
  if (shared > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared, static_cast<cudaStream_t>(stream)>>>(a);
  return cudaGetLastError();
#else
  const host::Launch it = {
      reinterpret_cast<const void*>(kernel), blocks, threads, shared, &a, sizeof(a)};
  const auto body = [](const host::Launch& l) {
    reinterpret_cast<void (*)(Arguments)>(const_cast<void*>(l.kernel))(
        *static_cast<const Arguments*>(l.arguments));
  };
  return host::run(it, body);
#endif
}

// Multiprocessors of the current device.
inline int processors() {
#if defined(__CUDACC__)
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
#else
  return host::processors();
#endif
}

// Blocks for so many blocks' work, at most so many a multiprocessor: a grid-stride loop does the
// rest.
inline int64_t grid_of(int64_t work, int each) {
  const int64_t most = int64_t(each) * processors();
  return work < most ? work : most;
}

// ---- argument structs that Python can read -----------------------------------------------------
//
// #define DEMO_FIELDS(F) F(const void*, x) F(int64_t, n)
// FL_ARGUMENTS(DemoArguments, DEMO_FIELDS)
// int run_demo(const DemoArguments& a, Stream stream);
// FL_EXPORT(demo, DemoArguments, DEMO_FIELDS, run_demo)      // backends/cuda_launch.py:
// launch("demo",
//                                                            //     x=tensor, n=3)

template <class T>
constexpr char code_of() {
  if constexpr (std::is_pointer_v<T>) {
    return std::is_const_v<std::remove_pointer_t<T>> ? 'p' : 'P';  // read only, or not
  }
  if constexpr (std::is_same_v<T, bool>) return '?';
  if constexpr (std::is_same_v<T, int32_t>) return 'i';
  if constexpr (std::is_same_v<T, int64_t>) return 'q';
  if constexpr (std::is_same_v<T, float>) return 'f';
  if constexpr (std::is_same_v<T, double>) return 'd';
  return 0;
}

#define FL_PUBLIC extern "C" __attribute__((visibility("default")))
#define FL_MEMBER(type, name) type name;
#define FL_FIELD(type, name)                                                       \
  static_assert(::fused_losses::cuda::code_of<type>() != 0, "no code for " #type); \
  text += ::fused_losses::cuda::code_of<type>();                                   \
  text += #name " ";
#define FL_ARGUMENTS(Name, FIELDS) \
  struct Name {                    \
    FIELDS(FL_MEMBER)              \
  };
#define FL_EXPORT(name, Name, FIELDS, run)                                                   \
  FL_PUBLIC int fused_losses_##name(const Name* a, void* stream) { return run(*a, stream); } \
  FL_PUBLIC const char* fused_losses_##name##_fields() {                                     \
    static const std::string fields = [] {                                                   \
      std::string text;                                                                      \
      FIELDS(FL_FIELD)                                                                       \
      return text;                                                                           \
    }();                                                                                     \
    return fields.c_str();                                                                   \
  }

// The element types as Python numbers them (backends/cuda_launch.py).
enum ElementType : int32_t { kTypeFloat = 0, kTypeBf16 = 1, kTypeHalf = 2, kTypeInt8 = 3 };

// f(T{}) for the floating point type of this number.
template <class F>
int with_float_type(int32_t type, F&& f) {
  switch (type) {
    case kTypeBf16:
      return f(Bf16{});
    case kTypeHalf:
      return f(Half{});
    default:
      return f(float{});
  }
}

}  // namespace fused_losses::cuda
