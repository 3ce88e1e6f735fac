// Where the taps of a convolution read along one axis, and with which weights; for CPU and CUDA.
//
// Tap i of a scaled convolution (POD, Peng et al., ICCV 2019, section 3.1) samples at i * scale
// from the output's centre, between two pixels. The *distance* |i| * scale is split into whole part
// and fraction, not the position: at integers every tap then takes the derivative towards larger
// scales, so mirrored inputs have equal gradients.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "common/rounded.h"

namespace detkit {

// One tap of one axis: near_weight * x[p * stride + near] + far_weight * x[p * stride + far].
// Where far_weight is 0 the far pixel is not read for the value; it still is for the derivative.
template <typename T>
struct Tap {
  int64_t near;
  int64_t far;
  T near_weight;
  T far_weight;
  T slope;  // d far_weight / d scale = -d near_weight / d scale
};

// Tap i (0 is the centre) at a real scale. No position of the map lies `reach` or more pixels from
// another, so further taps read zeros anyway and their offsets are cut to stay within int64. A
// non-finite scale gives NaN weights at every tap, the centre included.
template <typename T>
DETKIT_HD Tap<T> scaled_tap(int64_t i, T scale, int64_t reach) {
  const int64_t sign = (i > 0) - (i < 0);
  const T slope = static_cast<T>(i < 0 ? -i : i);
  const T distance = rounded_mul(slope, scale);  // the fraction must not be of another distance
  const T whole = std::floor(distance);
  const T fraction = distance - whole;
  int64_t steps = 0;
  if (whole >= static_cast<T>(reach)) {
    steps = reach;
  } else if (whole <= static_cast<T>(-reach - 1)) {
    steps = -reach - 1;
  } else if (whole == whole) {
    steps = static_cast<int64_t>(whole);
  }
  return {sign * steps, sign * (steps + 1), T(1) - fraction, fraction, slope};
}

// A tap at a whole number of pixels.
template <typename T>
DETKIT_HD Tap<T> whole_tap(int64_t offset) {
  return {offset, offset, T(1), T(0), T(0)};
}

// Taps of a convolution at whole pixels: tap i reads at p * stride + i * dilation - padding.
struct WholeTaps {
  int64_t dilation_h, dilation_w, padding_h, padding_w;
};

// near_weight * a + far_weight * b, without looking at b where its weight is 0: a NaN stays with
// the outputs that touch it.
template <typename T>
DETKIT_HD T blend(const Tap<T>& tap, T a, T b) {
  return tap.far_weight == T(0) ? a * tap.near_weight : a * tap.near_weight + b * tap.far_weight;
}

// Output position whose tap at `offset` reads input position r, or -1.
DETKIT_HD int64_t reading_output(int64_t r, int64_t offset, int64_t stride, int64_t size) {
  const int64_t scaled = r - offset;
  if (scaled < 0 || scaled % stride != 0) return -1;
  const int64_t p = scaled / stride;
  return p < size ? p : -1;
}

// Number of outputs of an axis whose kernel is anchored at its centre.
DETKIT_HD int64_t centred_size(int64_t length, int64_t stride) {
  return (length + stride - 1) / stride;
}

}  // namespace detkit
