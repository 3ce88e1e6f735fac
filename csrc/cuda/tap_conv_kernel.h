// The convolutions apart from matrix products, on raw device pointers; no torch. Maps have their
// channels side by side: (N, H, W, C). Instantiated for double, float, __half and __nv_bfloat16;
// sums are float, or double.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/tap_elements.h"

namespace detkit {

template <>
struct Cell<__half> {
  using Compute = float;
  static DETKIT_HD float load(__half value) { return __half2float(value); }
  static DETKIT_HD __half store(float value) { return __float2half(value); }
};
template <>
struct Cell<__nv_bfloat16> {
  using Compute = float;
  static DETKIT_HD float load(__nv_bfloat16 value) { return __bfloat162float(value); }
  static DETKIT_HD __nv_bfloat16 store(float value) { return __float2bfloat16(value); }
};

namespace cuda {

template <typename T>
using compute_t = typename Cell<T>::Compute;

// Outputs of one block of scale_partials; a chunk that cuts a sample does so at a multiple.
constexpr int64_t kScalePixels = 32;

// Whole samples, or outputs [first, last) of one: what one matrix product works on.
struct Chunk {
  int64_t sample, samples, first, last;
  DETKIT_HD int64_t size() const { return samples * (last - first); }
};

// columns (groups, chunk, kernel, group_in) = the sampled taps.
template <typename T>
void sample_columns(const TapPlan<compute_t<T>>& plan, Chunk chunk, const T* input, T* columns,
                    cudaStream_t stream);

// grad_input (N, H, W, C) += the adjoint of sample_columns.
template <typename T>
void gather_columns(const TapPlan<compute_t<T>>& plan, Chunk chunk, const T* columns,
                    compute_t<T>* grad_input, cudaStream_t stream);

// partials (N, ceil(pixels / kScalePixels), 2) at the chunk's blocks = gradients of the scales.
template <typename T>
void scale_partials(const TapPlan<compute_t<T>>& plan, Chunk chunk, const T* input,
                    const T* columns, compute_t<T>* partials, cudaStream_t stream);

// output (pixels, outputs)[:, begin : begin + size] += bias (size) where there is one; with `relu`
// none of it below 0.
template <typename T>
void finish_outputs(const T* bias, bool relu, T* output, int64_t pixels, int64_t outputs,
                    int64_t begin, int64_t size, cudaStream_t stream);

// sum += from
template <typename T>
void accumulate(const T* from, compute_t<T>* sum, int64_t size, cudaStream_t stream);

}  // namespace cuda
}  // namespace detkit
