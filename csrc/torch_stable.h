// The only torch include of csrc/: the part of LibTorch whose binary interface is stable, as of
// torch 2.11. The target must be defined here, before the includes; with it no classic header
// (ATen, torch/library.h) compiles.
#pragma once

#define TORCH_TARGET_VERSION 0x020b000000000000ULL  // one byte per field: 2.11.0

#if defined(USE_CUDA)
#include <cuda_runtime.h>
#endif

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <cstdint>

namespace detkit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Calls any operator that returns one tensor, by name. Every argument of its schema, in order.
template <class... Args>
Tensor call1(const char* op, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

#if defined(USE_CUDA)
// The stream that torch works on for this device.
inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace detkit

// Runs the body with scalar_t set to double, float, Half or BFloat16.
#define DETKIT_DISPATCH(TYPE, NAME, ...)                                          \
  THO_DISPATCH_V2(TYPE, NAME, AT_WRAP(__VA_ARGS__), AT_EXPAND(AT_FLOATING_TYPES), \
                  torch::headeronly::ScalarType::Half, torch::headeronly::ScalarType::BFloat16)
