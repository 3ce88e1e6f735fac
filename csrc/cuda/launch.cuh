// Launch sizes shared by the CUDA kernels; no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace detkit::cuda {

constexpr int kThreads = 256;

// Blocks for a grid-stride loop over n items: enough to fill any device, few enough for any grid.
inline unsigned blocks_for(int64_t n, int threads = kThreads) {
  const int64_t blocks = (n + threads - 1) / threads;
  return static_cast<unsigned>(blocks<1 ? 1 : blocks>(1 << 20) ? (1 << 20) : blocks);
}

#if defined(__CUDACC__)
// for (int64_t i : the thread's share of n items)
#define DETKIT_GRID_STRIDE(i, n)                                            \
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < (n); \
       i += int64_t(gridDim.x) * blockDim.x)
#endif

// Before a loop whose counter indexes registers.
#if defined(__CUDACC__) && !defined(DETKIT_EMULATED_CUDA)
#define DETKIT_UNROLL _Pragma("unroll")
#else
#define DETKIT_UNROLL
#endif

}  // namespace detkit::cuda
