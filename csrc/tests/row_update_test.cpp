// The row steps of one instruction set against loops in double: every rule and type, views, any
// number of threads; stochastic rounding is right on average and does not depend on the threads.
//
// usage: row_update_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <cstdlib>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

constexpr int64_t kTable = 90, kCount = 61;
constexpr double kLr = 0.1, kMomentum = 0.9, kShare = 0.7, kDecay = 0.2, kEps = 1e-3;

// A matrix of any type in rows `stride` apart, and its values.
struct Table {
  Type type;
  int64_t rows, width, stride;
  std::vector<char> bytes;

  Table(Type type, int64_t rows, int64_t width, unsigned seed, bool positive = false)
      : type(type), rows(rows), width(width), stride(width + 3), bytes(rows * stride * 8) {
    const auto values = random(rows * width, 1, seed);
    for (int64_t i = 0; i < rows * width; ++i) {
      set(i / width, i % width, positive ? std::abs(values[i]) : values[i]);
    }
  }

  template <class T>
  T* at(int64_t row, int64_t column) {
    return reinterpret_cast<T*>(bytes.data()) + row * stride + column;
  }
  void set(int64_t row, int64_t column, float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if (type == Type::kFloat64) *at<double>(row, column) = value;
    if (type == Type::kFloat32) *at<float>(row, column) = value;
    if (type == Type::kBFloat16) *at<uint16_t>(row, column) = static_cast<uint16_t>(bits >> 16);
    if (type == Type::kFloat16) *at<_Float16>(row, column) = static_cast<_Float16>(value);
  }
  double get(int64_t row, int64_t column) {
    if (type == Type::kFloat64) return *at<double>(row, column);
    if (type == Type::kFloat32) return *at<float>(row, column);
    if (type == Type::kFloat16) return static_cast<float>(*at<_Float16>(row, column));
    const uint32_t bits = static_cast<uint32_t>(*at<uint16_t>(row, column)) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
  }
  RowTable table() { return {bytes.data(), type, stride}; }
  // the largest relative step between neighbours
  double unit() const {
    if (type == Type::kFloat64) return 1e-15;
    if (type == Type::kFloat32) return 4e-7;
    return type == Type::kFloat16 ? 0x1p-10 : 0x1p-7;
  }
};

enum class Step { kPlain, kSgd, kNesterov, kAdamw, kAdagrad, kCatchUp, kCatchUpAlone };

bool catches_up(Step step) { return step == Step::kCatchUp || step == Step::kCatchUpAlone; }

// One element in double; changes w, a and b.
void expected(Step step, double g, const double* f, double& w, double& a, double& b) {
  const double old = w;
  switch (step) {
    case Step::kPlain:
      w -= kLr * (-g + kDecay * w);
      break;
    case Step::kSgd:
    case Step::kNesterov: {
      const double d = -g + kDecay * w;
      a = kMomentum * a + kShare * d;
      w -= kLr * (step == Step::kSgd ? a : d + kMomentum * a);
      break;
    }
    case Step::kAdamw:
      a += 0.1 * (-g - a);
      b = 0.9 * b + 0.1 * g * g;
      w -= kLr * a / (std::sqrt(b) * 2 + kEps) + kDecay * w;
      break;
    case Step::kAdagrad:
      a += g * g;
      w -= -kLr * g / (std::sqrt(a + 0.5) + kEps) + kDecay * w;
      break;
    case Step::kCatchUp:
      w += f[0] * old + f[1] * a;
      a = f[2] * old + f[3] * a;
      break;
    case Step::kCatchUpAlone:
      w += f[0] * old;
  }
}

void run(const Kernels& kernels, Step step, const RowUpdate& p, const double* factors,
         const Parallel& parallel) {
  const RowUpdateKernels& k = kernels.row_update;
  const SgdStep sgd = {kLr, kMomentum, kShare, kDecay, step == Step::kNesterov, true};
  if (step == Step::kAdamw) {
    k.adamw(p, {kLr, 0.1, 0.9, 0.1, 2, kEps, kDecay, true}, parallel);
  } else if (step == Step::kAdagrad) {
    k.adagrad(p, {kLr, kEps, 0.5, kDecay, true}, parallel);
  } else if (catches_up(step)) {
    k.catch_up(p, factors, parallel);
  } else {
    k.sgd(p, sgd, parallel);
  }
}

struct Tables {
  std::vector<int64_t> rows;
  std::vector<double> factors;
  Table weight, first, second, grad;
  RowUpdate problem;

  Tables(Step step, Type type, Type state, Type gradient, int64_t width)
      : weight(type, kTable, width, 1),
        first(state, kTable, width, 2, step == Step::kAdagrad),
        second(state, kTable, width, 3, true),
        grad(gradient, kCount, width, 4) {
    for (int64_t k = 0; k < kCount; ++k) rows.push_back(k * 37 % kTable);
    for (float f : random(kCount * 4, 0.3f, 5)) factors.push_back(f);
    problem = {};
    problem.weight = weight.table();
    if (step != Step::kPlain && step != Step::kCatchUpAlone) problem.states[0] = first.table();
    if (step == Step::kAdamw) problem.states[1] = second.table();
    problem.rows = rows.data();
    if (!catches_up(step)) problem.grad = {grad.bytes.data(), gradient, grad.stride};
    problem.count = kCount;
    problem.width = width;
  }
};

void check(const Kernels& kernels, Step step, Type type, Type state, Type gradient, int64_t width,
           int threads) {
  Tables t(step, type, state, gradient, width);
  const Tables before = t;
  Tables old = before;
  run(kernels, step, t.problem, t.factors.data(), {threads, on_threads});
  std::vector<int64_t> position(kTable, -1);
  for (int64_t k = 0; k < kCount; ++k) position[t.rows[k]] = k;
  double most = 0;
  bool kept = true;
  for (int64_t row = 0; row < kTable; ++row) {
    for (int64_t c = 0; c < width; ++c) {
      double w = old.weight.get(row, c), a = old.first.get(row, c), b = old.second.get(row, c);
      const int64_t k = position[row];
      if (k < 0) {
        kept = kept && t.weight.get(row, c) == w && t.first.get(row, c) == a;
        continue;
      }
      expected(step, old.grad.get(k, c), &t.factors[k * 4], w, a, b);
      const auto error = [&](Table& table, double want) {
        const double tiny = type == Type::kFloat64 ? 1e-15 : 1e-6;
        const double off = std::abs(table.get(row, c) - want);
        // to nearest where 16 bits are stored
        const double steps = table.unit() > 1e-6 ? 0.55 : 4;
        most = std::max(most, off / (steps * (table.unit() * std::abs(want) + tiny)));
      };
      error(t.weight, w);
      if (t.problem.states[0].data) error(t.first, a);
      if (t.problem.states[1].data) error(t.second, b);
    }
    // what lies between the rows of a view
    for (int64_t c = width * 8; c < 8; ++c) kept = kept && t.weight.bytes[c] == 0;
  }
  const std::string name = std::to_string(int(step)) + " of types " + std::to_string(int(type)) +
                           std::to_string(int(state)) + std::to_string(int(gradient)) + ", width " +
                           std::to_string(width);
  expect(most < 1, "rule " + name + ": off by " + std::to_string(most));
  expect(kept, "rule " + name + ": rows that take no part");
}

void check_rounding(const Kernels& kernels, Type type) {
  constexpr int kKeys = 100;
  const int64_t width = 700;
  std::vector<double> sum(kCount * width);
  for (int key = 0; key < kKeys; ++key) {
    Tables t(Step::kPlain, type, type, Type::kFloat32, width), other = t;
    other.problem.weight = other.weight.table();
    other.problem.rows = other.rows.data();
    other.problem.grad.data = other.grad.bytes.data();
    for (Tables* which : {&t, &other}) {
      which->problem.stochastic = true;
      which->problem.key = static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15;
    }
    run(kernels, Step::kPlain, t.problem, nullptr, {1, on_threads});
    run(kernels, Step::kPlain, other.problem, nullptr, {3, on_threads});
    expect(t.weight.bytes == other.weight.bytes, "stochastic rounding on threads");
    for (int64_t i = 0; i < kCount * width; ++i) {
      sum[i] += t.weight.get(t.rows[i / width], i % width);
    }
  }
  Tables t(Step::kPlain, type, type, Type::kFloat32, width);
  double total = 0;
  for (int64_t i = 0; i < kCount * width; ++i) {
    const int64_t k = i / width, c = i % width;
    double w = t.weight.get(t.rows[k], c), unused = 0;
    expected(Step::kPlain, t.grad.get(k, c), nullptr, w, unused, unused);
    const double off = (sum[i] / kKeys - w) / (t.weight.unit() * std::abs(w) + 1e-6);
    total += off;
    expect(std::abs(off) < 6 * 0.5 / std::sqrt(kKeys), "stochastic rounding on average");
  }
  expect(std::abs(total) < 5 * 0.5 * std::sqrt(kCount * width / double(kKeys)),
         "stochastic rounding of all on average");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && !force_kernels(argv[1])) return 77;
  const Kernels& kernels = best_kernels();
  using enum Type;
  const Type types[][3] = {{kFloat32, kFloat32, kFloat32},  {kFloat64, kFloat64, kFloat64},
                           {kBFloat16, kFloat32, kFloat32}, {kBFloat16, kBFloat16, kBFloat16},
                           {kFloat16, kBFloat16, kFloat16}, {kFloat32, kBFloat16, kBFloat16},
                           {kFloat32, kFloat32, kBFloat16}};
  for (const auto& [type, state, gradient] : types) {
    for (int64_t width : {1, 7, 512, 1100}) {
      for (Step step : {Step::kPlain, Step::kSgd, Step::kNesterov, Step::kAdamw, Step::kAdagrad,
                        Step::kCatchUp, Step::kCatchUpAlone}) {
        check(kernels, step, type, state, gradient, width, width == 1100 ? 3 : 1);
      }
    }
  }
  check_rounding(kernels, kBFloat16);
  check_rounding(kernels, kFloat16);
  std::printf("%s: %s\n", kernels.capability, failures ? "FAILED" : "passed");
  return failures != 0;
}
