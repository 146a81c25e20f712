// The k best columns of one instruction set against sorted scores in double: every affinity, banks
// of every type, labels, exclusions, ties, NaN; the same answer on any number of threads.
//
// usage: topk_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include <algorithm>
#include <cstdlib>
#include <limits>

#include "check.h"
#include "kernels.h"

using namespace fused_losses;

namespace {

struct Case {
  std::string name;
  int64_t n = 70, m = 300, d = 37, k = 5;
  Affinity affinity = Affinity::kDot;
  bool largest = true;
  Match match = Match::kAny;
  bool symmetric = false, bf16 = false, doubles = false, ids = false, excluded = false;
  Type bank = Type::kFloat32;
  bool codes = false;  // an int8 copy of the bank screens
  float shift = 0;     // of every entry
  int64_t copies = 0;  // rows of the bank that equal its first
  size_t bytes = 1 << 24;
  int32_t classes = 9;
  bool heads = false;  // the rows' own coordinates screen
};

int16_t narrow(float v, Type type) {
  int16_t bits;
  if (type == Type::kFloat16) {
    const _Float16 half = static_cast<_Float16>(v);
    __builtin_memcpy(&bits, &half, 2);
  } else {
    uint32_t wide;
    __builtin_memcpy(&wide, &v, 4);
    bits = static_cast<int16_t>(wide >> 16);
  }
  return bits;
}

float widen(int16_t bits, Type type) {
  if (type == Type::kFloat16) {
    _Float16 half;
    __builtin_memcpy(&half, &bits, 2);
    return static_cast<float>(half);
  }
  const uint32_t wide = static_cast<uint32_t>(static_cast<uint16_t>(bits)) << 16;
  float v;
  __builtin_memcpy(&v, &wide, 4);
  return v;
}

// The rows' own coordinates, a seventh of them read of every pair.
struct Coordinates {
  int64_t width, levels, d;
  std::vector<float> first, rest, tails;
  std::vector<double> queries;

  Coordinates(const Case& c, const std::vector<double>& x, const std::vector<double>& y)
      : width(std::max<int64_t>(1, c.d / 7)),
        levels((c.d - width + Heads::kStep - 1) / Heads::kStep),
        d(c.d),
        first(c.m * width),
        rest(c.m * levels * Heads::kStep),
        tails(c.m * (levels + 2)),
        queries(x.begin(), x.begin() + c.n * d) {
    for (int64_t j = 0; j < c.m; ++j) {
      const double* row = y.data() + j * d;
      for (int64_t e = 0; e < d; ++e) {
        float& to = e < width ? first[j * width + e] : rest[j * levels * Heads::kStep + e - width];
        to = static_cast<float>(row[e]);
      }
      for (int64_t level = -1; level <= levels; ++level) {
        double left = 0;
        const int64_t from = level < 0 ? 0 : width + level * Heads::kStep;
        for (int64_t e = from; e < d; ++e) left += row[e] * row[e];
        tails[(level + 1) * c.m + j] =
            static_cast<float>(std::sqrt(left) * (level < 0 ? 1 : 1 + 1e-6));
      }
    }
  }

  Heads heads() const {
    return {first.data(), rest.data(), tails.data(), queries.data(), width, levels, d, 0};
  }
};

void check(const Kernels& kernels, Case c) {
  if (c.bf16 && !kernels.bf16) return;
  if (c.symmetric) c.m = c.n;
  auto x = random(c.n * c.d, 1, 1), y = random(c.m * c.d, 1, 2);
  for (float& v : x) v += c.shift;
  for (float& v : y) v += c.shift;
  for (int64_t j = 1; j <= c.copies; ++j) {
    std::copy(y.begin(), y.begin() + c.d, y.begin() + (j * 7 % c.m) * c.d);
  }
  if (c.symmetric) x = y;
  if (c.n > 6) x[3 * c.d] = NAN;
  if (c.m > 8 && !c.symmetric) y[4 * c.d + c.d - 1] = NAN;
  if (c.symmetric) y = x;
  // the bank as it is stored, and what it says
  std::vector<double> xd(x.begin(), x.end()), bank(y.begin(), y.end());
  std::vector<int16_t> halves(c.m * c.d);
  std::vector<int8_t> bytes(c.m * c.d);
  std::vector<float> scale(c.m), error(c.m);
  for (int64_t j = 0; j < c.m; ++j) {
    float most = 0;
    for (int64_t e = 0; e < c.d; ++e) most = std::max(most, std::abs(y[j * c.d + e]));
    scale[j] = most / 127;
    double off = 0;
    for (int64_t e = 0; e < c.d; ++e) {
      const float v = y[j * c.d + e];
      halves[j * c.d + e] = narrow(v, c.bank);
      bytes[j * c.d + e] = v != v || most == 0 ? 0 : static_cast<int8_t>(std::lrint(v / scale[j]));
      const double apart = double(v) - double(scale[j]) * bytes[j * c.d + e];
      off += apart * apart;
      double& b = bank[j * c.d + e];
      if (c.bank == Type::kInt8) b = double(scale[j]) * bytes[j * c.d + e];
      if (c.bank == Type::kBFloat16 || c.bank == Type::kFloat16) {
        b = widen(halves[j * c.d + e], c.bank);
      }
    }
    error[j] = static_cast<float>(std::sqrt(off) * (1 + 1e-6));
  }
  std::vector<int32_t> x_labels(c.n), y_labels(c.m), x_ids(c.n), y_ids(c.m), exclude(c.n * 2, -1);
  for (int64_t i = 0; i < c.n; ++i) x_labels[i] = int32_t(i * 5 % c.classes), x_ids[i] = int32_t(i);
  for (int64_t j = 0; j < c.m; ++j) {
    y_labels[j] = c.symmetric ? x_labels[j] : int32_t(j * 3 % c.classes);
    y_ids[j] = int32_t(j / 2);
  }
  for (int64_t i = 0; i < c.n; ++i) exclude[2 * i] = int32_t(i * 11 % std::max<int64_t>(c.m, 1));

  TopkProblem p = {};
  p.x = {c.doubles ? static_cast<void*>(xd.data()) : x.data(),
         c.doubles ? Type::kFloat64 : Type::kFloat32, c.d};
  const void* stored = c.bank == Type::kFloat32   ? static_cast<const void*>(y.data())
                       : c.bank == Type::kFloat64 ? static_cast<const void*>(bank.data())
                       : c.bank == Type::kInt8    ? static_cast<const void*>(bytes.data())
                                                  : halves.data();
  p.y = c.symmetric ? p.x : Matrix{stored, c.bank, c.d};
  if (c.bank == Type::kInt8) p.y_scale = scale.data();
  if (c.codes) p.codes = {{bytes.data(), Type::kInt8, c.d}, scale.data(), error.data()};
  const Coordinates of(c.heads ? c : Case{.n = 0, .m = 0}, xd, bank);
  if (c.heads) p.heads = of.heads();
  p.n = c.n, p.m = c.m, p.d = c.d, p.k = c.k;
  p.affinity = c.affinity, p.largest = c.largest;
  p.x_labels = x_labels.data(), p.y_labels = y_labels.data();
  p.match = c.match;
  if (c.ids) p.x_ids = x_ids.data(), p.y_ids = y_ids.data();
  if (c.excluded) p.exclude = exclude.data(), p.excluded = 2;
  p.skip_self = p.symmetric = c.symmetric;
  p.bf16 = c.bf16;
  p.most_bytes = c.bytes;

  std::vector<double> keys(c.n * c.k);
  std::vector<int64_t> index(c.n * c.k);
  for (int threads : {1, 2, 3}) {
    std::fill(index.begin(), index.end(), -7);
    const size_t size = (kernels.topk.bytes(p, threads) + 127) / 64 * 64;
    void* buffer = std::aligned_alloc(64, size);
    kernels.topk.run(p, {keys.data(), index.data()}, buffer, {threads, on_threads});
    std::free(buffer);
    int64_t wrong = 0;
    for (int64_t i = 0; i < c.n; ++i) {
      std::vector<std::pair<double, int64_t>> all;
      for (int64_t j = 0; j < c.m; ++j) {
        if (c.symmetric && i == j) continue;
        if (c.match != Match::kAny && (x_labels[i] == y_labels[j]) != (c.match == Match::kSame)) {
          continue;
        }
        if (c.ids && x_ids[i] == y_ids[j]) continue;
        if (c.excluded && exclude[2 * i] == j) continue;
        double product = 0, apart = 0, xx = 0, yy = 0;
        for (int64_t e = 0; e < c.d; ++e) {
          const double a = xd[i * c.d + e], b = bank[j * c.d + e];
          product += a * b, apart += (a - b) * (a - b), xx += a * a, yy += b * b;
        }
        const double key = c.affinity == Affinity::kDot      ? product
                           : c.affinity == Affinity::kCosine ? product / std::sqrt(xx * yy)
                                                             : apart;
        if (key == key) all.push_back({c.largest ? -key : key, j});
      }
      // sums in another order: what differs by rounding alone is a tie
      std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) {
        return a.first < b.first - 1e-12 * std::abs(b.first);
      });
      for (int64_t a = 0; a < c.k; ++a) {
        const bool real = a < int64_t(all.size());
        const double want = real ? (c.largest ? -all[a].first : all[a].first) : NAN;
        const double got = keys[i * c.k + a];
        const bool near = real ? std::abs(got - want) <= 1e-9 * (1 + std::abs(want)) : got != got;
        wrong += !near || index[i * c.k + a] != (real ? all[a].second : -1);
      }
    }
    expect(wrong == 0, std::string(kernels.capability) + " " + c.name + ", " +
                           std::to_string(threads) + " threads: " + std::to_string(wrong) +
                           " wrong");
  }
}

void check_all(const Kernels& kernels) {
  for (Affinity affinity : {Affinity::kDot, Affinity::kCosine, Affinity::kSquaredDistance}) {
    for (bool largest : {false, true}) {
      for (bool bf16 : {false, true}) {
        const auto run = [&](Case c) {
          c.affinity = affinity, c.largest = largest, c.bf16 = bf16;
          c.name += " affinity " + std::to_string(int(affinity)) + (largest ? " largest" : "") +
                    (bf16 ? " bf16" : "");
          check(kernels, c);
        };
        run({"plain"});
        run({"one column", 5, 1, 3, 4});
        run({"one row", 1, 500, 16, 1});
        run({"no rows", 0, 10, 4, 2});
        run({"empty bank", 4, 0, 4, 2});
        run({.name = "wide", .n = 9, .m = 130, .d = 1000, .k = 3});
        run({.name = "all of them", .n = 20, .m = 90, .k = 120});
        run({.name = "many, few at a time", .n = 200, .m = 900, .k = 40, .bytes = 1});
        run({.name = "far from the origin", .shift = 100});
        run({.name = "copies", .m = 700, .k = 9, .copies = 400});
        for (Match match : {Match::kSame, Match::kDifferent}) {
          run({.name = "labels", .match = match});
          run({.name = "itself, labels", .n = 400, .k = 1, .match = match, .symmetric = true});
        }
        run({.name = "itself", .n = 333, .k = 4, .symmetric = true, .copies = 30});
        run({.name = "itself in double", .n = 99, .k = 1, .symmetric = true, .doubles = true});
        run({.name = "itself, no room", .n = 150, .k = 2, .symmetric = true, .bytes = 1});
        run({.name = "two classes",
             .n = 260,
             .k = 1,
             .match = Match::kDifferent,
             .symmetric = true,
             .classes = 2});
        run({.name = "one class",
             .n = 90,
             .k = 1,
             .match = Match::kDifferent,
             .symmetric = true,
             .classes = 1});
        run({.name = "ids, exclusions", .ids = true, .excluded = true});
        run({.name = "doubles", .doubles = true, .bank = Type::kFloat64});
        run({.name = "bfloat16", .bank = Type::kBFloat16});
        run({.name = "half", .bank = Type::kFloat16, .shift = 3});
        run({.name = "int8", .bank = Type::kInt8});
        run({.name = "codes", .m = 800, .k = 12, .codes = true});
        // their products are in float
        if (bf16) continue;
        run({.name = "heads", .m = 800, .k = 12, .heads = true});
        run({.name = "heads, wide", .n = 90, .m = 900, .d = 260, .copies = 90, .heads = true});
        run({.name = "heads, one column", .n = 5, .m = 1, .d = 1, .heads = true});
        run({.name = "heads, all of them", .m = 90, .k = 120, .heads = true});
        run({.name = "heads, few at a time", .n = 200, .m = 900, .bytes = 1, .heads = true});
        run({.name = "heads, far from the origin", .shift = 100, .heads = true});
        run({.name = "heads, doubles", .doubles = true, .bank = Type::kFloat64, .heads = true});
        run({.name = "heads, bfloat16", .bank = Type::kBFloat16, .heads = true});
        run({.name = "heads, ids", .ids = true, .excluded = true, .heads = true});
        run({.name = "heads, itself", .n = 333, .symmetric = true, .copies = 30, .heads = true});
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  check_all(best_kernels());
  std::printf("%s: %d failures\n", best_kernels().capability, failures);
  return failures != 0;
}
