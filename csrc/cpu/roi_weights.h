// Boxes turned into short lists of map rows and columns with weights, once per box and for all
// channels. A bin's samples are the outer product of its rows' and its columns' taps.
#pragma once

#include <algorithm>
#include <cstdint>
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

// Indices of the usable boxes, image after image and in order within an image.
struct RoiGroups {
  std::vector<int64_t> order;
  std::vector<int64_t> begin;  // of image n in `order`; one more at the end
};

template <class A>
RoiGroups group_by_image(const A* rois, int64_t count, const RoiSpec& spec);

// Fills the outputs, `size` a box, of the boxes that are not usable.
template <class T, class A>
void fill_unusable(const A* rois, int64_t count, const RoiSpec& spec, int64_t size, A value,
                   T* output) {
  for (int64_t r = 0; r < count; ++r) {
    if (roi_is_usable(rois + r * 5, spec)) continue;
    std::fill_n(output + r * size, size, static_cast<T>(value));
  }
}

template <class A>
RoiWeights<A> roi_weights(const A* roi, const RoiSpec& spec);

template <class A>
RoiSamples<A> roi_samples(const A* roi, const RoiSpec& spec);

}  // namespace detkit::cpu
