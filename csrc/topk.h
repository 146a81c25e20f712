// The k best columns of each row by a score, exactly, without torch (primitives/topk).
//
// A cheap product screens: a pair whose score cannot reach the k-th best so far, by a bound on the
// rounding of that product, is dropped; what remains is scored again in double. The answer is the
// one of the scores in double, ties to the lowest index, whatever the screen's precision.
#pragma once

#include <cmath>

#include "row_statistics.h"

namespace fused_losses {

// How far a screen may be from a score: docs/topk.md derives it, bounds.py is its Python.
struct ScreenBound {
  static constexpr double kUnit = 0x1p-24;   // unit roundoff of what is added up
  static constexpr double kJudge = 0x1p-53;  // of what decides
  static constexpr double kBf16 = 0x1p-8;    // of what is multiplied
  static constexpr double kTiny = 0x1p-126;  // below it an instruction may flush to 0
  static constexpr double kLimit = 0x1p63;   // of a row's length: no product or sum overflows

  double product;  // of |x| |y|
  double offset;   // of |y|^2 / 2
  double judge;    // of the key of a distance and of |x|^2

  ScreenBound(int64_t d, bool cosine, bool bf16) {
    const double sums = 2 * std::log1p(bf16 ? kBf16 : 0) + (3 * d + 16) * kJudge;
    // a length is the root of a sum in float
    product = std::expm1(sums + (d + 5 + (cosine ? 0.5 * d + 4 : 0)) * kUnit);
    offset = std::expm1((d + 7) * kUnit + (3 * d + 16) * kJudge);
    judge = (d + 8) * kJudge;
  }
};

// Coordinates of y's rows along orthonormal axes, of the most spread first: a screen in y's place
// that reads what a bound on the other coordinates leaves open (docs/topk.md).
struct Heads {
  static constexpr int64_t kStep = 32;  // coordinates of a level behind the first

  const float* first;     // [m, width]; null: none
  const float* rest;      // [m, levels, kStep]
  const float* tails;     // [levels + 2, m]: a row's length; at most what it has beyond each level
  const double* queries;  // [n, kept]: x along the axes
  int64_t width, levels, kept;
  int64_t shown;  // a level, for tests
  double moved;   // how far a row is from its coordinates at most, of its length

  int64_t coordinates() const { return width + levels * kStep; }
};

// How far the coordinates' score may be from the real one, beside what a tail can add.
struct HeadBound {
  double product, offset, tail;

  HeadBound(const Heads& h, int64_t d) {
    const double judged = (3 * d + 16) * ScreenBound::kJudge;
    product =
        std::expm1((h.coordinates() + h.levels + 16) * ScreenBound::kUnit + judged + 3 * h.moved);
    offset = std::expm1(8 * ScreenBound::kUnit + judged);
    // of a length's square
    tail = 3 * h.moved + (3 * d + 8) * ScreenBound::kJudge;
  }
};

enum class Affinity { kDot, kCosine, kSquaredDistance };
enum class Match { kAny, kSame, kDifferent };

// Rows of a narrow copy of y that screen in its place: y_j, rotated, is within error[j] of
// scale[j] codes_j.
struct Codes {
  Matrix rows;  // int8; data null: none
  const float *scale, *error;
  const int8_t* signs;  // [rounds, d] of the rotation; null: there is none
  int64_t rounds;
};

struct TopkProblem {
  Matrix x;              // [n, d] float or double, dense
  Matrix y;              // [m, d] any type; rows of int8 are multiplied by y_scale
  const float* y_scale;  // [m], for int8 only
  Codes codes;
  Heads heads;  // codes or heads, or neither
  int64_t n, m, d, k;
  Affinity affinity;
  bool largest;
  const int32_t *x_labels, *y_labels;  // both or neither
  Match match;
  const int32_t *x_ids, *y_ids;  // equal ids: left out
  const int32_t* exclude;        // [n, excluded] columns left out, -1: none
  int64_t excluded;
  bool skip_self;     // leave out i == j
  bool symmetric;     // y is x and skip_self: half the products
  bool bf16;          // screen with bfloat16 products
  size_t most_bytes;  // what the candidates may take, about
};

// [n, k]; past the last candidate of a row: index -1, key NaN.
struct TopkOut {
  double* keys;  // <x, y>, the cosine or |x - y|^2
  int64_t* index;
};

struct TopkKernels {
  size_t (*bytes)(const TopkProblem&, int threads);
  void (*run)(const TopkProblem&, const TopkOut&, void* buffer, const Parallel&);
  // For tests: every score of the screen with its bound, both [n, m], and what rows are moved by;
  // of heads those of heads.shown
  void (*scores)(const TopkProblem&, float* scores, float* bounds, double* center, void* buffer,
                 const Parallel&);
};

}  // namespace fused_losses
