#include "cuda/fused_conv.h"

#include <algorithm>

#include "cuda/fused_conv_kernel.h"

namespace detkit::cuda {
namespace {

int attribute(const Tensor& tensor, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

// Dense tensors begin at 16 bytes, unless they are views.
Tensor aligned(const Tensor& tensor) {
  const bool is = reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0;
  return is ? tensor : torch::stable::clone(tensor);
}

void check_fits(const char* op, const std::vector<FusedPart>& parts, const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  const bool wide = dtype == ScalarType::Float;
  STD_TORCH_CHECK(
      wide || dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op,
      ": the fused algorithm needs float32, which it rounds to TF32, float16 or bfloat16");
  const int64_t pack = wide ? kGemmPack<float> : kGemmPack<__half>;
  STD_TORCH_CHECK(attribute(input, cudaDevAttrComputeCapabilityMajor) >= 8, op,
                  ": the fused algorithm needs compute capability 8.0");
  int64_t tiles = 0;
  for (const FusedPart& part : parts) {
    const ConvShape& shape = part.shape;
    STD_TORCH_CHECK(shape.channels % pack == 0 && shape.in_begin % pack == 0 &&
                        shape.group_in % pack == 0 && shape.group_in > 0,
                    op, ": the fused algorithm needs channels per group in multiples of ", pack);
    tiles += shape.groups * ((shape.group_out + kGemmSmallTile - 1) / kGemmSmallTile);
    // What the kernel keeps in int.
    STD_TORCH_CHECK(std::max({shape.height, shape.width, shape.out_height, shape.out_width,
                              shape.kernel() * shape.group_in}) < INT32_MAX / 2,
                    op, ": sizes are too large for the fused algorithm");
  }
  const ConvShape& first = parts.front().shape;
  const int64_t rows = (first.batch * first.pixels() + kGemmSmallTile - 1) / kGemmSmallTile;
  STD_TORCH_CHECK(rows <= INT32_MAX / std::max<int64_t>(tiles, 1), op,
                  ": sizes are too large for the fused algorithm");
}

template <typename T>
GemmPart<T> gemm_part(const FusedPart& part, const Tensor& weight, const float* scales) {
  const ConvShape& shape = part.shape;
  return {{shape.channels, shape.in_begin, shape.height, shape.width, shape.out_height,
           shape.out_width, shape.stride_h, shape.stride_w, shape.kernel_h, shape.kernel_w,
           shape.groups, shape.group_in, part.whole, scales},
          static_cast<const T*>(weight.data_ptr()),
          shape.out_begin,
          shape.group_out,
          0,
          0};
}

template <typename T>
void run(const std::vector<FusedPart>& parts, const Tensor& input,
         const std::optional<Tensor>& scales, const std::optional<Tensor>& bias, bool relu,
         const Tensor& output) {
  const Tensor x = aligned(input);
  const ConvShape& first = parts.front().shape;
  const int processors = attribute(input, cudaDevAttrMultiProcessorCount);
  for (size_t begin = 0; begin < parts.size(); begin += kGemmParts) {
    FusedConv<T> conv{static_cast<const T*>(x.data_ptr()),
                      bias ? static_cast<const T*>(bias->data_ptr()) : nullptr,
                      static_cast<T*>(output.data_ptr()),
                      first.batch * first.pixels(),
                      first.outputs,
                      relu,
                      0,
                      {}};
    std::vector<Tensor> weights;  // alive until the launch is enqueued
    const std::vector<int64_t> channels_innermost{0, 2, 3, 1};
    for (size_t i = begin; i < std::min(parts.size(), begin + kGemmParts); ++i) {
      // No copy of weights whose channels already lie side by side.
      weights.push_back(aligned(torch::stable::contiguous(
          call1("aten::permute", "", parts[i].weight, channels_innermost))));
      conv.part[conv.parts++] = gemm_part<T>(parts[i], weights.back(),
                                             scales ? scales->const_data_ptr<float>() : nullptr);
    }
    fused_conv(conv, scales.has_value(), processors, current_stream(input));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

void fused_forward(const char* op, const std::vector<FusedPart>& parts, const Tensor& input,
                   const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                   bool relu, const Tensor& output) {
  check_fits(op, parts, input);
  if (output.numel() == 0) return;
  switch (input.scalar_type()) {
    case ScalarType::Float:
      return run<float>(parts, input, scales, bias, relu, output);
    case ScalarType::Half:
      return run<__half>(parts, input, scales, bias, relu, output);
    default:
      return run<__nv_bfloat16>(parts, input, scales, bias, relu, output);
  }
}

}  // namespace detkit::cuda
