// PS-RoIAlign on raw device pointers; no torch. Enqueued on the stream; the caller checks
// cudaGetLastError.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/roi.h"

namespace detkit::cuda {

// Output (R, D, P, Q) from input (N, D*P*Q, H, W), both contiguous. `argmax` gets the winning
// sample of each output, row-major in the bin's grid; null for the mean.
template <class T, class A>
void ps_roi_align_forward(const RoiSpec& spec, const T* input, const A* rois, int64_t count,
                          T* output, int32_t* argmax, cudaStream_t stream);

// Adds to grad_input (N, D*P*Q, H, W), which the caller has zeroed, by atomics.
template <class T, class A>
void ps_roi_align_backward(const RoiSpec& spec, const T* grad, const int32_t* argmax, const A* rois,
                           int64_t count, A* grad_input, cudaStream_t stream);

// Writes grad_input, each sum in a fixed order. grad and argmax are (R, P, Q, D).
template <class T, class A>
void ps_roi_align_gather(const RoiSpec& spec, const T* grad, const int32_t* argmax, const A* rois,
                         int64_t count, T* grad_input, cudaStream_t stream);

}  // namespace detkit::cuda
