// Triplets of one instruction set against every triplet in turn: kinds, ties, many positives, NaN.
//
// usage: triplets_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <cstdlib>
#include <memory>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

template <class T>
void check(const Kernels& kernels, int64_t rows, int64_t columns, int classes, Triplet kind,
           bool nan) {
  const auto noise = random(rows * columns, 1, 1);
  std::vector<T> score(noise.begin(), noise.end()), slope(rows * columns, T(NAN)), grad(rows);
  // equal scores, and gaps that equal the margin
  for (T& s : score) s = std::round(s * 8) / 8;
  // in every second row, of which some have no positive
  for (int64_t i = 0; nan && columns > 3 && i < rows; i += 2) score[i * columns + 3] = NAN;
  const auto positive = std::make_unique<bool[]>(rows * columns);
  const auto negative = std::make_unique<bool[]>(rows * columns);
  for (int64_t i = 0; i < rows; ++i) {
    grad[i] = T(1 + i % 3);
    for (int64_t j = 0; j < columns; ++j) {
      const bool out = j % 11 == 5, same = (i * 7 + j) % classes == 0;
      positive[i * columns + j] = same && !out;
      negative[i * columns + j] = !same && !out;
    }
  }
  const TripletProblem p = {score.data(), positive.get(), negative.get(), rows,
                            columns,      0.25,           kind,           sizeof(T) == 8};
  std::vector<double> statistics(2 * rows, NAN), want(2 * rows), want_slope(rows * columns);
  for (int threads : {1, 3}) {
    void* buffer = std::aligned_alloc(64, (kernels.triplets.bytes(p, threads) + 127) / 64 * 64);
    kernels.triplets.forward(p, statistics.data(), buffer, {threads, on_threads});
    kernels.triplets.backward(p, grad.data(), slope.data(), buffer, {threads, on_threads});
    std::free(buffer);
    int64_t wrong = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const T* s = score.data() + i * columns;
      const bool *pos = positive.get() + i * columns, *neg = negative.get() + i * columns;
      std::vector<double> count(columns);
      double total = 0, number = 0;
      int64_t positives = 0, negatives = 0, broken = 0;
      for (int64_t a = 0; a < columns; ++a) {
        positives += pos[a], negatives += neg[a], broken += (pos[a] || neg[a]) && s[a] != s[a];
        for (int64_t n = 0; pos[a] && n < columns; ++n) {
          if (!neg[n]) continue;
          const double loss = double(s[a]) + 0.25 - s[n];
          const bool in = kind == Triplet::kAll    ? true
                          : kind == Triplet::kHard ? s[n] <= s[a]
                                                   : s[n] > s[a];
          if (!in || !(loss > 0)) continue;
          total += loss, number += 1, count[a] += 1, count[n] -= 1;
        }
      }
      const bool dead = broken && positives && negatives;
      const double got = statistics[2 * i];
      wrong += dead ? got == got : !(std::abs(got - total) <= 1e-5 * (1 + total));
      wrong += !dead && statistics[2 * i + 1] != number;
      for (int64_t j = 0; j < columns; ++j) {
        const T g = slope[i * columns + j];
        if (dead) {
          wrong += pos[j] || neg[j] ? g == g : g != 0;
        } else {
          wrong += g != T(count[j] * grad[i]);
        }
      }
    }
    expect(wrong == 0, std::string(kernels.capability) + " " + std::to_string(rows) + " x " +
                           std::to_string(columns) + " classes " + std::to_string(classes) +
                           " kind " + std::to_string(int(kind)) + ": " + std::to_string(wrong));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  for (Triplet kind : {Triplet::kAll, Triplet::kHard, Triplet::kSemihard}) {
    for (int classes : {1, 2, 40, 200}) {
      for (bool nan : {false, true}) {
        check<float>(kernels, 9, 130, classes, kind, nan);
        check<float>(kernels, 3, 128, classes, kind, nan);
        check<double>(kernels, 20, 65, classes, kind, nan);
        check<double>(kernels, 2, 5, classes, kind, nan);
        check<float>(kernels, 1, 1, classes, kind, nan);
        check<float>(kernels, 3, 0, classes, kind, nan);
        check<float>(kernels, 0, 7, classes, kind, nan);
      }
    }
  }
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
