#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "conv_shapes.h"
#include "cpu/library_conv.h"
#include "cpu/tap_conv.h"
#include "cpu/tap_conv_kernel.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

using Ints = std::vector<int64_t>;

constexpr int64_t kAddedPerTask = int64_t(1) << 16;

// The library takes parts that all read all inputs.
bool whole_inputs(const std::vector<SplitPart>& parts, const Tensor& input) {
  return std::all_of(parts.begin(), parts.end(), [&](const SplitPart& part) {
    return part.shape.groups * part.shape.group_in == input.size(1);
  });
}

bool library_runs_all_forward(const std::vector<SplitPart>& parts, const Tensor& input) {
  return std::all_of(parts.begin(), parts.end(), [&](const SplitPart& part) {
    return library_runs_forward(part.shape, part.taps, input);
  });
}

Tensor outputs_of(const ConvShape& part, Tensor map) {
  return torch::stable::narrow(map, 1, part.out_begin, part.groups * part.group_out);
}

std::optional<Tensor> outputs_of(const ConvShape& part, std::optional<Tensor> bias) {
  if (!bias) return std::nullopt;
  return torch::stable::narrow(*bias, 0, part.out_begin, part.groups * part.group_out);
}

Tensor library_forward(const std::vector<SplitPart>& parts, const Tensor& input,
                       const std::vector<Tensor>& weights, const std::optional<Tensor>& bias) {
  const Tensor output = make_output(input, parts[0].shape).result;
  for (size_t i = 0; i < parts.size(); ++i) {
    const ConvShape& shape = parts[i].shape;
    Tensor slice = outputs_of(shape, output);
    torch::stable::copy_(
        slice,
        LibraryConv(shape, parts[i].taps).forward(input, weights[i], outputs_of(shape, bias)));
  }
  return output;
}

// sum += part, a tensor of the input's dtype in the same layout.
void add(const Tensor& part, Tensor& sum) {
  auto* to = static_cast<float*>(sum.data_ptr());
  const void* from = part.data_ptr();
  const bool wide = part.scalar_type() == ScalarType::Float;
  torch::stable::parallel_for(0, sum.numel(), kAddedPerTask, [&](int64_t begin, int64_t end) {
    if (wide) {
      accumulate(static_cast<const float*>(from) + begin, to + begin, end - begin);
    } else {
      accumulate(static_cast<const BFloat16*>(from) + begin, to + begin, end - begin);
    }
  });
}

std::tuple<Tensor, std::vector<Tensor>> library_backward(const std::vector<SplitPart>& parts,
                                                         const Tensor& grad, const Tensor& input,
                                                         const std::vector<Tensor>& weights,
                                                         bool need_input, bool need_weights) {
  Tensor grad_input;  // summed in float
  std::vector<Tensor> grad_weights;
  for (size_t i = 0; i < parts.size(); ++i) {
    const ConvShape& shape = parts[i].shape;
    const auto [of_input, of_weight] =
        LibraryConv(shape, parts[i].taps)
            .backward(outputs_of(shape, grad), input, weights[i], need_input, need_weights);
    if (i == 0) {
      grad_input = torch::stable::to(of_input, ScalarType::Float);
    } else if (need_input) {
      add(of_input, grad_input);
    }
    grad_weights.push_back(of_weight);
  }
  return {torch::stable::to(grad_input, input.scalar_type()), grad_weights};
}

Tensor split_conv2d(const Tensor& input, const std::vector<Tensor>& weights,
                    const std::optional<Tensor>& bias, const Ints& dilations, const Ints& stride,
                    int64_t groups, int64_t algorithm, bool relu) {
  check_algorithm("split_conv2d", algorithm, false);
  const auto parts = split_parts(input, weights, bias, dilations, stride, groups);
  if (whole_inputs(parts, input) && library_runs_all_forward(parts, input)) {
    return activated(library_forward(parts, input, weights, bias), relu);
  }
  const RoadMap output = make_output(input, parts[0].shape);
  const Tensor x = prepared(input);
  std::optional<Tensor> b = prepared(bias);
  for (size_t i = 0; i < parts.size(); ++i) {
    const ConvShape& shape = parts[i].shape;
    tap_forward(shape, whole_taps(shape, parts[i].taps), x, prepared(weights[i]),
                outputs_of(shape, b), output);
  }
  return activated(finish(output), relu);
}

std::tuple<Tensor, std::vector<Tensor>> split_conv2d_backward(
    const Tensor& grad, const Tensor& input, const std::vector<Tensor>& weights,
    const Ints& dilations, const Ints& stride, int64_t groups, bool need_input, bool need_weights) {
  const auto parts = split_parts(input, weights, std::nullopt, dilations, stride, groups);
  check_grad("split_conv2d", input, grad, parts[0].shape);
  if (whole_inputs(parts, input) && library_runs_backward(parts[0].shape, input)) {
    return library_backward(parts, grad, input, weights, need_input, need_weights);
  }
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
