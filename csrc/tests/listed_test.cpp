// Listed pairs of one instruction set against sums in double: repeats, empty lists, own rows, rows
// that are not finite, 16-bit rows, threads.
//
// usage: listed_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

struct Shape {
  int64_t n, m, d, pairs;
  bool own, apart;
};

template <class T>
struct Case {
  Shape at;
  int64_t stride;
  std::vector<T> x, y;
  std::vector<int64_t> rows, columns;

  explicit Case(const Shape& shape) : at(shape), stride(shape.d + 3) {
    const auto fill = [&](std::vector<T>& to, int64_t count, unsigned seed) {
      const auto values = random(count * stride, 1, seed);
      to.assign(values.begin(), values.end());
    };
    fill(x, at.n, 1);
    fill(y, at.own ? 0 : at.m, 2);
    std::mt19937 engine(3);
    for (int64_t k = 0; k < at.pairs; ++k) {
      rows.push_back(engine() % at.n);
      // every third line names the first column
      columns.push_back(k % 3 ? engine() % at.m : 0);
    }
  }

  const std::vector<T>& others() const { return at.own ? x : y; }

  ListedProblem problem() const {
    const Type type = sizeof(T) == 8 ? Type::kFloat64 : Type::kFloat32;
    return {{x.data(), type, stride},
            {others().data(), type, stride},
            rows.data(),
            columns.data(),
            at.n,
            at.m,
            at.d,
            at.pairs,
            at.own,
            at.apart};
  }
};

void* room(size_t bytes) { return std::aligned_alloc(64, (bytes + 127) / 64 * 64); }

template <class T>
std::vector<T> scores_of(const Kernels& kernels, const ListedProblem& p, int threads) {
  std::vector<T> score(p.pairs, T(NAN));
  void* buffer = room(kernels.listed.bytes(p, threads, false));
  kernels.listed.forward(p, score.data(), buffer, {threads, on_threads});
  std::free(buffer);
  return score;
}

template <class T>
void check(const Kernels& kernels, const Shape& shape) {
  const Case<T> c(shape);
  const ListedProblem p = c.problem();
  const auto& y = c.others();
  const auto noise = random(shape.pairs, 1, 4);
  const std::vector<T> grad(noise.begin(), noise.end());
  std::vector<double> score(shape.pairs), dx(shape.n * shape.d), dy(shape.m * shape.d);
  for (int64_t k = 0; k < shape.pairs; ++k) {
    const int64_t i = c.rows[k], j = c.columns[k];
    for (int64_t e = 0; e < shape.d; ++e) {
      const double a = c.x[i * c.stride + e], b = y[j * c.stride + e], g = grad[k];
      score[k] += shape.apart ? (a - b) * (a - b) : a * b;
      dx[i * shape.d + e] += shape.apart ? 2 * g * (a - b) : g * b;
      double& other = (shape.own ? dx : dy)[j * shape.d + e];
      other += shape.apart ? 2 * g * (b - a) : g * a;
    }
  }
  const double bound = sizeof(T) == 8 ? 1e-14 : 1e-6;
  std::vector<T> first_x, first_y;
  for (int threads : {1, 3}) {
    const std::string name = std::string(kernels.capability) + " " + std::to_string(shape.n) +
                             " x " + std::to_string(shape.m) + " d " + std::to_string(shape.d) +
                             (shape.own ? " own" : "") + (shape.apart ? " apart" : "");
    expect(worst(scores_of<T>(kernels, p, threads), score) < bound, name + " score");
    std::vector<T> got_x(dx.size(), T(NAN)), got_y(shape.own ? 0 : dy.size(), T(NAN));
    void* buffer = room(kernels.listed.bytes(p, threads, true));
    kernels.listed.backward(p, grad.data(), got_x.data(), shape.own ? nullptr : got_y.data(),
                            buffer, {threads, on_threads});
    std::free(buffer);
    expect(worst(got_x, dx) < bound, name + " dx");
    if (!shape.own) expect(worst(got_y, dy) < bound, name + " dy");
    if (threads == 1) first_x = got_x, first_y = got_y;
    const auto same = [](const std::vector<T>& a, const std::vector<T>& b) {
      return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
    };
    expect(same(got_x, first_x) && same(got_y, first_y), name + " bits");
    if (shape.own) continue;
    std::vector<T> alone(dy.size(), T(NAN));
    buffer = room(kernels.listed.bytes(p, threads, true));
    kernels.listed.backward(p, grad.data(), nullptr, alone.data(), buffer, {threads, on_threads});
    std::free(buffer);
    expect(same(alone, first_y), name + " dy alone");
  }
}

// A row with inf or NaN has no scores; finite rows whose sum overflows have inf.
void check_not_finite(const Kernels& kernels) {
  for (bool apart : {false, true}) {
    Case<float> c({6, 5, 19, 40, false, apart});
    c.x[1 * c.stride + 18] = INFINITY;
    c.x[2 * c.stride] = NAN;
    c.y[3 * c.stride + 17] = -INFINITY;
    for (int64_t e = 0; e < 19; ++e) c.x[4 * c.stride + e] = c.y[4 * c.stride + e] = 3e38f;
    for (int64_t e = 0; apart && e < 19; ++e) c.y[4 * c.stride + e] = -3e38f;
    c.rows[0] = c.columns[0] = 4;
    const auto got = scores_of<float>(kernels, c.problem(), 1);
    int64_t wrong = got[0] != INFINITY;
    for (int64_t k = 1; k < 40; ++k) {
      const bool dead = c.rows[k] == 1 || c.rows[k] == 2 || c.columns[k] == 3;
      wrong += (got[k] != got[k]) != dead;
    }
    expect(wrong == 0, std::string(kernels.capability) + " not finite");
  }
}

// Rows of bfloat16, whose gradient is rounded to them.
void check_narrow(const Kernels& kernels) {
  const int64_t n = 5, d = 21, pairs = 9;
  Case<float> c({n, n, d, pairs, true, true});
  std::vector<uint16_t> narrow(c.x.size());
  for (size_t i = 0; i < c.x.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &c.x[i], 4);
    bits &= 0xffff0000;
    narrow[i] = static_cast<uint16_t>(bits >> 16);
    std::memcpy(&c.x[i], &bits, 4);
  }
  ListedProblem p = c.problem();
  const auto want = scores_of<float>(kernels, p, 1);
  p.x = p.y = {narrow.data(), Type::kBFloat16, c.stride};
  expect(scores_of<float>(kernels, p, 1) == want, std::string(kernels.capability) + " narrow");
  const std::vector<float> grad(pairs, 1.0f);
  std::vector<uint16_t> dx(n * d, 0x7fff);
  void* buffer = room(kernels.listed.bytes(p, 2, true));
  kernels.listed.backward(p, grad.data(), dx.data(), nullptr, buffer, {2, on_threads});
  std::free(buffer);
  std::vector<double> wide(n * d), sums(n * d);
  for (int64_t k = 0; k < pairs; ++k) {
    for (int64_t e = 0; e < d; ++e) {
      const double gap =
          2.0 * (double(c.x[c.rows[k] * c.stride + e]) - c.x[c.columns[k] * c.stride + e]);
      sums[c.rows[k] * d + e] += gap;
      sums[c.columns[k] * d + e] -= gap;
    }
  }
  for (int64_t i = 0; i < n * d; ++i) {
    const uint32_t bits = uint32_t(dx[i]) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    wide[i] = value;
  }
  expect(worst(wide, sums) < 4e-3, std::string(kernels.capability) + " narrow gradient");
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  for (bool apart : {false, true}) {
    for (bool own : {false, true}) {
      check<float>(kernels, {9, 9, 128, 40, own, apart});
      check<float>(kernels, {300, 300, 67, 2000, own, apart});
      check<double>(kernels, {7, 7, 33, 100, own, apart});
      check<float>(kernels, {3, 3, 5, 1, own, apart});
      check<float>(kernels, {1, 1, 1, 3, own, apart});
      check<double>(kernels, {4, 4, 6, 0, own, apart});
    }
    check<float>(kernels, {200, 11, 130, 700, false, apart});
    check<double>(kernels, {2, 150, 9, 500, false, apart});
  }
  check_not_finite(kernels);
  check_narrow(kernels);
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
