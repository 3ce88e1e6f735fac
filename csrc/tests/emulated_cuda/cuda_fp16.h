// __half of the emulation: torch's header-only type.
#pragma once

// Or torch's header would ask for CUDA's own.
#pragma push_macro("__CUDACC__")
#undef __CUDACC__
#include <torch/headeronly/util/Half.h>
#pragma pop_macro("__CUDACC__")

using __half = torch::headeronly::Half;

inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return value; }
inline __half __float2half_rn(float value) { return value; }
