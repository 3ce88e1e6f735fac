// Planes: a thread per output, columns of bins fastest, so that neighbours write side by side and
// read near each other. Channels side by side: a block per box, channels and bins, which neighbours
// read along the channels and write along the bins.
#include "cuda/launch.cuh"
#include "cuda/roi_align_kernel.h"
#include "cuda/roi_gather.cuh"
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

constexpr int kPacks = 16;    // neighbouring loads of one tap
constexpr int kBinTile = 64;  // bins of a block

// V channels a load. The pooled numbers wait in shared memory, to be written along the bins.
template <class T, class A, int V>
__global__ void __launch_bounds__(kThreads)
    forward_side_by_side(const RoiSpec spec, const T* __restrict__ input,
                         const A* __restrict__ rois, int64_t blocks, T* __restrict__ output) {
  constexpr int kChannels = kPacks * V;
  __shared__ A pooled[kChannels][kBinTile + 1];
  const int64_t bins = spec.bins_down * spec.bins_across;
  const int64_t chunks = (spec.channels + kChannels - 1) / kChannels;
  const int64_t tiles = (bins + kBinTile - 1) / kBinTile;
  const int pack = threadIdx.x % kPacks;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t first_bin = block % tiles * kBinTile, box = block / tiles / chunks;
    const int64_t first_channel = block / tiles % chunks * kChannels;
    const int64_t left_bins = bins - first_bin, left_channels = spec.channels - first_channel;
    const int own_bins = left_bins < kBinTile ? static_cast<int>(left_bins) : kBinTile;
    const int own_channels =
        left_channels < kChannels ? static_cast<int>(left_channels) : kChannels;
    const A* roi = rois + box * 5;
    const bool usable = roi_is_usable(roi, spec);
    if (pack * V < own_channels) {
      const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
      const int64_t image = usable ? static_cast<int64_t>(roi[0]) : 0;
      const T* map =
          input + image * spec.height * spec.width * spec.channels + first_channel + pack * V;
      for (int b = threadIdx.x / kPacks; b < own_bins; b += kThreads / kPacks) {
        const int64_t bin = first_bin + b;
        A sums[V] = {};
        if (usable) {
          for_each_sample(rows, columns, bin / spec.bins_across, bin % spec.bins_across,
                          [&](const Taps<A>& y, const Taps<A>& x) {
                            add_sample<T, A, V>(map, spec.width, spec.channels, y, x, sums);
                          });
        }
        const A samples = usable ? roi_sample_count(rows, columns) : not_a_number<A>();
        for (int v = 0; v < V; ++v) pooled[pack * V + v][b] = sums[v] / samples;
      }
    }
    __syncthreads();  // all numbers stand
    T* to = output + (box * spec.channels + first_channel) * bins + first_bin;
    for (int i = threadIdx.x; i < own_channels * own_bins; i += kThreads) {
      store(to + i / own_bins * bins + i % own_bins, pooled[i / own_bins][i % own_bins]);
    }
    __syncthreads();  // they have been read before the next block of this loop writes others
  }
}

// grad is (R, P, Q, C) and grad_input (N, H, W, C): neighbouring threads add side by side.
template <class T, class A>
__global__ void backward(RoiSpec spec, const T* __restrict__ grad, const A* __restrict__ rois,
                         int64_t size, A* __restrict__ grad_input) {
  DETKIT_GRID_STRIDE(index, size) {
    const int64_t channel = index % spec.channels, bin = index / spec.channels;
    const int64_t row = bin / spec.bins_across % spec.bins_down;
    const A* roi = rois + bin / spec.bins_across / spec.bins_down * 5;
    if (!roi_is_usable(roi, spec)) continue;
    const RoiAxis<A> rows = roi_rows(roi, spec), columns = roi_columns(roi, spec);
    const int64_t image = static_cast<int64_t>(roi[0]);
    A* map = grad_input + image * spec.height * spec.width * spec.channels + channel;
    const A share = widen(grad[index]) / roi_sample_count(rows, columns);
    for_each_sample(rows, columns, row, bin % spec.bins_across,
                    [&](const Taps<A>& y, const Taps<A>& x) {
                      spread(map, spec.width, spec.channels, y, x, share);
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

template <class T, class A>
void roi_align_forward_side_by_side(const RoiSpec& spec, const T* input, const A* rois,
                                    int64_t count, T* output, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(T);
  const bool packs = spec.channels % width == 0 &&
                     reinterpret_cast<uintptr_t>(input) % sizeof(Pack<T, width>) == 0;
  const int64_t bins = spec.bins_down * spec.bins_across;
  const int64_t channels = packs ? kPacks * width : kPacks;
  const int64_t blocks =
      count * ((spec.channels + channels - 1) / channels) * ((bins + kBinTile - 1) / kBinTile);
  if (blocks == 0) return;
  if (packs) {
    forward_side_by_side<T, A, width>
        <<<blocks_for(blocks, 1), kThreads, 0, stream>>>(spec, input, rois, blocks, output);
  } else {
    forward_side_by_side<T, A, 1>
        <<<blocks_for(blocks, 1), kThreads, 0, stream>>>(spec, input, rois, blocks, output);
  }
}

template <class T, class A>
void roi_align_gather(const RoiSpec& spec, const T* grad, const A* rois, int64_t count,
                      T* grad_input, cudaStream_t stream) {
  const GatherShape shape{spec.channels, false};
  const int64_t blocks = gather_blocks(spec, shape);
  if (blocks == 0) return;
  gather_kernel<T, A, false><<<blocks_for(blocks, 1), kThreads, 0, stream>>>(
      spec, shape, grad, nullptr, rois, count, blocks, grad_input);
}

#define DETKIT_INSTANTIATE(T, A)                                                                  \
  template void roi_align_forward(const RoiSpec&, const T*, const A*, int64_t, T*, cudaStream_t); \
  template void roi_align_forward_side_by_side(const RoiSpec&, const T*, const A*, int64_t, T*,   \
                                               cudaStream_t);                                     \
  template void roi_align_gather(const RoiSpec&, const T*, const A*, int64_t, T*, cudaStream_t);  \
  template void roi_align_backward(const RoiSpec&, const T*, const A*, int64_t, A*, cudaStream_t);
DETKIT_INSTANTIATE(float, float)
DETKIT_INSTANTIATE(double, double)
DETKIT_INSTANTIATE(__half, float)
DETKIT_INSTANTIATE(__nv_bfloat16, float)
#undef DETKIT_INSTANTIATE

}  // namespace detkit::cuda
