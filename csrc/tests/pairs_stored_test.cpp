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
  std::vector<double> g[2];
  for (int side = 0; side < 2; ++side) {
    const auto values = random(2 * kClasses * (side ? s.m : s.n), 1, 11 + side);
    g[side].assign(values.begin(), values.end());
  }
  const Results want = run(kernels, c, g[0], g[1], 3);
  c.p.columns.data = bits.data();
  c.p.stored = stored;
  const Results got = run(kernels, c, g[0], g[1], 3);
  const auto same_bits = [](const auto& a, const auto& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
  };
  std::vector<uint16_t> dy(want.dy.size()), rounded;
  std::memcpy(dy.data(), got.dy.data(), dy.size() * sizeof(uint16_t));
  for (const float v : want.dy) rounded.push_back(narrow(v));
  expect(same_bits(got.rows, want.rows) && same_bits(got.columns, want.columns) &&
             same_bits(got.dx, want.dx) && same_bits(got.dscale, want.dscale),
         std::string(kernels.capability) + ": 16-bit columns are not read as their values");
  expect(dy == rounded, std::string(kernels.capability) + ": dy of 16-bit columns");
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
