// Boxes turned into short lists of map rows and columns with weights, once per box and for all
// channels. A bin's samples are the outer product of its rows' and its columns' taps.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

#include "common/bilinear.h"
#include "common/roi.h"

namespace detkit::cpu {

// A map row (or column) and its weight.
template <class A>
struct Weighted {
  int64_t index;
  A weight;
};

// The rows (or columns) that the bins of one box read, bin after bin.
template <class A>
struct AxisWeights {
  std::vector<Weighted<A>> entries;
  std::vector<int64_t> begin;  // of bin b in `entries`; one more at the end

  const Weighted<A>* first(int64_t bin) const { return entries.data() + begin[bin]; }
  const Weighted<A>* last(int64_t bin) const { return entries.data() + begin[bin + 1]; }
};

// What the mean over a box's samples needs: equal rows and equal columns of a bin are merged.
template <class A>
struct RoiWeights {
  AxisWeights<A> rows, columns;
  A count = 1;
};

// What the maximum over a box's samples needs: every sample by itself, bin after bin.
template <class A>
struct RoiSamples {
  std::vector<Taps<A>> rows, columns;  // (bins, grid)
  int64_t grid_down = 0, grid_across = 0;
};

// Indices of the usable boxes, image after image. Boxes of an image go in strips of the map from
// left to right, so that a box finds in near caches what the one before it has read.
struct RoiGroups {
  std::vector<int64_t> order;
  std::vector<int64_t> begin;  // of image n in `order`; one more at the end
};

// Fills the outputs, `size` a box, of the boxes that are not usable.
template <class T, class A>
void fill_unusable(const A* rois, int64_t count, const RoiSpec& spec, int64_t size, A value,
                   T* output) {
  for (int64_t r = 0; r < count; ++r) {
    if (roi_is_usable(rois + r * 5, spec)) continue;
    std::fill_n(output + r * size, size, static_cast<T>(value));
  }
}

// Samples of a bin follow each other, so an equal row is one of the last two.
template <class A>
void add_weight(AxisWeights<A>& axis, int64_t index, A weight) {
  auto& entries = axis.entries;
  const auto size = static_cast<int64_t>(entries.size());
  for (int64_t i = size - 1; i >= size - 2 && i >= axis.begin.back(); --i) {
    if (entries[i].index == index) {
      entries[i].weight += weight;
      return;
    }
  }
  entries.push_back({index, weight});
}

template <class A>
AxisWeights<A> axis_weights(const RoiAxis<A>& axis, int64_t bins) {
  AxisWeights<A> weights;
  weights.begin.reserve(bins + 1);
  weights.entries.reserve(bins * (axis.grid < 4 ? 2 * axis.grid : 8));
  for (int64_t bin = 0; bin < bins; ++bin) {
    weights.begin.push_back(static_cast<int64_t>(weights.entries.size()));
    const A start = axis.bin_start(bin);
    const RoiWindow window = roi_window(axis, start);
    for (int64_t k = window.begin; k < window.end; ++k) {
      const Taps<A> taps = axis.taps(start, k);
      if (taps.low_inside) add_weight(weights, taps.low, taps.low_weight);
      if (taps.high_inside) add_weight(weights, taps.high, taps.high_weight);
    }
  }
  weights.begin.push_back(static_cast<int64_t>(weights.entries.size()));
  return weights;
}

template <class A>
std::vector<Taps<A>> axis_samples(const RoiAxis<A>& axis, int64_t bins) {
  std::vector<Taps<A>> samples;
  samples.reserve(bins * axis.grid);
  for (int64_t bin = 0; bin < bins; ++bin) {
    const A start = axis.bin_start(bin);
    for (int64_t k = 0; k < axis.grid; ++k) samples.push_back(axis.taps(start, k));
  }
  return samples;
}

constexpr int64_t kStripRows = 16;  // of the map

// Sorts boxes by the strip that their centre lies in, then by column; ties keep their order.
template <class A>
void sort_by_place(const A* rois, const RoiSpec& spec, std::vector<int64_t>& boxes) {
  const A strip = static_cast<A>(2 * kStripRows / spec.spatial_scale);
  std::vector<std::tuple<A, A, int64_t>> places;
  places.reserve(boxes.size());
  for (const int64_t r : boxes) {
    const A* roi = rois + r * 5;
    places.emplace_back(std::floor((roi[2] + roi[4]) / strip), roi[1] + roi[3], r);
  }
  std::sort(places.begin(), places.end());
  for (size_t i = 0; i < boxes.size(); ++i) boxes[i] = std::get<2>(places[i]);
}

template <class A>
RoiGroups group_by_image(const A* rois, int64_t count, const RoiSpec& spec) {
  std::vector<std::vector<int64_t>> images(spec.batch);
  for (int64_t r = 0; r < count; ++r) {
    const A* roi = rois + r * 5;
    if (roi_is_usable(roi, spec)) images[static_cast<int64_t>(roi[0])].push_back(r);
  }
  RoiGroups groups;
  groups.order.reserve(count);
  for (auto& image : images) {
    sort_by_place(rois, spec, image);
    groups.begin.push_back(static_cast<int64_t>(groups.order.size()));
    groups.order.insert(groups.order.end(), image.begin(), image.end());
  }
  groups.begin.push_back(static_cast<int64_t>(groups.order.size()));
  return groups;
}

template <class A>
RoiWeights<A> roi_weights(const A* roi, const RoiSpec& spec) {
  const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
  return {axis_weights(rows, spec.bins_down), axis_weights(columns, spec.bins_across),
          roi_sample_count(rows, columns)};
}

template <class A>
RoiSamples<A> roi_samples(const A* roi, const RoiSpec& spec) {
  const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
  return {axis_samples(rows, spec.bins_down), axis_samples(columns, spec.bins_across), rows.grid,
          columns.grid};
}

}  // namespace detkit::cpu
