// __half of the emulation: torch's header-only type.
#pragma once

#undef __CUDACC__  // or the header would ask for CUDA's own
#include <torch/headeronly/util/Half.h>
#define __CUDACC__ 1

using __half = torch::headeronly::Half;

inline float __half2float(__half value) { return value; }
inline __half __float2half_rn(float value) { return value; }
