#include "cpu/roi_align_kernel.h"

#include <algorithm>

#include "common/macros.h"
#include "common/simd.h"
#include "cpu/channel_blocks.h"
#include "cpu/half.h"

namespace detkit::cpu {
namespace {

// A block of channels of one image, and what the pooling of its boxes needs to find.
struct Block {
  int64_t image, channel, lanes;  // lanes in use; the last block may be narrow
};

template <class A>
Block block_of(const RoiAlignPlan<A>& plan, int64_t item) {
  const int64_t channel = item % plan.blocks() * plan.lanes;
  return {item / plan.blocks(), channel, std::min(plan.lanes, plan.spec.channels - channel)};
}

// Columns [begin, end) of a map row.
struct Span {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// For each map row the columns that the image's boxes read: the others need no copy.
template <class A>
std::vector<Span> spans_in_use(const RoiAlignPlan<A>& plan, int64_t image) {
  std::vector<Span> spans(plan.spec.height, {plan.spec.width, plan.spec.width});
  for (int64_t i = plan.groups.begin[image]; i < plan.groups.begin[image + 1]; ++i) {
    const RoiWeights<A>& box = plan.weights[plan.groups.order[i]];
    int64_t begin = plan.spec.width, end = 0;
    for (const auto& column : box.columns.entries) {
      begin = std::min(begin, column.index);
      end = std::max(end, column.index + 1);
    }
    if (begin >= end) continue;
    for (const auto& row : box.rows.entries) {
      Span& span = spans[row.index];
      span = {std::min(span.begin, begin), span.size() == 0 ? end : std::max(span.end, end)};
    }
  }
  return spans;
}

// All bins of one box from the block's map (H, W, B) to `pooled`, (P*Q, B).
template <class A, int B>
DETKIT_CLONES void pool_box(const A* map, int64_t width, const RoiWeights<A>& box, int64_t down,
                            int64_t across, A* pooled) {
  using V = typename Vector<A>::type;
  constexpr int kVectors = B / Vector<A>::lanes;
  for (int64_t i = 0; i < down; ++i) {
    for (int64_t j = 0; j < across; ++j, pooled += B) {
      V sum[kVectors] = {};
      for (const auto* y = box.rows.first(i); y != box.rows.last(i); ++y) {
        const A* row = map + y->index * width * B;
        for (const auto* x = box.columns.first(j); x != box.columns.last(j); ++x) {
          const auto* pixel = reinterpret_cast<const V*>(row + x->index * B);
          const A weight = y->weight * x->weight;
          for (int v = 0; v < kVectors; ++v) sum[v] += weight * pixel[v];
        }
      }
      for (int v = 0; v < kVectors; ++v) reinterpret_cast<V*>(pooled)[v] = sum[v] / box.count;
    }
  }
}

// The adjoint of pool_box: adds `grad`, (P*Q, B), to the block's map.
template <class A, int B>
DETKIT_CLONES void spread_box(const A* grad, int64_t width, const RoiWeights<A>& box, int64_t down,
                              int64_t across, A* map) {
  using V = typename Vector<A>::type;
  constexpr int kVectors = B / Vector<A>::lanes;
  for (int64_t i = 0; i < down; ++i) {
    for (int64_t j = 0; j < across; ++j, grad += B) {
      V share[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        share[v] = reinterpret_cast<const V*>(grad)[v] / box.count;
      }
      for (const auto* y = box.rows.first(i); y != box.rows.last(i); ++y) {
        A* row = map + y->index * width * B;
        for (const auto* x = box.columns.first(j); x != box.columns.last(j); ++x) {
          auto* pixel = reinterpret_cast<V*>(row + x->index * B);
          const A weight = y->weight * x->weight;
          for (int v = 0; v < kVectors; ++v) pixel[v] += weight * share[v];
        }
      }
    }
  }
}

template <class T, class A, int B>
void forward_blocks(const RoiAlignPlan<A>& plan, const T* input, const MapStrides& strides,
                    T* output, int64_t begin, int64_t end) {
  const RoiSpec& spec = plan.spec;
  const int64_t bins = spec.bins_down * spec.bins_across, row_size = spec.width * B;
  const Scratch<A> map(spec.height * row_size), pooled(bins * B);
  for (int64_t item = begin; item < end; ++item) {
    const Block block = block_of(plan, item);
    const T* source = input + block.image * strides.image + block.channel * strides.channel;
    const std::vector<Span> spans = spans_in_use(plan, block.image);
    for (int64_t y = 0; y < spec.height; ++y) {
      const int64_t first = spans[y].begin;
      pack_row<T, A, B>(source + y * strides.row + first * strides.column, strides, block.lanes,
                        spans[y].size(), map.get() + y * row_size + first * B);
    }
    for (int64_t i = plan.groups.begin[block.image]; i < plan.groups.begin[block.image + 1]; ++i) {
      const int64_t r = plan.groups.order[i];
      pool_box<A, B>(map.get(), spec.width, plan.weights[r], spec.bins_down, spec.bins_across,
                     pooled.get());
      to_planes<T, A>(pooled.get(), B, block.lanes, bins,
                      output + (r * spec.channels + block.channel) * bins, bins);
    }
  }
}

template <class T, class A, int B>
void backward_blocks(const RoiAlignPlan<A>& plan, const T* grad, T* grad_input, int64_t begin,
                     int64_t end) {
  const RoiSpec& spec = plan.spec;
  const int64_t bins = spec.bins_down * spec.bins_across, row_size = spec.width * B;
  const int64_t plane = spec.height * spec.width;
  const Scratch<A> map(spec.height * row_size), shares(bins * B);
  for (int64_t item = begin; item < end; ++item) {
    const Block block = block_of(plan, item);
    const std::vector<Span> spans = spans_in_use(plan, block.image);
    for (int64_t y = 0; y < spec.height; ++y) {
      std::fill_n(map.get() + y * row_size + spans[y].begin * B, spans[y].size() * B, A(0));
    }
    for (int64_t i = plan.groups.begin[block.image]; i < plan.groups.begin[block.image + 1]; ++i) {
      const int64_t r = plan.groups.order[i];
      to_lanes<T, A, B>(grad + (r * spec.channels + block.channel) * bins, bins, block.lanes, bins,
                        shares.get());
      spread_box<A, B>(shares.get(), spec.width, plan.weights[r], spec.bins_down, spec.bins_across,
                       map.get());
    }
    T* target = grad_input + (block.image * spec.channels + block.channel) * plane;
    for (int64_t y = 0; y < spec.height; ++y) {
      const Span span = spans[y];
      T* row = target + y * spec.width;
      to_planes<T, A>(map.get() + y * row_size + span.begin * B, B, block.lanes, span.size(),
                      row + span.begin, plane);
      for (int64_t c = 0; c < block.lanes; ++c) {
        std::fill(row + c * plane, row + c * plane + span.begin, T(0));
        std::fill(row + c * plane + span.end, row + c * plane + spec.width, T(0));
      }
    }
  }
}

}  // namespace

int64_t roi_align_lanes(const RoiSpec& spec, int64_t threads) {
  for (int64_t lanes = 64; lanes > 16; lanes /= 2) {
    const int64_t blocks = (spec.channels + lanes - 1) / lanes;
    if (2 * spec.channels > lanes && spec.batch * blocks >= threads) return lanes;
  }
  return 16;
}

template <class A>
void roi_align_prepare(RoiAlignPlan<A>& plan, const A* rois, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    if (roi_is_usable(rois + r * 5, plan.spec)) {
      plan.weights[r] = roi_weights(rois + r * 5, plan.spec);
    }
  }
}

template <class T, class A>
void roi_align_forward(const RoiAlignPlan<A>& plan, const T* input, const MapStrides& strides,
                       T* output, int64_t begin, int64_t end) {
  const auto run = plan.lanes == 64   ? forward_blocks<T, A, 64>
                   : plan.lanes == 32 ? forward_blocks<T, A, 32>
                                      : forward_blocks<T, A, 16>;
  run(plan, input, strides, output, begin, end);
}

template <class T, class A>
void roi_align_backward(const RoiAlignPlan<A>& plan, const T* grad, T* grad_input, int64_t begin,
                        int64_t end) {
  const auto run = plan.lanes == 64   ? backward_blocks<T, A, 64>
                   : plan.lanes == 32 ? backward_blocks<T, A, 32>
                                      : backward_blocks<T, A, 16>;
  run(plan, grad, grad_input, begin, end);
}

#define DETKIT_INSTANTIATE(T, A)                                                           \
  template void roi_align_forward(const RoiAlignPlan<A>&, const T*, const MapStrides&, T*, \
                                  int64_t, int64_t);                                       \
  template void roi_align_backward(const RoiAlignPlan<A>&, const T*, T*, int64_t, int64_t);
template void roi_align_prepare(RoiAlignPlan<float>&, const float*, int64_t, int64_t);
template void roi_align_prepare(RoiAlignPlan<double>&, const double*, int64_t, int64_t);
DETKIT_INSTANTIATE(float, float)
DETKIT_INSTANTIATE(double, double)
DETKIT_INSTANTIATE(Half, float)
DETKIT_INSTANTIATE(BFloat16, float)
#undef DETKIT_INSTANTIATE

}  // namespace detkit::cpu
