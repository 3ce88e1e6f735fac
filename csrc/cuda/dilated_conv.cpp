#include <optional>
#include <tuple>
#include <vector>

#include "conv_shapes.h"
#include "cuda/fused_conv.h"
#include "cuda/tap_conv.h"
#include "torch_stable.h"

namespace detkit::cuda {
namespace {

using Ints = std::vector<int64_t>;

Taps taps_of(const Ints& padding, const Ints& dilation) {
  return {{dilation[0], dilation[1], padding[0], padding[1]}, std::nullopt};
}

Tensor dilated_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                      int64_t algorithm, bool relu) {
  check_algorithm("dilated_conv2d", algorithm, true);
  const ConvShape shape = dilated_shape(input, weight, bias, stride, padding, dilation, groups);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor output = empty_output(input, shape);
  const Tensor x = side_by_side(input);
  const Taps taps = taps_of(padding, dilation);
  if (algorithm == kFused) {
    fused_forward("dilated_conv2d", {{shape, taps.whole, weight}}, x, std::nullopt, dense(bias),
                  relu, output);
  } else {
    tap_forward(shape, taps, x, weight, dense(bias), relu, output);
  }
  return laid_out(output, input);
}

std::tuple<Tensor, Tensor> dilated_conv2d_backward(const Tensor& grad, const Tensor& input,
                                                   const Tensor& weight, const Ints& stride,
                                                   const Ints& padding, const Ints& dilation,
                                                   int64_t groups, bool need_input,
                                                   bool need_weight) {
  const ConvShape shape =
      dilated_shape(input, weight, std::nullopt, stride, padding, dilation, groups);
  check_grad("dilated_conv2d", input, grad, shape);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto sum_input = grad_map(input, need_input), sum_weight = grad_weight(weight, need_weight);
  tap_backward(shape, taps_of(padding, dilation), side_by_side(grad),
               read_input(input, need_weight), weight, sum_input, sum_weight, false);
  return {finish_map(sum_input, input), finish_weight(sum_weight, weight)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CUDA, m) {
  m.impl("dilated_conv2d", TORCH_BOX(&dilated_conv2d));
  m.impl("_dilated_conv2d_backward", TORCH_BOX(&dilated_conv2d_backward));
}

}  // namespace detkit::cuda
