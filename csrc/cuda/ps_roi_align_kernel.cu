// A thread per output, columns of bins fastest.
#include "cuda/launch.cuh"
#include "cuda/ps_roi_align_kernel.h"
#include "cuda/roi_gather.cuh"
#include "cuda/roi_sample.cuh"

namespace detkit::cuda {
namespace {

// What output `index` of (R, D, P, Q) stands for; its input channel is index % channels.
struct Output {
  int64_t box, channel, row, column;
};

__device__ Output output_at(int64_t index, const RoiSpec& spec) {
  return {index / spec.channels, index % spec.channels, index / spec.bins_across % spec.bins_down,
          index % spec.bins_across};
}

template <class A>
__device__ int64_t plane_offset(const A* roi, const Output& at, const RoiSpec& spec) {
  const int64_t map = static_cast<int64_t>(roi[0]) * spec.channels + at.channel;
  return map * spec.height * spec.width;
}

template <class T, class A>
__global__ void forward_mean(RoiSpec spec, const T* __restrict__ input, const A* __restrict__ rois,
                             int64_t size, T* __restrict__ output) {
  DETKIT_GRID_STRIDE(index, size) {
    const Output at = output_at(index, spec);
    const A* roi = rois + at.box * 5;
    if (!roi_is_usable(roi, spec)) {
      store(output + index, not_a_number<A>());
      continue;
    }
    const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
    const T* plane = input + plane_offset(roi, at, spec);
    A sum = A(0);
    for_each_sample(rows, columns, at.row, at.column, [&](const Taps<A>& y, const Taps<A>& x) {
      sum += sample(plane, spec.width, y, x);
    });
    store(output + index, sum / roi_sample_count(rows, columns));
  }
}

template <class T, class A>
__global__ void backward_mean(RoiSpec spec, const T* __restrict__ grad, const A* __restrict__ rois,
                              int64_t size, A* __restrict__ grad_input) {
  DETKIT_GRID_STRIDE(index, size) {
    const Output at = output_at(index, spec);
    const A* roi = rois + at.box * 5;
    if (!roi_is_usable(roi, spec)) continue;
    const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
    A* plane = grad_input + plane_offset(roi, at, spec);
    const A share = widen(grad[index]) / roi_sample_count(rows, columns);
    for_each_sample(rows, columns, at.row, at.column, [&](const Taps<A>& y, const Taps<A>& x) {
      spread(plane, spec.width, 1, y, x, share);
    });
  }
}

// The first maximum of all samples, those off the map (0) too; a NaN sample wins.
template <class T, class A>
__global__ void forward_max(RoiSpec spec, const T* __restrict__ input, const A* __restrict__ rois,
                            int64_t size, T* __restrict__ output, int32_t* __restrict__ argmax) {
  DETKIT_GRID_STRIDE(index, size) {
    const Output at = output_at(index, spec);
    const A* roi = rois + at.box * 5;
    A best = -static_cast<A>(INFINITY);
    int32_t winner = 0;
    if (roi_is_usable(roi, spec)) {
      const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
      const T* plane = input + plane_offset(roi, at, spec);
      const A top = rows.bin_start(at.row), left = columns.bin_start(at.column);
      for (int64_t k = 0; k < rows.grid * columns.grid; ++k) {
        const A value = sample(plane, spec.width, rows.taps(top, k / columns.grid),
                               columns.taps(left, k % columns.grid));
        if (value > best || (value != value && best == best)) {
          best = value;
          winner = static_cast<int32_t>(k);
        }
      }
    } else {
      best = not_a_number<A>();
    }
    store(output + index, best);
    argmax[index] = winner;
  }
}

template <class T, class A>
__global__ void backward_max(RoiSpec spec, const T* __restrict__ grad,
                             const int32_t* __restrict__ argmax, const A* __restrict__ rois,
                             int64_t size, A* __restrict__ grad_input) {
  DETKIT_GRID_STRIDE(index, size) {
    const Output at = output_at(index, spec);
    const A* roi = rois + at.box * 5;
    if (!roi_is_usable(roi, spec)) continue;
    const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
    const Taps<A> y = rows.taps(rows.bin_start(at.row), argmax[index] / columns.grid);
    const Taps<A> x = columns.taps(columns.bin_start(at.column), argmax[index] % columns.grid);
    spread(grad_input + plane_offset(roi, at, spec), spec.width, 1, y, x, widen(grad[index]));
  }
}

}  // namespace

template <class T, class A>
void ps_roi_align_forward(const RoiSpec& spec, const T* input, const A* rois, int64_t count,
                          T* output, int32_t* argmax, cudaStream_t stream) {
  const int64_t size = count * spec.channels;
  if (size == 0) return;
  if (argmax != nullptr) {
    forward_max<<<blocks_for(size), kThreads, 0, stream>>>(spec, input, rois, size, output, argmax);
  } else {
    forward_mean<<<blocks_for(size), kThreads, 0, stream>>>(spec, input, rois, size, output);
  }
}

template <class T, class A>
void ps_roi_align_backward(const RoiSpec& spec, const T* grad, const int32_t* argmax, const A* rois,
                           int64_t count, A* grad_input, cudaStream_t stream) {
  const int64_t size = count * spec.channels;
  if (size == 0) return;
  if (argmax != nullptr) {
    backward_max<<<blocks_for(size), kThreads, 0, stream>>>(spec, grad, argmax, rois, size,
                                                            grad_input);
  } else {
    backward_mean<<<blocks_for(size), kThreads, 0, stream>>>(spec, grad, rois, size, grad_input);
  }
}

template <class T, class A>
void ps_roi_align_gather(const RoiSpec& spec, const T* grad, const int32_t* argmax, const A* rois,
                         int64_t count, T* grad_input, cudaStream_t stream) {
  const GatherShape shape{spec.channels / (spec.bins_down * spec.bins_across), true};
  const int64_t blocks = gather_blocks(spec, shape);
  if (blocks == 0) return;
  const unsigned grid = blocks_for(blocks, 1);
  if (argmax != nullptr) {
    gather_kernel<T, A, true>
        <<<grid, kThreads, 0, stream>>>(spec, shape, grad, argmax, rois, count, blocks, grad_input);
  } else {
    gather_kernel<T, A, false><<<grid, kThreads, 0, stream>>>(spec, shape, grad, nullptr, rois,
                                                              count, blocks, grad_input);
  }
}

#define DETKIT_INSTANTIATE(T, A)                                                                   \
  template void ps_roi_align_forward(const RoiSpec&, const T*, const A*, int64_t, T*, int32_t*,    \
                                     cudaStream_t);                                                \
  template void ps_roi_align_backward(const RoiSpec&, const T*, const int32_t*, const A*, int64_t, \
                                      A*, cudaStream_t);                                           \
  template void ps_roi_align_gather(const RoiSpec&, const T*, const int32_t*, const A*, int64_t,   \
                                    T*, cudaStream_t);
DETKIT_INSTANTIATE(float, float)
DETKIT_INSTANTIATE(double, double)
DETKIT_INSTANTIATE(__half, float)
DETKIT_INSTANTIATE(__nv_bfloat16, float)
#undef DETKIT_INSTANTIATE

}  // namespace detkit::cuda
