// RoIAlign on the CPU, raw pointers. Work is cut into blocks of channels of one image: a block is
// copied to (H, W, lanes), then every box of the image pools from it. A block is one thread's, so
// the backward needs no atomics and results do not depend on the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "common/roi.h"
#include "cpu/channel_blocks.h"
#include "cpu/roi_weights.h"

namespace detkit::cpu {

// What forward and backward share.
template <class A>
struct RoiAlignPlan {
  RoiSpec spec;
  RoiGroups groups;
  std::vector<RoiWeights<A>> weights;  // one per box; empty for the unusable
  int64_t lanes;                       // channels of a block

  int64_t blocks() const { return (spec.channels + lanes - 1) / lanes; }
  int64_t work() const { return spec.batch * blocks(); }
};

// Channels of a block: 64, or fewer where that leaves threads without work.
int64_t roi_align_lanes(const RoiSpec& spec, int64_t threads);

// Weights of boxes [begin, end); `plan.weights` has been sized.
template <class A>
void roi_align_prepare(RoiAlignPlan<A>& plan, const A* rois, int64_t begin, int64_t end);

// Output (R, C, P, Q) of work items [begin, end).
template <class T, class A>
void roi_align_forward(const RoiAlignPlan<A>& plan, const T* input, const MapStrides& strides,
                       T* output, int64_t begin, int64_t end);

// Input gradient (N, C, H, W), all of it, of work items [begin, end). `grad` is (R, C, P, Q).
template <class T, class A>
void roi_align_backward(const RoiAlignPlan<A>& plan, const T* grad, T* grad_input, int64_t begin,
                        int64_t end);

}  // namespace detkit::cpu
