// A thread per output, columns of bins fastest: neighbours write side by side and read near each
// other.
#include "cuda/launch.cuh"
#include "cuda/roi_align_kernel.h"
#include "cuda/roi_sample.cuh"

namespace detkit::cuda {
namespace {

// What output `index` of (R, C, P, Q) stands for.
struct Output {
  int64_t box, channel, row, column;
};

__device__ Output output_at(int64_t index, const RoiSpec& spec) {
  const int64_t bin = index / spec.bins_across, map = bin / spec.bins_down;
  return {map / spec.channels, map % spec.channels, bin % spec.bins_down, index % spec.bins_across};
}

template <class T, class A>
__global__ void forward(RoiSpec spec, const T* __restrict__ input, const A* __restrict__ rois,
                        int64_t size, T* __restrict__ output) {
  DETKIT_GRID_STRIDE(index, size) {
    const Output at = output_at(index, spec);
    const A* roi = rois + at.box * 5;
    if (!roi_is_usable(roi, spec)) {
      store(output + index, not_a_number<A>());
      continue;
    }
    const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
    const int64_t map = static_cast<int64_t>(roi[0]) * spec.channels + at.channel;
    const T* plane = input + map * spec.height * spec.width;
    A sum = A(0);
    for_each_sample(rows, columns, at.row, at.column, [&](const Taps<A>& y, const Taps<A>& x) {
      sum += sample(plane, spec.width, y, x);
    });
    store(output + index, sum / roi_sample_count(rows, columns));
  }
}

template <class T, class A>
__global__ void backward(RoiSpec spec, const T* __restrict__ grad, const A* __restrict__ rois,
                         int64_t size, A* __restrict__ grad_input) {
  DETKIT_GRID_STRIDE(index, size) {
    const Output at = output_at(index, spec);
    const A* roi = rois + at.box * 5;
    if (!roi_is_usable(roi, spec)) continue;
    const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
    const int64_t map = static_cast<int64_t>(roi[0]) * spec.channels + at.channel;
    A* plane = grad_input + map * spec.height * spec.width;
    const A share = widen(grad[index]) / roi_sample_count(rows, columns);
    for_each_sample(rows, columns, at.row, at.column, [&](const Taps<A>& y, const Taps<A>& x) {
      spread(plane, spec.width, y, x, share);
    });
  }
}

}  // namespace

template <class T, class A>
void roi_align_forward(const RoiSpec& spec, const T* input, const A* rois, int64_t count, T* output,
                       cudaStream_t stream) {
  const int64_t size = count * spec.channels * spec.bins_down * spec.bins_across;
  if (size == 0) return;
  forward<<<blocks_for(size), kThreads, 0, stream>>>(spec, input, rois, size, output);
}

template <class T, class A>
void roi_align_backward(const RoiSpec& spec, const T* grad, const A* rois, int64_t count,
                        A* grad_input, cudaStream_t stream) {
  const int64_t size = count * spec.channels * spec.bins_down * spec.bins_across;
  if (size == 0) return;
  backward<<<blocks_for(size), kThreads, 0, stream>>>(spec, grad, rois, size, grad_input);
}

#define DETKIT_INSTANTIATE(T, A)                                                                  \
  template void roi_align_forward(const RoiSpec&, const T*, const A*, int64_t, T*, cudaStream_t); \
  template void roi_align_backward(const RoiSpec&, const T*, const A*, int64_t, A*, cudaStream_t);
DETKIT_INSTANTIATE(float, float)
DETKIT_INSTANTIATE(double, double)
DETKIT_INSTANTIATE(__half, float)
DETKIT_INSTANTIATE(__nv_bfloat16, float)
#undef DETKIT_INSTANTIATE

}  // namespace detkit::cuda
