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

// The same of 2 x 2 samples on the map.
template <class A>
DETKIT_CLONES void pool_fours(const A* map, int64_t width, const FourTaps<A>& rows,
                              const FourTaps<A>& columns, A* pooled) {
  using V = typename Vector<A>::type;
  constexpr int kCount = kVectors(Vector<A>::lanes);
  V sum[kCount] = {};
  for (int i = 0; i < 4; ++i) {
    const A* row = map + rows.index[i] * width * kPsLanes;
    V line[kCount] = {};
    for (int j = 0; j < 4; ++j) {
      const auto* pixel = reinterpret_cast<const V*>(row + columns.index[j] * int64_t(kPsLanes));
      for (int v = 0; v < kCount; ++v) line[v] += columns.weight[j] * pixel[v];
    }
    for (int v = 0; v < kCount; ++v) sum[v] += rows.weight[i] * line[v];
  }
  for (int v = 0; v < kCount; ++v) reinterpret_cast<V*>(pooled)[v] = sum[v] * A(0.25);
}

// The adjoint of pool_fours.
template <class A>
DETKIT_CLONES void spread_fours(const A* grad, int64_t width, const FourTaps<A>& rows,
                                const FourTaps<A>& columns, A* map) {
  using V = typename Vector<A>::type;
  constexpr int kCount = kVectors(Vector<A>::lanes);
  V share[kCount];
  for (int v = 0; v < kCount; ++v) share[v] = reinterpret_cast<const V*>(grad)[v] * A(0.25);
  for (int i = 0; i < 4; ++i) {
    A* row = map + rows.index[i] * width * kPsLanes;
    V line[kCount];
    for (int v = 0; v < kCount; ++v) line[v] = rows.weight[i] * share[v];
    for (int j = 0; j < 4; ++j) {
      auto* pixel = reinterpret_cast<V*>(row + columns.index[j] * int64_t(kPsLanes));
      for (int v = 0; v < kCount; ++v) pixel[v] += columns.weight[j] * line[v];
    }
  }
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

// Where the outputs of one box at one item stand in (R, D, P, Q): bins() apart.
template <class A>
int64_t output_offset(const PsRoiAlignPlan<A>& plan, int64_t box, const Item& item) {
  return (plan.groups.order[box] * plan.depth() + item.depth) * plan.bins() +
         item.row * plan.spec.bins_across + item.column;
}

// And in (bins, blocks, boxes, lanes); work item `index` is of the box's image.
template <class A>
int64_t pooled_offset(const PsRoiAlignPlan<A>& plan, int64_t index, int64_t box) {
  return (index % (plan.bins() * plan.blocks()) * plan.boxes() + box) * kPsLanes;
}

// First input channel of an item; the next one is bins() channels on.
template <class A>
int64_t channel_of(const PsRoiAlignPlan<A>& plan, const Item& item) {
  return item.depth * plan.bins() + item.row * plan.spec.bins_across + item.column;
}

// Fills `fours` (bins, boxes) at one box; false where a sample lies off the map.
template <class A>
bool set_fours(const RoiAxis<A>& axis, int64_t bins, int64_t boxes, FourTaps<A>* fours) {
  for (int64_t bin = 0; bin < bins; ++bin, fours += boxes) {
    const A start = axis.bin_start(bin);
    const Taps<A> first = axis.taps(start, 0), second = axis.taps(start, 1);
    if (!first.low_inside || !second.low_inside) return false;
    *fours = {{static_cast<int32_t>(first.low), static_cast<int32_t>(first.high),
               static_cast<int32_t>(second.low), static_cast<int32_t>(second.high)},
              {first.low_weight, first.high_weight, second.low_weight, second.high_weight}};
  }
  return true;
}

}  // namespace

template <class A>
PsRoiAlignPlan<A>::PsRoiAlignPlan(const RoiSpec& spec, bool reduce_max, const A* rois,
                                  int64_t count)
    : spec(spec),
      reduce_max(reduce_max),
      groups(group_by_image(rois, count, spec)),
      weights(reduce_max ? 0 : boxes()),
      samples(reduce_max ? boxes() : 0),
      has_fours(boxes()) {
  if (reduce_max || spec.sampling_ratio != 2) return;
  rows.resize(boxes() * spec.bins_down);
  columns.resize(boxes() * spec.bins_across);
}

template <class A>
bool PsRoiAlignPlan<A>::few_boxes(int64_t image) const {
  const int64_t count = groups.begin[image + 1] - groups.begin[image];
  return !reduce_max && count * kPixelsPerBox < spec.height * spec.width;
}

template <class A>
void ps_roi_align_prepare(PsRoiAlignPlan<A>& plan, const A* rois, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const A* roi = rois + plan.groups.order[i] * 5;
    if (plan.reduce_max) {
      plan.samples[i] = roi_samples(roi, plan.spec);
      continue;
    }
    plan.has_fours[i] =
        !plan.rows.empty() && !plan.few_boxes(static_cast<int64_t>(roi[0])) &&
        set_fours(roi_rows(roi, plan.spec), plan.spec.bins_down, plan.boxes(), &plan.rows[i]) &&
        set_fours(roi_columns(roi, plan.spec), plan.spec.bins_across, plan.boxes(),
                  &plan.columns[i]);
    if (!plan.has_fours[i]) plan.weights[i] = roi_weights(roi, plan.spec);
  }
}

template <class T, class A>
void ps_roi_align_forward(const PsRoiAlignPlan<A>& plan, const T* input, const MapStrides& strides,
                          A* pooled, int32_t* argmax, int64_t begin, int64_t end) {
  const RoiSpec& spec = plan.spec;
  const int64_t row_size = spec.width * kPsLanes, bins = plan.bins();
  const Scratch<A> map(spec.height * row_size);  // touched only where boxes are many
  MapStrides planes = strides;
  planes.channel *= bins;
  const bool gaps = strides.row != spec.width * strides.column;
  const int64_t rows_at_once = gaps ? 1 : spec.height;
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_of(plan, index);
    const int64_t first = plan.groups.begin[item.image], last = plan.groups.begin[item.image + 1];
    if (first == last) continue;
    const T* source = input + item.image * strides.image + channel_of(plan, item) * strides.channel;
    const bool few = plan.few_boxes(item.image);
    for (int64_t y = 0; y < spec.height && !few; y += rows_at_once) {
      pack_row<T, A, kPsLanes>(source + y * strides.row, planes, item.lanes,
                               rows_at_once * spec.width, map.get() + y * row_size);
    }
    const auto* rows = plan.rows.data() + item.row * plan.boxes();
    const auto* columns = plan.columns.data() + item.column * plan.boxes();
    A* to = pooled + pooled_offset(plan, index, first);
    for (int64_t i = first; i < last; ++i, to += kPsLanes) {
      if (plan.reduce_max) {
        alignas(64) LaneIndex<A> winner[kPsLanes];
        pool_max(map.get(), spec.width, plan.samples[i], item, to, winner);
        int32_t* target = argmax + output_offset(plan, i, item);
        for (int64_t c = 0; c < item.lanes; ++c) target[c * bins] = int32_t(winner[c]);
      } else if (few) {
        pool_planes(source, planes, plan.weights[i], item, to);
      } else if (plan.has_fours[i]) {
        pool_fours(map.get(), spec.width, rows[i], columns[i], to);
      } else {
        pool_mean(map.get(), spec.width, plan.weights[i], item, to);
      }
    }
  }
}

template <class T, class A>
void ps_roi_align_collect(const PsRoiAlignPlan<A>& plan, const A* pooled, T* output, int64_t begin,
                          int64_t end) {
  const int64_t bins = plan.bins(), block = plan.boxes() * kPsLanes;
  for (int64_t i = begin; i < end; ++i) {
    T* target = output + plan.groups.order[i] * plan.depth() * bins;
    for (int64_t d = 0; d < plan.depth(); d += kPsLanes) {
      to_planes<T, A>(pooled + i * kPsLanes + d / kPsLanes * block, plan.blocks() * block,
                      std::min<int64_t>(kPsLanes, plan.depth() - d), bins, target + d * bins, bins);
    }
  }
}

template <class T, class A>
void ps_roi_align_distribute(const PsRoiAlignPlan<A>& plan, const T* grad, A* shares, int64_t begin,
                             int64_t end) {
  const int64_t bins = plan.bins(), block = plan.boxes() * kPsLanes;
  for (int64_t i = begin; i < end; ++i) {
    const T* source = grad + plan.groups.order[i] * plan.depth() * bins;
    for (int64_t d = 0; d < plan.depth(); d += kPsLanes) {
      to_lanes<T, A, kPsLanes>(source + d * bins, bins,
                               std::min<int64_t>(kPsLanes, plan.depth() - d), bins,
                               shares + i * kPsLanes + d / kPsLanes * block, plan.blocks() * block);
    }
  }
}

template <class T, class A>
void ps_roi_align_backward(const PsRoiAlignPlan<A>& plan, const A* shares, const int32_t* argmax,
                           T* grad_input, int64_t begin, int64_t end) {
  const RoiSpec& spec = plan.spec;
  const int64_t plane = spec.height * spec.width, bins = plan.bins();
  const Scratch<A> map(plane * kPsLanes);
  for (int64_t index = begin; index < end; ++index) {
    const Item item = item_of(plan, index);
    T* target = grad_input + (item.image * spec.channels + channel_of(plan, item)) * plane;
    bool few = false;
    if constexpr (std::is_same_v<T, A>) few = plan.few_boxes(item.image);  // halves sum in float
    if (few) {
      for (int64_t c = 0; c < item.lanes; ++c) std::fill_n(target + c * bins * plane, plane, T(0));
    } else {
      std::fill_n(map.get(), plane * kPsLanes, A(0));
    }
    const auto* rows = plan.rows.data() + item.row * plan.boxes();
    const auto* columns = plan.columns.data() + item.column * plan.boxes();
    const int64_t first = plan.groups.begin[item.image], last = plan.groups.begin[item.image + 1];
    const A* share = shares + pooled_offset(plan, index, first);
    for (int64_t i = first; i < last; ++i, share += kPsLanes) {
      if (plan.reduce_max) {
        const int32_t* source = argmax + output_offset(plan, i, item);
        int32_t winner[kPsLanes];
        for (int64_t c = 0; c < item.lanes; ++c) winner[c] = source[c * bins];
        spread_max(share, winner, spec.width, plan.samples[i], item, map.get());
      } else if (few) {
        if constexpr (std::is_same_v<T, A>) {
          spread_planes(share, spec.width, bins * plane, plan.weights[i], item, target);
        }
      } else if (plan.has_fours[i]) {
        spread_fours(share, spec.width, rows[i], columns[i], map.get());
      } else {
        spread_mean(share, spec.width, plan.weights[i], item, map.get());
      }
    }
    if (few) continue;
    to_planes<T, A>(map.get(), kPsLanes, item.lanes, plane, target, bins * plane);
  }
}

#define DETKIT_INSTANTIATE(T, A)                                                                   \
  template void ps_roi_align_forward(const PsRoiAlignPlan<A>&, const T*, const MapStrides&, A*,    \
                                     int32_t*, int64_t, int64_t);                                  \
  template void ps_roi_align_collect(const PsRoiAlignPlan<A>&, const A*, T*, int64_t, int64_t);    \
  template void ps_roi_align_distribute(const PsRoiAlignPlan<A>&, const T*, A*, int64_t, int64_t); \
  template void ps_roi_align_backward(const PsRoiAlignPlan<A>&, const A*, const int32_t*, T*,      \
                                      int64_t, int64_t);
template struct PsRoiAlignPlan<float>;
template struct PsRoiAlignPlan<double>;
template void ps_roi_align_prepare(PsRoiAlignPlan<float>&, const float*, int64_t, int64_t);
template void ps_roi_align_prepare(PsRoiAlignPlan<double>&, const double*, int64_t, int64_t);
DETKIT_INSTANTIATE(float, float)
DETKIT_INSTANTIATE(double, double)
DETKIT_INSTANTIATE(Half, float)
DETKIT_INSTANTIATE(BFloat16, float)
#undef DETKIT_INSTANTIATE

}  // namespace detkit::cpu
