// RoIAlign on raw device pointers; no torch. Enqueued on the stream; the caller checks
// cudaGetLastError.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/roi.h"

namespace detkit::cuda {

// Output (R, C, P, Q) from input (N, C, H, W), both contiguous.
template <class T, class A>
void roi_align_forward(const RoiSpec& spec, const T* input, const A* rois, int64_t count, T* output,
                       cudaStream_t stream);

// The same from input (N, H, W, C).
template <class T, class A>
void roi_align_forward_side_by_side(const RoiSpec& spec, const T* input, const A* rois,
                                    int64_t count, T* output, cudaStream_t stream);

// Writes grad_input (N, C, H, W), each sum in a fixed order. grad is (R, P, Q, C).
template <class T, class A>
void roi_align_gather(const RoiSpec& spec, const T* grad, const A* rois, int64_t count,
                      T* grad_input, cudaStream_t stream);

// Adds to grad_input (N, H, W, C), which the caller has zeroed, by atomics. grad is (R, P, Q, C).
template <class T, class A>
void roi_align_backward(const RoiSpec& spec, const T* grad, const A* rois, int64_t count,
                        A* grad_input, cudaStream_t stream);

}  // namespace detkit::cuda
