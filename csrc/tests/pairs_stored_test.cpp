// The sweep over pairs of one instruction set on columns that lie in 16 bits.
//
// usage: pairs_stored_test [default|avx2|...|amx_bf16]; exit code 77 where it cannot run.
#include "pairs_case.h"

namespace {

// Columns that lie in 16 bits give the bits that their values give; their gradient is rounded once.
template <class Narrow, class Wide>
void check_stored(const Kernels& kernels, const Shape& s, Stored stored, Narrow&& narrow,
                  Wide&& wide) {
  Case c(s);
  std::vector<uint16_t> bits;
  for (float& v : c.y) {
    bits.push_back(narrow(v));
    v = wide(bits.back());
  }
  const std::vector<double> g[2] = {gradients(s, 0), gradients(s, 1)};
  const Results want = run(kernels, c, g[0], g[1], 3);
  c.p.columns.data = bits.data();
  c.p.stored = stored;
  const Results got = run(kernels, c, g[0], g[1], 3);
  // gradients in 16 bits, which take the first half of their room
  const auto is_rounded = [&](const std::vector<float>& bits_of, const std::vector<float>& exact) {
    std::vector<uint16_t> got_bits(exact.size()), rounded;
    std::memcpy(got_bits.data(), bits_of.data(), got_bits.size() * sizeof(uint16_t));
    for (const float v : exact) rounded.push_back(narrow(v));
    return got_bits == rounded;
  };
  expect(same_bits(got.rows, want.rows) && same_bits(got.columns, want.columns) &&
             same_bits(got.dx, want.dx) && same_bits(got.dscale, want.dscale),
         std::string(kernels.capability) + ": 16-bit columns are not read as their values");
  expect(is_rounded(got.dy, want.dy), std::string(kernels.capability) + ": dy of 16-bit columns");

  const int64_t width = 21;
  const auto g_out = random(s.n * width, 1, 6), g_lse = random(s.n, 1, 7);
  auto values = random(s.m * width, 1, 5);
  std::vector<uint16_t> value_bits;
  for (float& v : values) {
    value_bits.push_back(narrow(v));
    v = wide(value_bits.back());
  }
  const auto attended = [&](const void* y, const void* v, Stored how) {
    c.p.columns.data = y;
    c.p.stored = how;
    return attend(kernels, c, v, width, s.classes > 0, g_out, g_lse, 3);
  };
  const Attended exact = attended(c.y.data(), values.data(), Stored::kWide);
  const Attended read = attended(bits.data(), value_bits.data(), stored);
  expect(same_bits(read.out, exact.out) && same_bits(read.lse, exact.lse) &&
             same_bits(read.dx, exact.dx) && same_bits(read.dscale, exact.dscale),
         std::string(kernels.capability) + ": 16-bit values are not read as such");
  expect(is_rounded(read.dy, exact.dy) && is_rounded(read.dv, exact.dv),
         std::string(kernels.capability) + ": gradients of attention in 16 bits");
}

uint16_t to_half(float v) {
  const _Float16 half = static_cast<_Float16>(v);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

float from_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof bits);
  return half;
}

uint16_t to_bfloat16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bfloat16(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr)) return 77;
  const Kernels& kernels = best_kernels();
  std::vector<Precision> precisions = {Precision::kFull};
  if (kernels.bf16) {
    precisions.push_back(Precision::kMixed);
    precisions.push_back(Precision::kBFloat16);
  }
  constexpr auto kLse = Reduction::kLse;
  constexpr auto kLinear = Score::kLinear;
  for (const Precision q : precisions) {
    for (const Shape& s :
         {Shape{1, 1, 1, 0, false, false, false, false, kLinear, kLse, q, kInfinity},
          Shape{37, 53, 24, 3, false, true, false, false, kLinear, kLse, q, kInfinity},
          Shape{61, 2301, 33, 4, false, true, true, true, kLinear, kLse, q, kInfinity}}) {
      check_stored(kernels, s, Stored::kBFloat16, to_bfloat16, from_bfloat16);
      check_stored(kernels, s, Stored::kHalf, to_half, from_half);
    }
  }
  std::printf("%s: %d failures\n", kernels.capability, failures);
  return failures ? 1 : 0;
}
