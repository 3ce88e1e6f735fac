// Checked sizes of the three convolutions, for the CPU and the CUDA operators alike. The Python
// functions check the same with better messages; these hold for direct calls of torch.ops.detkit.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/scaled_taps.h"
#include "torch_stable.h"

namespace detkit {

// Sizes of one convolution; a part of a split one uses slices of the channels.
struct ConvShape {
  int64_t batch;
  int64_t channels, in_begin;  // of the input, and the first one used
  int64_t height, width;
  int64_t outputs, out_begin;  // channels of the output, and the first one written
  int64_t out_height, out_width;
  int64_t kernel_h, kernel_w, stride_h, stride_w;
  int64_t groups;               // of this convolution
  int64_t group_in, group_out;  // channels per group

  int64_t pixels() const { return out_height * out_width; }
  int64_t kernel() const { return kernel_h * kernel_w; }
  int64_t products() const { return batch * pixels() * groups * group_in * group_out * kernel(); }
  bool empty() const { return products() == 0; }
};

// Channels side by side in memory, and not contiguous as well: outputs and gradients are then too.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) == 1) continue;
    if (tensor.stride(dim) != expected) return false;
    expected *= tensor.size(dim);
  }
  return true;
}

inline void check_alike(const char* op, const Tensor& input, const Tensor& other, int64_t dim) {
  STD_TORCH_CHECK(other.dim() == dim, op, ": a tensor must have ", dim, " dimensions, got ",
                  other.dim());
  STD_TORCH_CHECK(other.scalar_type() == input.scalar_type() && other.device() == input.device(),
                  op, ": weight, bias and gradient must have the dtype and device of the input");
}

// A kernel anchored at its centre on `channels` of the input.
inline ConvShape conv_shape(const char* op, const Tensor& input, int64_t channels,
                            const Tensor& weight, const std::optional<Tensor>& bias,
                            const std::vector<int64_t>& stride, int64_t groups) {
  check_alike(op, input, input, 4);
  check_alike(op, input, weight, 4);
  STD_TORCH_CHECK(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, op,
                  ": stride must be two positive numbers");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0 && weight.size(1) * groups == channels,
                  op, ": channels must fit the weight and groups=", groups);
  if (bias) {
    check_alike(op, input, *bias, 1);
    STD_TORCH_CHECK(bias->size(0) == weight.size(0), op, ": bias must have an entry per output");
  }
  ConvShape shape{};
  shape.batch = input.size(0);
  shape.channels = input.size(1);
  shape.height = input.size(2);
  shape.width = input.size(3);
  shape.outputs = weight.size(0);
  shape.out_height = centred_size(shape.height, stride[0]);
  shape.out_width = centred_size(shape.width, stride[1]);
  shape.kernel_h = weight.size(2);
  shape.kernel_w = weight.size(3);
  shape.stride_h = stride[0];
  shape.stride_w = stride[1];
  shape.groups = groups;
  shape.group_in = weight.size(1);
  shape.group_out = weight.size(0) / groups;
  return shape;
}

inline ConvShape dilated_shape(const Tensor& input, const Tensor& weight,
                               const std::optional<Tensor>& bias,
                               const std::vector<int64_t>& stride,
                               const std::vector<int64_t>& padding,
                               const std::vector<int64_t>& dilation, int64_t groups) {
  constexpr const char* op = "dilated_conv2d";
  ConvShape shape = conv_shape(op, input, input.size(1), weight, bias, stride, groups);
  STD_TORCH_CHECK(padding.size() == 2 && padding[0] >= 0 && padding[1] >= 0, op,
                  ": padding must be two numbers of at least 0");
  STD_TORCH_CHECK(dilation.size() == 2 && dilation[0] > 0 && dilation[1] > 0, op,
                  ": dilation must be two positive numbers");
  const int64_t rest_h = shape.height + 2 * padding[0] - dilation[0] * (shape.kernel_h - 1) - 1;
  const int64_t rest_w = shape.width + 2 * padding[1] - dilation[1] * (shape.kernel_w - 1) - 1;
  STD_TORCH_CHECK(rest_h >= 0 && rest_w >= 0, op, ": the kernel must fit into the padded input");
  shape.out_height = rest_h / stride[0] + 1;
  shape.out_width = rest_w / stride[1] + 1;
  return shape;
}

inline ConvShape scaled_shape(const Tensor& input, const Tensor& weight, const Tensor& scales,
                              const std::optional<Tensor>& bias, const std::vector<int64_t>& stride,
                              int64_t groups) {
  constexpr const char* op = "scaled_conv2d";
  const ConvShape shape = conv_shape(op, input, input.size(1), weight, bias, stride, groups);
  STD_TORCH_CHECK(shape.kernel_h % 2 == 1 && shape.kernel_w % 2 == 1, op,
                  ": kernel sides must be odd");
  const bool wide = input.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) == shape.batch && scales.size(1) == 2, op,
                  ": scales must be (N, 2)");
  STD_TORCH_CHECK(scales.scalar_type() == (wide ? ScalarType::Double : ScalarType::Float) &&
                      scales.device() == input.device(),
                  op, ": scales must be float32, float64 for a float64 input, on its device");
  return shape;
}

struct SplitPart {
  ConvShape shape;
  WholeTaps taps;
};

// The parts of a split convolution; part i writes the channels behind those of the parts before it,
// and reads the inputs of the groups that these belong to in the undivided convolution.
inline std::vector<SplitPart> split_parts(const Tensor& input, const std::vector<Tensor>& weights,
                                          const std::optional<Tensor>& bias,
                                          const std::vector<int64_t>& dilations,
                                          const std::vector<int64_t>& stride, int64_t groups) {
  constexpr const char* op = "split_conv2d";
  STD_TORCH_CHECK(!weights.empty() && dilations.size() == 2 * weights.size(), op,
                  ": two dilations per part and at least one part");
  int64_t outputs = 0;
  for (const Tensor& weight : weights) {
    check_alike(op, input, weight, 4);
    outputs += weight.size(0);
  }
  STD_TORCH_CHECK(groups > 0 && outputs % groups == 0, op,
                  ": output channels must be a multiple of groups=", groups);
  if (bias) {
    check_alike(op, input, *bias, 1);
    STD_TORCH_CHECK(bias->size(0) == outputs, op, ": bias must have an entry per output");
  }
  const int64_t per_group = outputs / groups;
  std::vector<SplitPart> parts;
  int64_t out_begin = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    STD_TORCH_CHECK(weight.size(0) > 0 && weight.size(1) * groups == input.size(1), op,
                    ": channels must fit the weights and groups=", groups);
    const int64_t offset = out_begin % per_group;
    const bool whole = offset == 0 && weight.size(0) % per_group == 0;
    STD_TORCH_CHECK(whole || offset + weight.size(0) <= per_group, op,
                    ": each part must have whole groups of outputs or lie inside one");
    const int64_t part_groups = whole ? weight.size(0) / per_group : 1;
    SplitPart part{};
    part.shape = conv_shape(op, input, weight.size(1) * part_groups, weight, std::nullopt, stride,
                            part_groups);
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t kernel = weight.size(2 + axis), dilation = dilations[2 * i + axis];
      STD_TORCH_CHECK(kernel % 2 == 1 && dilation >= 0 && (kernel == 1 || dilation > 0), op,
                      ": kernel sides must be odd, 1 where the dilation is 0");
    }
    part.shape.channels = input.size(1);
    part.shape.in_begin = out_begin / per_group * weight.size(1);
    part.shape.outputs = outputs;
    part.shape.out_begin = out_begin;
    const int64_t dh = dilations[2 * i], dw = dilations[2 * i + 1];
    part.taps = {dh, dw, dh * (weight.size(2) / 2), dw * (weight.size(3) / 2)};
    parts.push_back(part);
    out_begin += weight.size(0);
  }
  return parts;
}

// How a CUDA operator computes its forward pass: by columns in memory and the vendor's product, or
// fused on tensor cores. The CPU has one way.
enum Algorithm : int64_t { kColumns = 0, kFused = 1 };

inline void check_algorithm(const char* op, int64_t algorithm, bool fused_exists) {
  STD_TORCH_CHECK(algorithm == kColumns || (algorithm == kFused && fused_exists), op,
                  ": algorithm must be ", fused_exists ? "0 or 1" : "0 on this device", ", got ",
                  algorithm);
}

// The gradient must have the shape of the output.
inline void check_grad(const char* op, const Tensor& input, const Tensor& grad,
                       const ConvShape& shape) {
  check_alike(op, input, grad, 4);
  STD_TORCH_CHECK(grad.size(0) == shape.batch && grad.size(1) == shape.outputs &&
                      grad.size(2) == shape.out_height && grad.size(3) == shape.out_width,
                  op, ": the gradient must have the shape of the output");
}

}  // namespace detkit
