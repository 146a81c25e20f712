// Products of float32 in tile registers against sums in double: ragged blocks, both layouts of
// rows, pieces, numbers from the smallest to the largest, cancelling sums, NaN and inf.
//
// usage: split_test amx_bf16; exit code 77 where it cannot run.
#include "check.h"
#include "kernels.h"

#if defined(__AMX_BF16__)

#define FL_ISA amx_bf16
#define FL_VECTOR_BYTES 64
#include "cpu/rows.h"

using namespace fused_losses;
using namespace fused_losses::amx_bf16;

namespace {

constexpr int64_t kWide = kPanel<Plain<float>>;
constexpr int64_t kPiece = 64;

struct Case {
  int64_t rows, depth, panels;
  float left, right;  // the size of each side
  bool spread;        // from that size down to nothing
};

std::string name(const Case& c, const char* form) {
  return std::string(form) + " " + std::to_string(c.rows) + " x " + std::to_string(c.depth) +
         " x " + std::to_string(c.panels) + ", " + std::to_string(std::ilogb(c.left)) + " by " +
         std::to_string(std::ilogb(c.right)) + (c.spread ? ", spread" : "");
}

std::vector<float> drawn(int64_t count, float size, bool spread, unsigned seed) {
  auto out = random(count, 1, seed);
  for (int64_t i = 0; i < count; ++i) {
    out[i] = std::clamp(out[i], -2.0f, 2.0f) * size;
    if (spread) out[i] = std::ldexp(out[i], -static_cast<int>(i * 7 % 120));
  }
  return out;
}

enum class Form { kAlong, kTurned, kPieces };

// What `multiply_split` makes of rows [rows, depth] and panels [panel][depth][kWide].
std::vector<double> products(const Case& c, Form form, const std::vector<float>& x,
                             const std::vector<float>& panels) {
  const int64_t columns = c.panels * kWide, pieces = round_up(c.depth, kPiece);
  std::vector<char> memory(4 << 20);
  const auto address = reinterpret_cast<uintptr_t>(memory.data());
  Arena arena(memory.data() + round_up(address, 64) - address);
  const SplitRoom room = split_room<Plain<float>>(arena, c.rows, c.rows * columns * c.depth);
  expect(room.left != nullptr, "there is room");
  // rows as each form has them; behind what exists stands what must not be met
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const int64_t ld = round_up(c.rows, 16);
  std::vector<float> turned(c.depth * ld, nan), apart(pieces * c.rows, nan);
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t k = 0; k < c.depth; ++k) {
      turned[k * ld + r] = x[r * c.depth + k];
      apart[(k / kPiece * c.rows + r) * kPiece + k % kPiece] = x[r * c.depth + k];
    }
  }
  std::vector<double> sums(c.rows * columns, 0);
  std::vector<int> begun(c.rows * columns, 0);
  const auto right = [&](int64_t panel, int64_t k) {
    return panels.data() + (panel * c.depth + k) * kWide;
  };
  const auto finish = [&](int64_t r, int64_t panel, int v, Floats sum, bool first) {
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t at = r * columns + panel * kWide + v * 16 + i;
      sums[at] = (first ? 0 : sums[at]) + sum[i];
      begun[at] += first;
    }
  };
  const auto run = [&]<bool kTurned, int64_t kLength>(auto&& left) {
    return multiply_split<Plain<float>, kTurned, kLength>(room, left, c.rows, c.depth, right,
                                                          c.panels, finish);
  };
  bool done = false;
  if (form == Form::kAlong) {
    done = run.template operator()<false, kSplitDepth>(
        [&](int64_t r, int64_t k) { return x.data() + r * c.depth + k; });
  } else if (form == Form::kTurned) {
    done = run.template operator()<true, kSplitDepth>(
        [&](int64_t r, int64_t k) { return turned.data() + k * ld + r; });
  } else {
    done = run.template operator()<false, kPiece>([&](int64_t r, int64_t k) {
      return apart.data() + (k / kPiece * c.rows + r) * kPiece + k % kPiece;
    });
  }
  expect(done, name(c, "split"));
  for (const int times : begun) {
    if (times != 1) return expect(false, name(c, "each sum begins once")), sums;
  }
  return sums;
}

void check(const Case& c, Form form) {
  const char* forms[] = {"along", "turned", "pieces"};
  auto x = drawn(c.rows * c.depth, c.left, c.spread, 1);
  const auto y = drawn(c.panels * c.depth * kWide, c.right, c.spread, 2);
  // a row that cancels to its last bits
  for (int64_t k = 0; k + 1 < c.depth; k += 2) x[k + 1] = -x[k];
  const auto got = products(c, form, x, y);
  // of 24 bits each: sums as in any float, what is left out, what the registers do not hold
  const double unit = std::ldexp(1, -24), steps = double(c.depth) / 8 + 16 + 1;
  const double lost = 4.0 * c.left * c.right * double(c.depth) * std::ldexp(1, -90);
  int bad = 0;
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t j = 0; j < c.panels * kWide; ++j) {
      double want = 0, size = 0;
      for (int64_t k = 0; k < c.depth; ++k) {
        const double term =
            double(x[r * c.depth + k]) * y[(j / kWide * c.depth + k) * kWide + j % kWide];
        want += term;
        size += std::abs(term);
      }
      const double room = steps * unit * size + lost + std::ldexp(1, -149);
      if (!(std::abs(got[r * c.panels * kWide + j] - want) <= room)) ++bad;
    }
  }
  expect(bad == 0, name(c, forms[int(form)]) + ": " + std::to_string(bad) + " are off");
}

// One value that is none stays in its row, or its column, and leaves the others exact.
void check_not_finite(Form form, float value, bool in_rows) {
  const Case c = {37, 70, 2, 1, 1, false};
  auto x = drawn(c.rows * c.depth, 1, false, 3);
  auto y = drawn(c.panels * c.depth * kWide, 1, false, 4);
  const auto clean = products(c, form, x, y);
  const int64_t row = 5, column = kWide + 9;
  if (in_rows) {
    x[row * c.depth + 66] = value;
  } else {
    y[(c.depth + 66) * kWide + 9] = value;
  }
  const auto got = products(c, form, x, y);
  for (int64_t r = 0; r < c.rows; ++r) {
    for (int64_t j = 0; j < c.panels * kWide; ++j) {
      const double a = got[r * c.panels * kWide + j], b = clean[r * c.panels * kWide + j];
      const bool met = in_rows ? r == row : j == column;
      if (met) {
        expect(std::isnan(value) ? std::isnan(a) : std::isinf(a), "a value that is none stays");
      } else {
        expect(std::abs(a - b) < 2e-5, "others stay as they are");
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (!force_kernels(argc > 1 ? argv[1] : nullptr) || !best_kernels().split_least) return 77;
  const TileRegisters registers;
  split_least = 1;
  for (const Form form : {Form::kAlong, Form::kTurned, Form::kPieces}) {
    for (const int64_t rows : {1, 15, 16, 17, 33, 200}) {
      for (const int64_t depth : {1, 31, 32, 70, 513, 1100}) {
        check({rows, depth, rows > 100 ? 1 : 2, 1, 1, false}, form);
      }
    }
    // more rows than are split at a time
    check({250, 512, 1, 1, 1, false}, form);
    for (const float left : {1e-42f, 1e-38f, 1e-25f, 1.0f, 1e12f, 1e25f, 1e38f}) {
      for (const float right : {1e-42f, 1e-12f, 1.0f, 1e12f}) {
        if (double(left) * right > 1e35) continue;
        for (const bool spread : {false, true}) check({40, 70, 1, left, right, spread}, form);
      }
    }
    for (const float value : {NAN, INFINITY, -INFINITY}) {
      check_not_finite(form, value, true);
      check_not_finite(form, value, false);
    }
  }
  std::printf("split: %d failures\n", failures);
  return failures ? 1 : 0;
}

#else

int main() { return 77; }

#endif
