#include "cuda/launch.cuh"
#include "cuda/tap_conv_kernel.h"

namespace detkit::cuda {
namespace {

// Channels per 16-byte load, where every pack of every group and pixel is aligned to it.
template <typename T>
bool packs(const TapPlan<compute_t<T>>& plan, const T* input, const T* columns) {
  constexpr int64_t width = 16 / sizeof(T);
  const bool aligned = reinterpret_cast<uintptr_t>(input) % 16 == 0 &&
                       reinterpret_cast<uintptr_t>(columns) % 16 == 0;
  return aligned && plan.channels % width == 0 && plan.in_begin % width == 0 &&
         plan.group_in % width == 0;
}

template <typename T, int V>
__global__ void sample_kernel(const TapPlan<compute_t<T>> plan, const Chunk chunk,
                              const T* __restrict__ input, T* __restrict__ columns) {
  using A = compute_t<T>;
  const int64_t packs = plan.group_in / V, kernel = plan.kernel(), span = chunk.last - chunk.first;
  const int64_t total = plan.groups * chunk.size() * kernel * packs;
  DETKIT_GRID_STRIDE(index, total) {  // as the columns lie: group, output, tap, channel
    const int64_t channel = index % packs * V, tap = index / packs % kernel;
    const int64_t pixel = index / packs / kernel % chunk.size();
    const int64_t group = index / packs / kernel / chunk.size();
    const int64_t sample = chunk.sample + pixel / span, output = chunk.first + pixel % span;
    const T* image = input + sample * plan.height * plan.width * plan.channels + plan.in_begin +
                     group * plan.group_in + channel;
    const Tap<A> row = plan.row(sample, tap / plan.kernel_w);
    const Tap<A> col = plan.col(sample, tap % plan.kernel_w);
    Corners<A> corners[V];
    load_corners<T, V>(plan, image, row, col, output / plan.out_width, output % plan.out_width,
                       false, corners);
    Pack<T, V> out;
    for (int v = 0; v < V; ++v) out.value[v] = Cell<T>::store(sampled(row, col, corners[v]));
    *reinterpret_cast<Pack<T, V>*>(columns + index * V) = out;
  }
}

template <typename T, int V>
__global__ void gather_kernel(const TapPlan<compute_t<T>> plan, const Chunk chunk,
                              const T* __restrict__ columns, compute_t<T>* __restrict__ grad) {
  using A = compute_t<T>;
  const int64_t packs = plan.group_in / V, span = chunk.last - chunk.first;
  const int64_t per_sample = plan.height * plan.width * plan.groups * packs;
  const int64_t step = plan.kernel() * plan.group_in;
  DETKIT_GRID_STRIDE(index, chunk.samples * per_sample) {
    const int64_t channel = index % packs * V, group = index / packs % plan.groups;
    const int64_t position = index / packs / plan.groups % (plan.height * plan.width);
    const int64_t nth = index / per_sample, sample = chunk.sample + nth;
    const T* from = columns + (group * chunk.size() + nth * span) * step + channel;
    A sum[V] = {};
    gather_input<T, V>(plan, sample, position / plan.width, position % plan.width, chunk.first,
                       chunk.last, from, step, plan.group_in, sum);
    A* to = grad + (sample * plan.height * plan.width + position) * plan.channels + plan.in_begin +
            group * plan.group_in + channel;
    for (int v = 0; v < V; ++v) to[v] += sum[v];
  }
}

// One block per kScalePixels outputs of a sample: threads share its columns, then add up in a tree.
template <typename T, int V>
__global__ void scale_kernel(const TapPlan<compute_t<T>> plan, const Chunk chunk,
                             const T* __restrict__ input, const T* __restrict__ columns,
                             int64_t blocks_per_sample, compute_t<T>* __restrict__ partials) {
  using A = compute_t<T>;
  const int64_t packs = plan.group_in / V, kernel = plan.kernel(), span = chunk.last - chunk.first;
  const int64_t chunk_blocks = (span + kScalePixels - 1) / kScalePixels;
  for (int64_t block = blockIdx.x; block < chunk.samples * chunk_blocks; block += gridDim.x) {
    const int64_t nth = block / chunk_blocks, sample = chunk.sample + nth;
    const int64_t begin = block % chunk_blocks * kScalePixels;
    const int64_t count = span - begin < kScalePixels ? span - begin : kScalePixels;
    A sum_h = 0, sum_w = 0;
    for (int64_t index = threadIdx.x; index < plan.groups * count * kernel * packs;
         index += blockDim.x) {
      const int64_t channel = index % packs * V, tap = index / packs % kernel;
      const int64_t pixel = begin + index / packs / kernel % count;
      const int64_t group = index / packs / kernel / count, output = chunk.first + pixel;
      const T* image = input + sample * plan.height * plan.width * plan.channels + plan.in_begin +
                       group * plan.group_in + channel;
      const Tap<A> row = plan.row(sample, tap / plan.kernel_w);
      const Tap<A> col = plan.col(sample, tap % plan.kernel_w);
      Corners<A> corners[V];
      load_corners<T, V>(plan, image, row, col, output / plan.out_width, output % plan.out_width,
                         true, corners);
      const int64_t at = (group * chunk.size() + nth * span + pixel) * kernel + tap;
      const auto g = *reinterpret_cast<const Pack<T, V>*>(columns + at * plan.group_in + channel);
      for (int v = 0; v < V; ++v) {
        const ScaleTerms<A> terms = scale_terms(row, col, corners[v], Cell<T>::load(g.value[v]));
        sum_h += terms.h;
        sum_w += terms.w;
      }
    }
    __shared__ A shared_h[kThreads], shared_w[kThreads];
    shared_h[threadIdx.x] = sum_h;
    shared_w[threadIdx.x] = sum_w;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (threadIdx.x < half) {
        shared_h[threadIdx.x] += shared_h[threadIdx.x + half];
        shared_w[threadIdx.x] += shared_w[threadIdx.x + half];
      }
      __syncthreads();
    }
    if (threadIdx.x == 0) {
      const int64_t slot =
          sample * blocks_per_sample + chunk.first / kScalePixels + block % chunk_blocks;
      partials[2 * slot] = shared_h[0];
      partials[2 * slot + 1] = shared_w[0];
    }
    __syncthreads();  // before the next block of this loop writes the shared sums
  }
}

template <typename T>
__global__ void finish_kernel(const T* __restrict__ bias, bool relu, T* __restrict__ output,
                              int64_t pixels, int64_t outputs, int64_t begin, int64_t size) {
  using A = compute_t<T>;
  DETKIT_GRID_STRIDE(index, pixels * size) {
    const int64_t channel = index % size;
    T& to = output[index / size * outputs + begin + channel];
    const A sum = Cell<T>::load(to) + (bias ? Cell<T>::load(bias[channel]) : A(0));
    to = Cell<T>::store(relu ? rectified(sum) : sum);
  }
}

template <typename T>
__global__ void accumulate_kernel(const T* __restrict__ from, compute_t<T>* __restrict__ sum,
                                  int64_t size) {
  DETKIT_GRID_STRIDE(index, size) { sum[index] += Cell<T>::load(from[index]); }
}

}  // namespace

template <typename T>
void sample_columns(const TapPlan<compute_t<T>>& plan, Chunk chunk, const T* input, T* columns,
                    cudaStream_t stream) {
  constexpr int width = 16 / sizeof(T);
  const int64_t total = plan.groups * chunk.size() * plan.kernel() * plan.group_in;
  if (packs<T>(plan, input, columns)) {
    sample_kernel<T, width>
        <<<blocks_for(total / width), kThreads, 0, stream>>>(plan, chunk, input, columns);
  } else {
    sample_kernel<T, 1><<<blocks_for(total), kThreads, 0, stream>>>(plan, chunk, input, columns);
  }
}

template <typename T>
void gather_columns(const TapPlan<compute_t<T>>& plan, Chunk chunk, const T* columns,
                    compute_t<T>* grad_input, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(T);
  const int64_t total = chunk.samples * plan.height * plan.width * plan.groups * plan.group_in;
  if (packs<T>(plan, nullptr, columns)) {
    gather_kernel<T, width>
        <<<blocks_for(total / width), kThreads, 0, stream>>>(plan, chunk, columns, grad_input);
  } else {
    gather_kernel<T, 1>
        <<<blocks_for(total), kThreads, 0, stream>>>(plan, chunk, columns, grad_input);
  }
}

template <typename T>
void scale_partials(const TapPlan<compute_t<T>>& plan, Chunk chunk, const T* input,
                    const T* columns, compute_t<T>* partials, cudaStream_t stream) {
  constexpr int width = 16 / sizeof(T);
  const int64_t per_sample = (plan.pixels() + kScalePixels - 1) / kScalePixels;
  const int64_t span = chunk.last - chunk.first;
  const unsigned blocks = blocks_for(chunk.samples * ((span + kScalePixels - 1) / kScalePixels), 1);
  if (packs<T>(plan, input, columns)) {
    scale_kernel<T, width>
        <<<blocks, kThreads, 0, stream>>>(plan, chunk, input, columns, per_sample, partials);
  } else {
    scale_kernel<T, 1>
        <<<blocks, kThreads, 0, stream>>>(plan, chunk, input, columns, per_sample, partials);
  }
}

template <typename T>
void finish_outputs(const T* bias, bool relu, T* output, int64_t pixels, int64_t outputs,
                    int64_t begin, int64_t size, cudaStream_t stream) {
  finish_kernel<T><<<blocks_for(pixels * size), kThreads, 0, stream>>>(bias, relu, output, pixels,
                                                                       outputs, begin, size);
}

template <typename T>
void accumulate(const T* from, compute_t<T>* sum, int64_t size, cudaStream_t stream) {
  accumulate_kernel<T><<<blocks_for(size), kThreads, 0, stream>>>(from, sum, size);
}

#define DETKIT_INSTANTIATE(T)                                                                   \
  template void sample_columns<T>(const TapPlan<compute_t<T>>&, Chunk, const T*, T*,            \
                                  cudaStream_t);                                                \
  template void gather_columns<T>(const TapPlan<compute_t<T>>&, Chunk, const T*, compute_t<T>*, \
                                  cudaStream_t);                                                \
  template void scale_partials<T>(const TapPlan<compute_t<T>>&, Chunk, const T*, const T*,      \
                                  compute_t<T>*, cudaStream_t);                                 \
  template void finish_outputs<T>(const T*, bool, T*, int64_t, int64_t, int64_t, int64_t,       \
                                  cudaStream_t);                                                \
  template void accumulate<T>(const T*, compute_t<T>*, int64_t, cudaStream_t);

DETKIT_INSTANTIATE(double)
DETKIT_INSTANTIATE(float)
DETKIT_INSTANTIATE(__half)
DETKIT_INSTANTIATE(__nv_bfloat16)

}  // namespace detkit::cuda
