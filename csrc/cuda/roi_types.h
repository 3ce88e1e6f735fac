// torch's dtypes as CUDA's.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "torch_stable.h"

namespace detkit::cuda {

template <class T>
struct DeviceType {
  using type = T;
};
template <>
struct DeviceType<torch::headeronly::Half> {
  using type = __half;
};
template <>
struct DeviceType<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};

}  // namespace detkit::cuda
