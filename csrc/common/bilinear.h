// Bilinear interpolation along one axis: the two neighbours of a position and their weights. A 2-d
// sample is the outer product of its two axes.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"

namespace detkit {

template <class A>
struct Taps {
  int64_t low = 0, high = 0;
  A low_weight = 0, high_weight = 0;
  bool low_inside = false, high_inside = false;  // a tap outside must not be read
};

// Positions up to one pixel outside [0, size - 1] are moved to the border, others read nothing. A
// NaN position falls outside.
template <class A>
DETKIT_HD Taps<A> clamped_taps(A position, int64_t size) {
  Taps<A> taps;
  if (!(position >= A(-1) && position <= A(size)) || size == 0) return taps;
  if (position < A(0)) position = A(0);
  taps.low = static_cast<int64_t>(position);
  if (taps.low >= size - 1) {
    taps.low = taps.high = size - 1;
    position = A(taps.low);
  } else {
    taps.high = taps.low + 1;
  }
  taps.high_weight = position - A(taps.low);
  taps.low_weight = A(1) - taps.high_weight;
  taps.low_inside = taps.high_inside = true;
  return taps;
}

// Neighbours outside [0, size - 1] read nothing, and the other neighbour keeps its weight.
template <class A>
DETKIT_HD Taps<A> zero_border_taps(A position, int64_t size) {
  Taps<A> taps;
  if (!(position >= A(-1) && position < A(size))) return taps;
  const A low = std::floor(position);
  taps.low = static_cast<int64_t>(low);
  taps.high = taps.low + 1;
  taps.high_weight = position - low;
  taps.low_weight = A(1) - taps.high_weight;
  taps.low_inside = taps.low >= 0;
  taps.high_inside = taps.high < size;
  return taps;
}

}  // namespace detkit
