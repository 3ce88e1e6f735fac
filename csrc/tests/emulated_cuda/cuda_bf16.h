// __nv_bfloat16 of the emulation: torch's header-only type.
#pragma once

// Or torch's header would ask for CUDA's own.
#pragma push_macro("__CUDACC__")
#undef __CUDACC__
#include <torch/headeronly/util/BFloat16.h>
#pragma pop_macro("__CUDACC__")

using __nv_bfloat16 = torch::headeronly::BFloat16;

inline float __bfloat162float(__nv_bfloat16 value) { return value; }
inline __nv_bfloat16 __float2bfloat16(float value) { return value; }
inline __nv_bfloat16 __float2bfloat16_rn(float value) { return value; }
