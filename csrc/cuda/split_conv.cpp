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

Tensor split_conv2d(const Tensor& input, const std::vector<Tensor>& weights,
                    const std::optional<Tensor>& bias, const Ints& dilations, const Ints& stride,
                    int64_t groups, int64_t algorithm, bool relu) {
  check_algorithm("split_conv2d", algorithm, true);
  const auto parts = split_parts(input, weights, bias, dilations, stride, groups);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor output = empty_output(input, parts[0].shape), x = side_by_side(input);
  std::optional<Tensor> all = dense(bias), shift;
  if (algorithm == kFused) {
    std::vector<FusedPart> fused;
    for (size_t i = 0; i < parts.size(); ++i) {
      fused.push_back({parts[i].shape, parts[i].taps, weights[i]});
    }
    fused_forward("split_conv2d", fused, x, std::nullopt, all, relu, output);
    return laid_out(output, input);
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    const ConvShape& shape = parts[i].shape;
    if (all) shift = torch::stable::narrow(*all, 0, shape.out_begin, weights[i].size(0));
    tap_forward(shape, {parts[i].taps, std::nullopt}, x, weights[i], shift, relu, output);
  }
  return laid_out(output, input);
}

std::tuple<Tensor, std::vector<Tensor>> split_conv2d_backward(
    const Tensor& grad, const Tensor& input, const std::vector<Tensor>& weights,
    const Ints& dilations, const Ints& stride, int64_t groups, bool need_input, bool need_weights) {
  const auto parts = split_parts(input, weights, std::nullopt, dilations, stride, groups);
  check_grad("split_conv2d", input, grad, parts[0].shape);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const Tensor g = side_by_side(grad), x = read_input(input, need_weights);
  const auto sum_input = grad_map(input, need_input);
  std::vector<Tensor> grad_weights;
  for (size_t i = 0; i < parts.size(); ++i) {  // the parts add to the same input, one by one
    const auto sum_weight = grad_weight(weights[i], need_weights);
    tap_backward(parts[i].shape, {parts[i].taps, std::nullopt}, g, x, weights[i], sum_input,
                 sum_weight, false);
    grad_weights.push_back(finish_weight(sum_weight, weights[i]));
  }
  return {finish_map(sum_input, input), grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CUDA, m) {
  m.impl("split_conv2d", TORCH_BOX(&split_conv2d));
  m.impl("_split_conv2d_backward", TORCH_BOX(&split_conv2d_backward));
}

}  // namespace detkit::cuda
