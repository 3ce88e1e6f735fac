#include <optional>
#include <tuple>
#include <vector>

#include "conv_shapes.h"
#include "cpu/tap_conv.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

using Ints = std::vector<int64_t>;

Tensor split_conv2d(const Tensor& input, const std::vector<Tensor>& weights,
                    const std::optional<Tensor>& bias, const Ints& dilations, const Ints& stride,
                    int64_t groups, int64_t algorithm) {
  check_algorithm("split_conv2d", algorithm, false);
  const auto parts = split_parts(input, weights, bias, dilations, stride, groups);
  const RoadMap output = make_output(input, parts[0].shape);
  const Tensor x = prepared(input);
  std::optional<Tensor> b = prepared(bias);
  for (size_t i = 0; i < parts.size(); ++i) {
    const ConvShape& shape = parts[i].shape;
    const std::optional<Tensor> shift =
        b ? std::optional(torch::stable::narrow(*b, 0, shape.out_begin, weights[i].size(0)))
          : std::nullopt;
    tap_forward(shape, whole_taps(shape, parts[i].taps), x, prepared(weights[i]), shift, output);
  }
  return finish(output);
}

std::tuple<Tensor, std::vector<Tensor>> split_conv2d_backward(
    const Tensor& grad, const Tensor& input, const std::vector<Tensor>& weights,
    const Ints& dilations, const Ints& stride, int64_t groups, bool need_input, bool need_weights) {
  const auto parts = split_parts(input, weights, std::nullopt, dilations, stride, groups);
  check_grad("split_conv2d", input, grad, parts[0].shape);
  const RoadMap g = read_grad(grad);
  const Tensor x = read_input(input, need_weights);
  const Sum grad_input(input, need_input);
  std::vector<Tensor> grad_weights;
  for (size_t i = 0; i < parts.size(); ++i) {  // the parts add to the same input, one by one
    const Sum grad_weight(weights[i], need_weights);
    tap_backward(parts[i].shape, whole_taps(parts[i].shape, parts[i].taps), g, x,
                 prepared(weights[i]), grad_input.sum, grad_weight.sum, nullptr);
    grad_weights.push_back(grad_weight.result());
  }
  return {grad_input.result(), grad_weights};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CPU, m) {
  m.impl("split_conv2d", TORCH_BOX(&split_conv2d));
  m.impl("_split_conv2d_backward", TORCH_BOX(&split_conv2d_backward));
}

}  // namespace detkit::cpu
