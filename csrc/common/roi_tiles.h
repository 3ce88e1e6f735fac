// RoI pooling seen from the map, for gradients that are gathered in a fixed order: bins are sums of
// samples that are products of one tap per axis, so what a position gives to a bin is the product
// of two sums, one per axis. Plain functions, so that tests run them on the CPU too.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/macros.h"
#include "common/roi.h"

namespace detkit {

constexpr int kRoiTile = 8;  // positions of a tile along each axis

// Sum of the weights with which the samples of a bin read position `at` of the axis.
template <class A>
DETKIT_HD A roi_bin_weight(const RoiAxis<A>& axis, int64_t bin, int64_t at) {
  const A start = axis.bin_start(bin);
  const RoiWindow window = roi_window(axis, start);
  A sum = A(0);
  for (int64_t i = window.begin; i < window.end; ++i) {
    const Taps<A> taps = axis.taps(start, i);
    if (taps.low_inside && taps.low == at) sum += taps.low_weight;
    if (taps.high_inside && taps.high == at) sum += taps.high_weight;
  }
  return sum;
}

// The weight with which sample `i` of a bin reads position `at`.
template <class A>
DETKIT_HD A roi_sample_weight(const RoiAxis<A>& axis, int64_t bin, int64_t i, int64_t at) {
  const Taps<A> taps = axis.taps(axis.bin_start(bin), i);
  A sum = A(0);
  if (taps.low_inside && taps.low == at) sum += taps.low_weight;
  if (taps.high_inside && taps.high == at) sum += taps.high_weight;
  return sum;
}

// Whether any sample may read a position in [first, last]; true in doubt. Samples lie between the
// box's ends but for rounding, and read at most one position further.
template <class A>
DETKIT_HD bool roi_may_touch(const RoiAxis<A>& axis, int64_t bins, int64_t first, int64_t last) {
  const A one = axis.start, other = axis.bin_start(bins);
  const A low = one < other ? one : other, high = one < other ? other : one;
  const A slack = A(2) + (std::abs(one) + std::abs(other)) * A(1e-5);
  return !(high + slack < A(first) || low - slack > A(last));
}

}  // namespace detkit
