// MaxSim of one instruction set against the formula in double: ragged texts, empty documents, ties.
//
// usage: maxsim_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <bit>
#include <cstdlib>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

std::vector<int64_t> offsets(int64_t count, int64_t length, unsigned seed) {
  std::mt19937 engine(seed);
  std::vector<int64_t> out = {0};
  for (int64_t i = 0; i < count; ++i) {
    out.push_back(out.back() + (i % 5 == 3 ? 0 : 1 + int64_t(engine() % length)));
  }
  return out;
}

void forward(const Kernels& kernels, const MaxSimProblem& p, float* scores, int32_t* index) {
  void* buffer = std::aligned_alloc(64, (kernels.maxsim.forward_bytes(p, 3) + 127) / 64 * 64);
  kernels.maxsim.forward(p, scores, index, buffer, {3, on_threads});
  std::free(buffer);
}

void check(const Kernels& kernels, const std::vector<int64_t>& query_offsets,
           const std::vector<int64_t>& document_offsets, int64_t d, Precision precision,
           Stored stored = Stored::kWide) {
  const int64_t queries = std::ssize(query_offsets) - 1, tokens = query_offsets.back();
  const int64_t documents = std::ssize(document_offsets) - 1, total = document_offsets.back();
  const auto q = random(tokens * d, 1, 3);
  auto t = random(total * d, 1, 4);
  // two equal tokens: the first one wins
  if (document_offsets[1] > 1) std::copy(t.begin(), t.begin() + d, t.begin() + d);
  std::vector<uint16_t> narrow;
  for (float& v : t) {
    if (stored == Stored::kWide) break;
    const auto bits = std::bit_cast<uint32_t>(v) & 0xffff0000;
    narrow.push_back(bits >> 16);
    v = std::bit_cast<float>(bits);
  }
  const auto grad = random(queries * documents, 1, 5);
  const void* lies = narrow.empty() ? static_cast<const void*>(t.data()) : narrow.data();
  const MaxSimProblem p = {
      q.data(),  lies,  query_offsets.data(), document_offsets.data(), queries, documents, d, false,
      precision, stored};
  std::vector<float> scores(queries * documents, NAN), dq(tokens * d, NAN), dt(total * d, NAN);
  std::vector<int32_t> index(tokens * documents, -7);
  forward(kernels, p, scores.data(), index.data());
  const Parallel parallel = {3, on_threads};
  kernels.maxsim.backward(p, grad.data(), index.data(), dq.data(), dt.data(), parallel);

  std::vector<double> want(queries * documents), want_dq(tokens * d), want_dt(total * d);
  int64_t wrong = 0;
  for (int64_t a = 0; a < queries; ++a) {
    for (int64_t i = query_offsets[a]; i < query_offsets[a + 1]; ++i) {
      for (int64_t b = 0; b < documents; ++b) {
        double best = -INFINITY;
        int64_t at = -1;
        for (int64_t j = document_offsets[b]; j < document_offsets[b + 1]; ++j) {
          double product = 0;
          for (int64_t e = 0; e < d; ++e) product += double(q[i * d + e]) * t[j * d + e];
          if (product > best) best = product, at = j - document_offsets[b];
        }
        wrong += index[i * documents + b] != at;
        // rounded products may choose another of two near ones: follow the kernel's choice
        at = index[i * documents + b];
        if (at < 0) continue;
        want[a * documents + b] += best;
        const int64_t j = document_offsets[b] + at;
        for (int64_t e = 0; e < d; ++e) {
          want_dq[i * d + e] += double(grad[a * documents + b]) * t[j * d + e];
          want_dt[j * d + e] += double(grad[a * documents + b]) * q[i * d + e];
        }
      }
    }
  }
  const bool exact = precision == Precision::kFull;
  const std::string at = std::string(kernels.capability) + " " + std::to_string(queries) + " x " +
                         std::to_string(documents) + " d=" + std::to_string(d);
  expect(!exact || wrong == 0, at + ": index");
  expect(worst(scores, want) < (exact ? 2e-6 : 1e-2), at + ": scores");
  expect(worst(dq, want_dq) < 2e-6, at + ": dqueries");
  expect(worst(dt, want_dt) < 2e-6, at + ": ddocuments");
}

void check(const Kernels& kernels, int64_t queries, int64_t documents, int64_t length, int64_t d,
           Precision precision) {
  check(kernels, offsets(queries, length, 1), offsets(documents, length, 2), d, precision);
}

// A NaN spoils its own document's or query's scores, but none of an empty document, and every
// index is of a token that is there.
void check_nan(const Kernels& kernels) {
  constexpr int64_t kWidth = 5, kQueries = 3, kDocuments = 4;
  const std::vector<int64_t> query_offsets = {0, 2, 4, 9};
  const std::vector<int64_t> document_offsets = {0, 13, 13, 24, 31};
  for (int64_t at : {int64_t(12), int64_t(3), int64_t(-1)}) {
    auto q = random(9 * kWidth, 1, 6), t = random(31 * kWidth, 1, 7);
    (at < 0 ? q[2 * kWidth] : t[at * kWidth + 4]) = NAN;
    const MaxSimProblem p = {q.data(),
                             t.data(),
                             query_offsets.data(),
                             document_offsets.data(),
                             kQueries,
                             kDocuments,
                             kWidth,
                             false,
                             Precision::kFull,
                             Stored::kWide};
    std::vector<float> scores(kQueries * kDocuments, -7);
    std::vector<int32_t> index(9 * kDocuments, -7);
    forward(kernels, p, scores.data(), index.data());
    for (int64_t a = 0; a < kQueries; ++a) {
      for (int64_t b = 0; b < kDocuments; ++b) {
        const bool spoilt = b != 1 && (at < 0 ? a == 1 : b == 0);
        const float score = scores[a * kDocuments + b];
        expect(std::isnan(score) == spoilt && (b != 1 || score == 0), "NaN: scores");
      }
    }
    for (int64_t i = 0; i < 9; ++i) {
      for (int64_t b = 0; b < kDocuments; ++b) {
        const int64_t length = document_offsets[b + 1] - document_offsets[b];
        const int64_t found = index[i * kDocuments + b];
        expect(found < length && (found >= 0) == (length > 0), "NaN: index");
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  check(kernels, 1, 1, 1, 1, Precision::kFull);
  check(kernels, 9, 23, 70, 33, Precision::kFull);
  check(kernels, 3, 40, 400, 128, Precision::kFull);
  check(kernels, 70, 6, 5, 515, Precision::kFull);
  // blocks of a query's tokens that are full
  check(kernels, {0, 300}, {0, 30, 31}, 515, Precision::kFull);
  // runs of documents that are not alike, the last of them empty
  check(kernels, {0, 3}, offsets(2499, 4, 2), 3, Precision::kFull);
  // documents of several chunks in 16 bits, and rows that are read in parts
  check(kernels, {0, 9, 20}, {0, 70, 77, 160}, 150, Precision::kFull, Stored::kBFloat16);
  check_nan(kernels);
  // a panel of every width
  for (int64_t length : {2, 12, 24, 40, 55}) check(kernels, 1, 40, length, 96, Precision::kFull);
  if (kernels.bf16) {
    check(kernels, 9, 23, 70, 33, Precision::kBFloat16);
    for (int64_t length : {2, 24, 40, 55}) check(kernels, 1, 40, length, 96, Precision::kBFloat16);
  }
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
