#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "conv_shapes.h"
#include "cpu/huge_pages.h"
#include "cpu/layout.h"
#include "cpu/library_conv.h"
#include "cpu/tap_conv.h"
#include "cpu/tap_conv_kernel.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

using Ints = std::vector<int64_t>;

constexpr int64_t kAddedPerTask = int64_t(1) << 16;
// Outputs of a thread from which on threads convolve outputs of their own.
constexpr int64_t kFewOutputs = 32;

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

// Output channels of one part that one thread convolves.
struct Piece {
  size_t part;
  int64_t begin, end;  // in the part
};

// Even shares of all outputs, one per thread: the library divides small parts less evenly.
std::vector<std::vector<Piece>> shares_of(const std::vector<SplitPart>& parts, int64_t threads) {
  const int64_t outputs = parts[0].shape.outputs;
  std::vector<std::vector<Piece>> shares(threads);
  for (int64_t t = 0; t < threads; ++t) {
    const int64_t first = outputs * t / threads, last = outputs * (t + 1) / threads;
    for (size_t i = 0; i < parts.size(); ++i) {
      const int64_t at = parts[i].shape.out_begin, size = parts[i].shape.group_out;
      const Piece piece{i, std::max(first - at, int64_t(0)), std::min(last - at, size)};
      if (piece.begin < piece.end) shares[t].push_back(piece);
    }
  }
  return shares;
}

bool worth_sharing(const std::vector<SplitPart>& parts, int64_t threads) {
  int64_t products = 0;
  for (const SplitPart& part : parts) {
    if (part.shape.groups > 1) return false;
    products += part.shape.products();
  }
  return threads > 1 && parts.size() > 1 && products >= kManyProducts &&
         parts[0].shape.outputs >= kFewOutputs * threads;
}

void forward_piece(const SplitPart& part, const Piece& piece, const Tensor& input, Tensor weight,
                   std::optional<Tensor> bias, Tensor output) {
  const int64_t begin = part.shape.out_begin + piece.begin, size = piece.end - piece.begin;
  if (bias) bias = torch::stable::narrow(*bias, 0, begin, size);
  weight = torch::stable::narrow(weight, 0, piece.begin, size);
  copy_to_planes(LibraryConv(part.shape, part.taps).forward(input, weight, bias),
                 torch::stable::narrow(output, 1, begin, size));
}

// The same memory without a gradient's history, which a thread would go on with.
Tensor bare(const Tensor& tensor) {
  return torch::stable::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                                  tensor.device(), tensor.scalar_type());
}

Tensor library_forward(const std::vector<SplitPart>& parts, const Tensor& input,
                       const std::vector<Tensor>& weights, const std::optional<Tensor>& bias) {
  const Tensor output = make_output(input, parts[0].shape).result;
  expect_huge(output.data_ptr(), output.numel() * output.element_size());
  const int64_t threads = torch::stable::get_num_threads();
  if (!worth_sharing(parts, threads)) {
    for (size_t i = 0; i < parts.size(); ++i) {
      const Piece whole{i, 0, weights[i].size(0)};
      forward_piece(parts[i], whole, input, weights[i], bias, output);
    }
    return output;
  }
  const auto shares = shares_of(parts, threads);
  const Tensor bare_input = bare(input), bare_output = bare(output);
  const std::optional<Tensor> bare_bias = bias ? std::optional(bare(*bias)) : std::nullopt;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      for (const Piece& piece : shares[t]) {
        forward_piece(parts[piece.part], piece, bare_input, bare(weights[piece.part]), bare_bias,
                      bare_output);
      }
    }
  });
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
