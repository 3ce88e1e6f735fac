// torch's dtypes as CUDA's, and a layout.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <vector>

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

// (R, C, P, Q) as dense (R, P, Q, C).
inline Tensor bins_first(const Tensor& pooled) {
  return torch::stable::contiguous(
      call1("aten::permute", "", pooled, std::vector<int64_t>{0, 2, 3, 1}));
}

}  // namespace detkit::cuda
