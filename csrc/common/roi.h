// Where the RoI operators sample: boxes on the map, bins, sample positions. Every formula stands in
// torchvision's order of operations, each step rounded (hence rounded_mul): one unit in the last
// place of a coordinate shows in the output.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/bilinear.h"
#include "common/macros.h"
#include "common/rounded.h"

namespace detkit {

// A bin of more samples pools to zero; the reference says why.
constexpr int64_t kMaxRoiGrid = int64_t(1) << 22;

// All that a RoI operator is told besides its data.
struct RoiSpec {
  int64_t batch, channels, height, width;  // of the feature map
  int64_t bins_down, bins_across;
  double spatial_scale;
  int64_t sampling_ratio;  // <= 0: adaptive
  double offset;           // subtracted from scaled coordinates
  bool has_floor;          // whether box sizes are raised to `floor`
  double floor;
  bool zero_border;  // which taps: zero_border_taps or clamped_taps
};

// torchvision's RoIAlign.
DETKIT_HD RoiSpec roi_align_spec(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                 int64_t bins_down, int64_t bins_across, double spatial_scale,
                                 int64_t sampling_ratio, bool aligned) {
  return {batch,
          channels,
          height,
          width,
          bins_down,
          bins_across,
          spatial_scale,
          sampling_ratio,
          aligned ? 0.5 : 0.0,
          !aligned,
          1.0,
          false};
}

// torchvision's PS-RoIAlign, or with `reduce_max` that of the Light-Head R-CNN code.
DETKIT_HD RoiSpec ps_roi_align_spec(int64_t batch, int64_t channels, int64_t height, int64_t width,
                                    int64_t bins_down, int64_t bins_across, double spatial_scale,
                                    int64_t sampling_ratio, bool reduce_max, double offset) {
  if (reduce_max && sampling_ratio <= 0) sampling_ratio = 2;
  return {batch,         channels,       height, width,      bins_down, bins_across,
          spatial_scale, sampling_ratio, offset, reduce_max, 0.0,       reduce_max};
}

// One box along one axis of the map.
template <class A>
struct RoiAxis {
  int64_t size;  // of the map
  A start;
  A bin_size;
  int64_t grid;  // samples per bin
  bool zero_border;

  DETKIT_HD A bin_start(int64_t bin) const { return start + rounded_mul(A(bin), bin_size); }

  DETKIT_HD A position(A bin_start, int64_t sample) const {
    return bin_start + rounded_mul(A(sample) + A(0.5), bin_size) / A(grid);
  }

  DETKIT_HD Taps<A> taps(A bin_start, int64_t sample) const {
    const A at = position(bin_start, sample);
    return zero_border ? zero_border_taps(at, size) : clamped_taps(at, size);
  }
};

// A range of samples [begin, end).
struct RoiWindow {
  int64_t begin, end;
};

// The samples of a bin that can lie on the map: all of them, or of a huge bin those near the map.
template <class A>
DETKIT_HD RoiWindow roi_window(const RoiAxis<A>& axis, A bin_start) {
  if (axis.grid <= 2 * axis.size + 64 || !(axis.bin_size > A(0))) return {0, axis.grid};
  const A grid = A(axis.grid);
  const A slack = A(8) + (std::abs(axis.start) + axis.bin_size) * A(1.0 / (1 << 18));
  const A first = (A(-1) - bin_start) / axis.bin_size * grid - slack;
  const A last = (A(axis.size) - bin_start) / axis.bin_size * grid + slack;
  return {first > A(0) ? (first < grid ? static_cast<int64_t>(first) : axis.grid) : 0,
          last < grid ? (last > A(0) ? static_cast<int64_t>(last) : 0) : axis.grid};
}

// Boxes are rows (batch index, x1, y1, x2, y2); false where a number is not finite or the image
// does not exist, and then all outputs are NaN.
template <class A>
DETKIT_HD bool roi_is_usable(const A* roi, const RoiSpec& spec) {
  A sum = A(0);
  for (int i = 0; i < 5; ++i) sum += roi[i] - roi[i];  // NaN for NaN and for infinity
  return sum == A(0) && roi[0] >= A(0) && roi[0] < A(spec.batch);
}

template <class A>
DETKIT_HD RoiAxis<A> roi_axis(A low, A high, int64_t size, int64_t bins, const RoiSpec& spec) {
  const A scale = A(spec.spatial_scale), offset = A(spec.offset);
  RoiAxis<A> axis;
  axis.size = size;
  axis.zero_border = spec.zero_border;
  axis.start = rounded_mul(low, scale) - offset;
  A extent = rounded_mul(high, scale) - offset - axis.start;
  if (spec.has_floor && extent < A(spec.floor)) extent = A(spec.floor);
  axis.bin_size = extent / A(bins);
  if (spec.sampling_ratio > 0) {
    axis.grid = spec.sampling_ratio;
  } else {
    const A grid = std::ceil(axis.bin_size);
    axis.grid = grid >= A(1) && grid <= A(kMaxRoiGrid) ? static_cast<int64_t>(grid) : 0;
  }
  return axis;
}

template <class A>
DETKIT_HD RoiAxis<A> roi_rows(const A* roi, const RoiSpec& spec) {
  return roi_axis(roi[2], roi[4], spec.height, spec.bins_down, spec);
}

template <class A>
DETKIT_HD RoiAxis<A> roi_columns(const A* roi, const RoiSpec& spec) {
  return roi_axis(roi[1], roi[3], spec.width, spec.bins_across, spec);
}

// Samples of a bin, at least 1 so that the mean of none is 0.
template <class A>
DETKIT_HD A roi_sample_count(const RoiAxis<A>& rows, const RoiAxis<A>& columns) {
  const int64_t count = rows.grid * columns.grid;
  return A(count > 1 ? count : 1);
}

}  // namespace detkit
