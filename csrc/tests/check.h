// What the tests of the kernels share.
#pragma once

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
