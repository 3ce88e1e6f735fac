// Convolutions as one matrix product on tensor cores that samples its operand as it goes: no
// columns in memory, all parts of a split convolution in one launch. On raw device pointers; no
// torch. Halves, or floats rounded to TF32 before they are multiplied; sums in float; sm_80 or
// later. ReLU in the epilogue on request.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/gemm_tiles.h"
#include "cuda/tap_conv_kernel.h"

namespace detkit::cuda {

constexpr int kGemmParts = 4;  // of one launch

// Maps have their channels side by side. All parts read the same input at the same stride, whole
// taps or scaled ones alike, and write one output.
template <typename T>
struct FusedConv {
  const T* input;
  const T* bias;  // of all outputs, or null
  T* output;
  int64_t pixels;   // of all samples
  int64_t outputs;  // channels of the output
  bool relu;
  int parts;
  GemmPart<T> part[kGemmParts];
};

// Columns of a tile; rows are as many.
constexpr int kGemmLargeTile = 128, kGemmSmallTile = 64;

// Fills in the parts' tiles and enqueues the product. The caller checks cudaGetLastError.
// `processors`: of the device; too few large tiles for them become small ones.
template <typename T>
void fused_conv(FusedConv<T> conv, bool scaled, int processors, cudaStream_t stream);

}  // namespace detkit::cuda
