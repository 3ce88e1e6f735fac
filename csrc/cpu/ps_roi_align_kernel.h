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

// What forward and backward share. Output channel d at bin b reads channel d * bins() + b.
template <class A>
struct PsRoiAlignPlan {
  RoiSpec spec;
  bool reduce_max;
  RoiGroups groups;
  std::vector<RoiWeights<A>> weights;  // one per box, for the mean
  std::vector<RoiSamples<A>> samples;  // one per box, for the maximum

  int64_t bins() const { return spec.bins_down * spec.bins_across; }
  int64_t depth() const { return spec.channels / bins(); }
  int64_t blocks() const { return (depth() + kPsLanes - 1) / kPsLanes; }
  int64_t work() const { return spec.batch * bins() * blocks(); }
};

// Weights or samples of boxes [begin, end); the plan's vectors have been sized.
template <class A>
void ps_roi_align_prepare(PsRoiAlignPlan<A>& plan, const A* rois, int64_t begin, int64_t end);

// Output (R, D, P, Q) of work items [begin, end), and for the maximum the winning sample of each,
// row-major in the bin's grid.
template <class T, class A>
void ps_roi_align_forward(const PsRoiAlignPlan<A>& plan, const T* input, const MapStrides& strides,
                          T* output, int32_t* argmax, int64_t begin, int64_t end);

// Input gradient (N, D*P*Q, H, W), all of it, of work items [begin, end).
template <class T, class A>
void ps_roi_align_backward(const PsRoiAlignPlan<A>& plan, const T* grad, const int32_t* argmax,
                           T* grad_input, int64_t begin, int64_t end);

}  // namespace detkit::cpu
