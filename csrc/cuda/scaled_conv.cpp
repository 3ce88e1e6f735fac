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

// The scales stay on the device; a sample with a non-finite one becomes NaN there.
Taps taps_of(const Tensor& scales) { return {{}, torch::stable::contiguous(scales)}; }

Tensor scaled_conv2d(const Tensor& input, const Tensor& weight, const Tensor& scales,
                     const std::optional<Tensor>& bias, const Ints& stride, int64_t groups,
                     int64_t algorithm, bool relu) {
  check_algorithm("scaled_conv2d", algorithm, true);
  const ConvShape shape = scaled_shape(input, weight, scales, bias, stride, groups);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor output = empty_output(input, shape);
  const Tensor x = side_by_side(input);
  const Taps taps = taps_of(scales);
  if (algorithm == kFused) {
    fused_forward("scaled_conv2d", {{shape, {}, weight}}, x, taps.scales, dense(bias), relu,
                  output);
  } else {
    tap_forward(shape, taps, x, weight, dense(bias), relu, output);
  }
  return laid_out(output, input);
}

std::tuple<Tensor, Tensor, Tensor> scaled_conv2d_backward(const Tensor& grad, const Tensor& input,
                                                          const Tensor& weight,
                                                          const Tensor& scales, const Ints& stride,
                                                          int64_t groups, bool need_input,
                                                          bool need_weight, bool need_scales) {
  const ConvShape shape = scaled_shape(input, weight, scales, std::nullopt, stride, groups);
  check_grad("scaled_conv2d", input, grad, shape);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const auto sum_input = grad_map(input, need_input), sum_weight = grad_weight(weight, need_weight);
  const auto grad_scales = tap_backward(shape, taps_of(scales), side_by_side(grad),
                                        read_input(input, need_weight || need_scales), weight,
                                        sum_input, sum_weight, need_scales);
  return {finish_map(sum_input, input), finish_weight(sum_weight, weight),
          grad_scales ? *grad_scales : torch::stable::new_empty(scales, {0})};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CUDA, m) {
  m.impl("scaled_conv2d", TORCH_BOX(&scaled_conv2d));
  m.impl("_scaled_conv2d_backward", TORCH_BOX(&scaled_conv2d_backward));
}

}  // namespace detkit::cuda
