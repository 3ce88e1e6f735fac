// __nv_bfloat16 of the emulation: torch's header-only type.
#pragma once

#undef __CUDACC__  // or the header would ask for CUDA's own
#include <torch/headeronly/util/BFloat16.h>
#define __CUDACC__ 1

using __nv_bfloat16 = torch::headeronly::BFloat16;

inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
