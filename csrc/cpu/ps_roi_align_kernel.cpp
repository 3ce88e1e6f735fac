#include "cpu/ps_roi_align_kernel.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "common/macros.h"
#include "common/simd.h"
#include "cpu/half.h"

namespace detkit::cpu {
namespace {

// Pixels of the map per box from which on copying the map costs more than reading it as it lies.
constexpr int64_t kPixelsPerBox = 32;

constexpr int kVectors(int vector_lanes) { return kPsLanes / vector_lanes; }

// An integer of A's width, so that comparisons of A select it.
template <class A>
using LaneIndex = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;

// One bin of one image, and a block of output channels.
struct Item {
  int64_t image, row, column, depth;  // bin (row, column), first output channel
  int64_t lanes;                      // output channels in use
};

template <class A>
Item item_of(const PsRoiAlignPlan<A>& plan, int64_t index) {
  const int64_t block = index % plan.blocks(), bin = index / plan.blocks() % plan.bins();
  const int64_t depth = block * kPsLanes;
  return {index / plan.blocks() / plan.bins(), bin / plan.spec.bins_across,
          bin % plan.spec.bins_across, depth, std::min<int64_t>(kPsLanes, plan.depth() - depth)};
}

// The mean of one box's bin to `pooled` (lanes).
template <class A>
DETKIT_CLONES void pool_mean(const A* map, int64_t width, const RoiWeights<A>& box,
                             const Item& item, A* pooled) {
  using V = typename Vector<A>::type;
  constexpr int kCount = kVectors(Vector<A>::lanes);
  V sum[kCount] = {};
  for (const auto* y = box.rows.first(item.row); y != box.rows.last(item.row); ++y) {
    const A* row = map + y->index * width * kPsLanes;
    for (const auto* x = box.columns.first(item.column); x != box.columns.last(item.column); ++x) {
      const auto* pixel = reinterpret_cast<const V*>(row + x->index * kPsLanes);
      const A weight = y->weight * x->weight;
      for (int v = 0; v < kCount; ++v) sum[v] += weight * pixel[v];
    }
  }
  for (int v = 0; v < kCount; ++v) reinterpret_cast<V*>(pooled)[v] = sum[v] / box.count;
}

// The adjoint of pool_mean.
template <class A>
DETKIT_CLONES void spread_mean(const A* grad, int64_t width, const RoiWeights<A>& box,
                               const Item& item, A* map) {
  using V = typename Vector<A>::type;
  constexpr int kCount = kVectors(Vector<A>::lanes);
  V share[kCount];
  for (int v = 0; v < kCount; ++v) share[v] = reinterpret_cast<const V*>(grad)[v] / box.count;
  for (const auto* y = box.rows.first(item.row); y != box.rows.last(item.row); ++y) {
    A* row = map + y->index * width * kPsLanes;
    for (const auto* x = box.columns.first(item.column); x != box.columns.last(item.column); ++x) {
      auto* pixel = reinterpret_cast<V*>(row + x->index * kPsLanes);
      const A weight = y->weight * x->weight;
      for (int v = 0; v < kCount; ++v) pixel[v] += weight * share[v];
    }
  }
}

// The mean of one box's bin read from planes as they lie; the same sums as pool_mean.
template <class T, class A>
void pool_planes(const T* planes, const MapStrides& strides, const RoiWeights<A>& box,
                 const Item& item, A* pooled) {
  for (int64_t c = 0; c < item.lanes; ++c, planes += strides.channel) {
    A sum = 0;
    for (const auto* y = box.rows.first(item.row); y != box.rows.last(item.row); ++y) {
      const T* row = planes + y->index * strides.row;
      for (const auto* x = box.columns.first(item.column); x != box.columns.last(item.column);
           ++x) {
        sum += y->weight * x->weight * static_cast<A>(row[x->index * strides.column]);
      }
    }
    pooled[c] = sum / box.count;
  }
}

// The adjoint of pool_planes, to contiguous planes `stride` apart.
template <class A>
void spread_planes(const A* grad, int64_t width, int64_t stride, const RoiWeights<A>& box,
                   const Item& item, A* planes) {
  for (int64_t c = 0; c < item.lanes; ++c, planes += stride) {
    const A share = grad[c] / box.count;
    for (const auto* y = box.rows.first(item.row); y != box.rows.last(item.row); ++y) {
      A* row = planes + y->index * width;
      for (const auto* x = box.columns.first(item.column); x != box.columns.last(item.column);
           ++x) {
        row[x->index] += y->weight * x->weight * share;
      }
    }
  }
}

// A corner of a sample: its first lane in the map and its weight, 0 with no address off the map.
template <class A>
struct Corner {
  int64_t offset;
  A weight;
};

// The corners on the map of the sample at (y, x); returns their number.
template <class A>
int corners_of(const Taps<A>& y, const Taps<A>& x, int64_t width, Corner<A> (&corners)[4]) {
  int count = 0;
  const auto add = [&](int64_t row, int64_t column, A weight) {
    corners[count++] = {(row * width + column) * kPsLanes, weight};
  };
  if (y.low_inside && x.low_inside) add(y.low, x.low, y.low_weight * x.low_weight);
  if (y.low_inside && x.high_inside) add(y.low, x.high, y.low_weight * x.high_weight);
  if (y.high_inside && x.low_inside) add(y.high, x.low, y.high_weight * x.low_weight);
  if (y.high_inside && x.high_inside) add(y.high, x.high, y.high_weight * x.high_weight);
  return count;
}

// The maximum of one box's bin to `pooled` (lanes) and the first sample that attains it to `winner`
// (lanes, as wide as A); a NaN sample wins.
template <class A>
DETKIT_CLONES void pool_max(const A* map, int64_t width, const RoiSamples<A>& box, const Item& item,
                            A* pooled, LaneIndex<A>* winner) {
  using V = typename Vector<A>::type;
  using I = typename Vector<LaneIndex<A>>::type;
  constexpr int kCount = kVectors(Vector<A>::lanes);
  const Taps<A>* rows = box.rows.data() + item.row * box.grid_down;
  const Taps<A>* columns = box.columns.data() + item.column * box.grid_across;
  V best[kCount];
  I first[kCount] = {};
  for (int v = 0; v < kCount; ++v) best[v] = V{} - std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < box.grid_down; ++i) {
    for (int64_t j = 0; j < box.grid_across; ++j) {
      Corner<A> corners[4];
      const int count = corners_of(rows[i], columns[j], width, corners);
      V value[kCount] = {};
      for (int k = 0; k < count; ++k) {
        const auto* pixel = reinterpret_cast<const V*>(map + corners[k].offset);
        for (int v = 0; v < kCount; ++v) value[v] += corners[k].weight * pixel[v];
      }
      const I sample = I{} + static_cast<LaneIndex<A>>(i * box.grid_across + j);
      for (int v = 0; v < kCount; ++v) {
        const I wins = (value[v] > best[v]) | ((value[v] != value[v]) & (best[v] == best[v]));
        best[v] = wins ? value[v] : best[v];
        first[v] = wins ? sample : first[v];
      }
    }
  }
  for (int v = 0; v < kCount; ++v) {
    reinterpret_cast<V*>(pooled)[v] = best[v];
    reinterpret_cast<I*>(winner)[v] = first[v];
  }
}

// The adjoint of pool_max: each lane's gradient goes to its winner's corners.
template <class A>
void spread_max(const A* grad, const int32_t* winner, int64_t width, const RoiSamples<A>& box,
                const Item& item, A* map) {
  const Taps<A>* rows = box.rows.data() + item.row * box.grid_down;
  const Taps<A>* columns = box.columns.data() + item.column * box.grid_across;
  for (int64_t c = 0; c < item.lanes; ++c) {
    Corner<A> corners[4];
    const int count = corners_of(rows[winner[c] / box.grid_across],
                                 columns[winner[c] % box.grid_across], width, corners);
    for (int k = 0; k < count; ++k) map[corners[k].offset + c] += corners[k].weight * grad[c];
  }
}

// Where the outputs of one box at one item stand: `stride` apart.
template <class A>
int64_t output_offset(const PsRoiAlignPlan<A>& plan, int64_t box, const Item& item) {
  return (box * plan.depth() + item.depth) * plan.bins() + item.row * plan.spec.bins_across +
         item.column;
}

// First input channel of an item; the next one is bins() channels on.
template <class A>
int64_t channel_of(const PsRoiAlignPlan<A>& plan, const Item& item) {
  return item.depth * plan.bins() + item.row * plan.spec.bins_across + item.column;
}

// Whether so few boxes read the map that it is not worth a copy.
template <class A>
bool few_boxes(const PsRoiAlignPlan<A>& plan, const Item& item) {
  const int64_t boxes = plan.groups.begin[item.image + 1] - plan.groups.begin[item.image];
  return !plan.reduce_max && boxes * kPixelsPerBox < plan.spec.height * plan.spec.width;
}

}  // namespace

template <class A>
void ps_roi_align_prepare(PsRoiAlignPlan<A>& plan, const A* rois, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const A* roi = rois + r * 5;
    if (!roi_is_usable(roi, plan.spec)) continue;
    if (plan.reduce_max) {
      plan.samples[r] = roi_samples(roi, plan.spec);
    } else {
      plan.weights[r] = roi_weights(roi, plan.spec);
    }
  }
}

template <class T, class A>
void ps_roi_align_forward(const PsRoiAlignPlan<A>& plan, const T* input, const MapStrides& strides,
                          T* output, int32_t* argmax, int64_t begin, int64_t end) {
  const RoiSpec& spec = plan.spec;
  const int64_t row_size = spec.width * kPsLanes, bins = plan.bins();
  const Scratch<A> map(spec.height * row_size);  // touched only where boxes are many
  MapStrides planes = strides;
  planes.channel *= bins;
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_of(plan, index);
    const int64_t first = plan.groups.begin[item.image], last = plan.groups.begin[item.image + 1];
    if (first == last) continue;
    const T* source = input + item.image * strides.image + channel_of(plan, item) * strides.channel;
    const bool few = few_boxes(plan, item);
    for (int64_t y = 0; y < spec.height && !few; ++y) {
      pack_row<T, A, kPsLanes>(source + y * strides.row, planes, item.lanes, spec.width,
                               map.get() + y * row_size);
    }
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = plan.groups.order[i], offset = output_offset(plan, r, item);
      alignas(64) A pooled[kPsLanes];
      alignas(64) LaneIndex<A> winner[kPsLanes];
      if (plan.reduce_max) {
        pool_max(map.get(), spec.width, plan.samples[r], item, pooled, winner);
        for (int64_t c = 0; c < item.lanes; ++c) {
          argmax[offset + c * bins] = static_cast<int32_t>(winner[c]);
        }
      } else if (few) {
        pool_planes(source, planes, plan.weights[r], item, pooled);
      } else {
        pool_mean(map.get(), spec.width, plan.weights[r], item, pooled);
      }
      for (int64_t c = 0; c < item.lanes; ++c) {
        output[offset + c * bins] = static_cast<T>(pooled[c]);
      }
    }
  }
}

template <class T, class A>
void ps_roi_align_backward(const PsRoiAlignPlan<A>& plan, const T* grad, const int32_t* argmax,
                           T* grad_input, int64_t begin, int64_t end) {
  const RoiSpec& spec = plan.spec;
  const int64_t plane = spec.height * spec.width, bins = plan.bins();
  const Scratch<A> map(plane * kPsLanes);
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_of(plan, index);
    T* target = grad_input + (item.image * spec.channels + channel_of(plan, item)) * plane;
    bool few = false;
    if constexpr (std::is_same_v<T, A>) few = few_boxes(plan, item);  // half types sum in float
    if (few) {
      for (int64_t c = 0; c < item.lanes; ++c) std::fill_n(target + c * bins * plane, plane, T(0));
    } else {
      std::fill_n(map.get(), plane * kPsLanes, A(0));
    }
    for (int64_t i = plan.groups.begin[item.image]; i < plan.groups.begin[item.image + 1]; ++i) {
      const int64_t r = plan.groups.order[i], offset = output_offset(plan, r, item);
      alignas(64) A share[kPsLanes] = {};
      for (int64_t c = 0; c < item.lanes; ++c) share[c] = static_cast<A>(grad[offset + c * bins]);
      if (plan.reduce_max) {
        int32_t winner[kPsLanes];
        for (int64_t c = 0; c < item.lanes; ++c) winner[c] = argmax[offset + c * bins];
        spread_max(share, winner, spec.width, plan.samples[r], item, map.get());
      } else if (few) {
        if constexpr (std::is_same_v<T, A>) {
          spread_planes(share, spec.width, bins * plane, plan.weights[r], item, target);
        }
      } else {
        spread_mean(share, spec.width, plan.weights[r], item, map.get());
      }
    }
    if (few) continue;
    to_planes<T, A>(map.get(), kPsLanes, item.lanes, plane, target, bins * plane);
  }
}

#define DETKIT_INSTANTIATE(T, A)                                                                \
  template void ps_roi_align_forward(const PsRoiAlignPlan<A>&, const T*, const MapStrides&, T*, \
                                     int32_t*, int64_t, int64_t);                               \
  template void ps_roi_align_backward(const PsRoiAlignPlan<A>&, const T*, const int32_t*, T*,   \
                                      int64_t, int64_t);
template void ps_roi_align_prepare(PsRoiAlignPlan<float>&, const float*, int64_t, int64_t);
template void ps_roi_align_prepare(PsRoiAlignPlan<double>&, const double*, int64_t, int64_t);
DETKIT_INSTANTIATE(float, float)
DETKIT_INSTANTIATE(double, double)
DETKIT_INSTANTIATE(Half, float)
DETKIT_INSTANTIATE(BFloat16, float)
#undef DETKIT_INSTANTIATE

}  // namespace detkit::cpu
