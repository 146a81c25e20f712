// Distances in float: what the rules compute with, and which pairs cancel.
#pragma once

#include <cmath>
#include <limits>

#include "../../distances.h"
#include "../../rules/distances.h"
#include "../warp.h"

namespace fused_losses::cuda::distances {

constexpr int32_t kSignBit = std::numeric_limits<int32_t>::min();
constexpr float kTiny = std::numeric_limits<float>::min();

struct FloatMath {
  using Scalar = float;
  using Value = float;
  using Code = int32_t;
  using Bits = int32_t;

  FL_FUNCTION static Bits bits(float v) {
    Bits out;
    memcpy(&out, &v, 4);
    return out;
  }
  FL_FUNCTION static float value(Bits v) {
    float out;
    memcpy(&out, &v, 4);
    return out;
  }
  FL_FUNCTION static float to_value(Bits v) { return static_cast<float>(v); }
  FL_FUNCTION static float all(float v) { return v; }
  FL_FUNCTION static float magnitude(float v) { return fabsf(v); }
  FL_FUNCTION static float turn_sign(float v, float by) {
    return value(bits(v) ^ (bits(by) & kSignBit));
  }
  FL_FUNCTION static float reciprocal(float v) {
#if defined(__CUDA_ARCH__)
    return __fdividef(1.0f, v);
#else
    return 1.0f / v;
#endif
  }
  FL_FUNCTION static float root(float v) { return sqrtf(v); }
  FL_FUNCTION static float not_zero(float v) { return kTiny > v ? kTiny : v; }
  FL_FUNCTION static float log_near_one(float z) { return distance_rules::float_log_near_one(z); }
  FL_FUNCTION static float small_power_of_two(float f) {
    return distance_rules::float_small_power_of_two(f);
  }
  FL_FUNCTION static float times_power_of_two(float v, float n) {
    n = n < -127.0f ? -127.0f : n;
    n = n > 128.0f ? 128.0f : n;
    return v * value((static_cast<int32_t>(n) + 127) << 23);
  }
  FL_FUNCTION static float divergence(float t, float rest) {
    return distance_rules::float_divergence<FloatMath>(t, rest);
  }
};

// A pair whose gradient is taken from its difference.
FL_DEVICE bool is_near(float out, float size, bool rooted) {
  return !((rooted ? out * out : out) >= size * distance_rules::kNear<float>);
}

}  // namespace fused_losses::cuda::distances
