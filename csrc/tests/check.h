// What the tests of the kernels share.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

inline int failures = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

// Of several threads the last never comes, as on a busy machine.
inline void on_threads(int count, void (*body)(void*, int), void* context) {
  std::vector<std::thread> threads;
  const int come = count > 2 ? count - 1 : count;
  for (int i = 1; i < come; ++i) threads.emplace_back([=] { body(context, i); });
  body(context, 0);
  for (auto& t : threads) t.join();
}

inline std::vector<float> random(int64_t count, float scale, unsigned seed) {
  std::mt19937 engine(seed);
  std::normal_distribution<float> law(0, scale);
  std::vector<float> out(count);
  for (float& v : out) v = law(engine);
  return out;
}

template <class T>
std::vector<T> drawn(int64_t count, float scale, unsigned seed) {
  const auto values = random(count, scale, seed);
  return {values.begin(), values.end()};
}

// The values in 16 bits, and rounded to them.
template <class T>
std::vector<uint16_t> in_bf16(std::vector<T>& values) {
  std::vector<uint16_t> out;
  for (T& v : values) {
    out.push_back((std::bit_cast<uint32_t>(static_cast<float>(v)) + 0x8000) >> 16);
    v = std::bit_cast<float>(uint32_t(out.back()) << 16);
  }
  return out;
}

// The products of a host, as kernels.h wants them.
template <class T>
void gemm(bool ta, bool tb, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b,
          int64_t ldb, T beta, T* c, int64_t ldc) {
  expect(m >= 0 && n >= 0 && k >= 0, "sizes of a product");
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      double sum = beta == 0 ? 0 : beta * c[j * ldc + i];
      for (int64_t e = 0; e < k; ++e) {
        sum += double(a[ta ? i * lda + e : e * lda + i]) * b[tb ? e * ldb + j : j * ldb + e];
      }
      c[j * ldc + i] = static_cast<T>(sum);
    }
  }
}

// The error in relative L2.
template <class T>
double worst(const std::vector<T>& got, const std::vector<double>& want) {
  double error = 0, size = 1e-30;
  for (size_t i = 0; i < want.size(); ++i) {
    error += (got[i] - want[i]) * (got[i] - want[i]);
    size += want[i] * want[i];
  }
  return std::sqrt(error / size);
}
