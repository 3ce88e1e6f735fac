#include <optional>
#include <tuple>
#include <vector>

#include "conv_shapes.h"
#include "cpu/library_conv.h"
#include "cpu/tap_conv.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

using Ints = std::vector<int64_t>;

Tensor dilated_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                      const Ints& stride, const Ints& padding, const Ints& dilation, int64_t groups,
                      int64_t algorithm, bool relu) {
  check_algorithm("dilated_conv2d", algorithm, false);
  const ConvShape shape = dilated_shape(input, weight, bias, stride, padding, dilation, groups);
  const WholeTaps where{dilation[0], dilation[1], padding[0], padding[1]};
  if (library_runs_forward(shape, where, input)) {
    return activated(LibraryConv(shape, where).forward(input, weight, bias), relu);
  }
  const SampleTaps taps = whole_taps(shape, where);
  const RoadMap output = make_output(input, shape);
  tap_forward(shape, taps, prepared(input), prepared(weight), prepared(bias), output);
  return activated(finish(output), relu);
}

std::tuple<Tensor, Tensor> dilated_conv2d_backward(const Tensor& grad, const Tensor& input,
                                                   const Tensor& weight, const Ints& stride,
                                                   const Ints& padding, const Ints& dilation,
                                                   int64_t groups, bool need_input,
                                                   bool need_weight) {
  const ConvShape shape =
      dilated_shape(input, weight, std::nullopt, stride, padding, dilation, groups);
  check_grad("dilated_conv2d", input, grad, shape);
  const WholeTaps where{dilation[0], dilation[1], padding[0], padding[1]};
  if (library_runs_backward(shape, input)) {
    return LibraryConv(shape, where).backward(grad, input, weight, need_input, need_weight);
  }
  const SampleTaps taps = whole_taps(shape, where);
  const Sum grad_input(input, need_input), grad_weight(weight, need_weight);
  tap_backward(shape, taps, read_grad(grad), read_input(input, need_weight), prepared(weight),
               grad_input.sum, grad_weight.sum, nullptr);
  return {grad_input.result(), grad_weight.result()};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CPU, m) {
  m.impl("dilated_conv2d", TORCH_BOX(&dilated_conv2d));
  m.impl("_dilated_conv2d_backward", TORCH_BOX(&dilated_conv2d_backward));
}

}  // namespace detkit::cpu
