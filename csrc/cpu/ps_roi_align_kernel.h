// PS-RoIAlign on the CPU, raw pointers. A bin reads channels of its own, so work is cut into bins
// of one image: the bin's planes are copied to (H, W, lanes), then every box pools that bin. A
// bin's planes are one thread's: no atomics, and results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "common/roi.h"
#include "cpu/channel_blocks.h"
#include "cpu/roi_weights.h"

namespace detkit::cpu {

constexpr int kPsLanes = 16;  // output channels pooled together

// What a bin of two samples along one axis reads: always four map rows (or columns), so that code
// over them needs no branches, whose outcome a processor could not foresee.
template <class A>
struct FourTaps {
  int32_t index[4];
  A weight[4];
};

// What forward and backward share. Output channel d at bin b reads channel d * bins() + b. Boxes
// are numbered in the order of the groups, in which they are visited.
template <class A>
struct PsRoiAlignPlan {
  RoiSpec spec;
  bool reduce_max;
  RoiGroups groups;
  std::vector<RoiWeights<A>> weights;  // one per box, for the mean
  std::vector<RoiSamples<A>> samples;  // one per box, for the maximum
  // In place of the weights of boxes whose bins are 2 x 2 samples, all on the map, where boxes are
  // many: (bins_down, boxes) and (bins_across, boxes).
  std::vector<uint8_t> has_fours;
  std::vector<FourTaps<A>> rows, columns;

  PsRoiAlignPlan(const RoiSpec& spec, bool reduce_max, const A* rois, int64_t count);

  int64_t bins() const { return spec.bins_down * spec.bins_across; }
  int64_t depth() const { return spec.channels / bins(); }
  int64_t blocks() const { return (depth() + kPsLanes - 1) / kPsLanes; }
  int64_t work() const { return spec.batch * bins() * blocks(); }
  int64_t boxes() const { return static_cast<int64_t>(groups.order.size()); }
  // Size of outputs or their gradients as the kernels have them: (bins, blocks, boxes, lanes), so
  // that a work item finds its own behind each other.
  int64_t pooled_size() const { return bins() * blocks() * boxes() * kPsLanes; }
  // Whether so few boxes read an image's map that it is not worth a copy.
  bool few_boxes(int64_t image) const;
};

// Weights or samples of boxes [begin, end).
template <class A>
void ps_roi_align_prepare(PsRoiAlignPlan<A>& plan, const A* rois, int64_t begin, int64_t end);

// Pools work items [begin, end). For the maximum the winning sample of each goes to `argmax`
// (R, D, P, Q), row-major in the bin's grid.
template <class T, class A>
void ps_roi_align_forward(const PsRoiAlignPlan<A>& plan, const T* input, const MapStrides& strides,
                          A* pooled, int32_t* argmax, int64_t begin, int64_t end);

// Output (R, D, P, Q) of boxes [begin, end), when all work is done.
template <class T, class A>
void ps_roi_align_collect(const PsRoiAlignPlan<A>& plan, const A* pooled, T* output, int64_t begin,
                          int64_t end);

// The adjoint of collect. `grad` is (R, D, P, Q).
template <class T, class A>
void ps_roi_align_distribute(const PsRoiAlignPlan<A>& plan, const T* grad, A* shares, int64_t begin,
                             int64_t end);

// Input gradient (N, D*P*Q, H, W), all of it, of work items [begin, end).
template <class T, class A>
void ps_roi_align_backward(const PsRoiAlignPlan<A>& plan, const A* shares, const int32_t* argmax,
                           T* grad_input, int64_t begin, int64_t end);

}  // namespace detkit::cpu
