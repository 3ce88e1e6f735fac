// The convolutions' common CUDA road: sample taps into columns, multiply with the weights, and
// back, chunk by chunk on the current stream. Maps have their channels side by side. Nothing waits
// for the device and nothing is added up in an order that depends on it.
#pragma once

#include <cstdint>
#include <optional>

#include "conv_shapes.h"
#include "torch_stable.h"

namespace detkit::cuda {

// Where a convolution reads: whole taps, or contiguous scales (N, 2) on the device.
struct Taps {
  WholeTaps whole{};
  std::optional<Tensor> scales;
};

// A dense tensor (N, C, H, W) with channels side by side.
Tensor side_by_side(const Tensor& map);
Tensor empty_output(const Tensor& input, const ConvShape& shape);

// Contiguous, where there is one.
std::optional<Tensor> dense(const std::optional<Tensor>& tensor);

// The input side by side; where only its shape was needed, a tensor that must not be read.
Tensor read_input(const Tensor& input, bool needed);

// `map` in the layout of `like`: channels_last if that is so and not contiguous as well.
Tensor laid_out(const Tensor& map, const Tensor& like);

// Zeros in which a gradient is added up: float, or double; of a map with channels side by side, of
// a weight (O, C/groups, kh, kw) as (O, kh, kw, C/groups). Empty where not needed.
std::optional<Tensor> grad_map(const Tensor& input, bool needed);
std::optional<Tensor> grad_weight(const Tensor& weight, bool needed);

// The gradients in the dtype and layout of the tensors they belong to; empty where not needed.
Tensor finish_map(const std::optional<Tensor>& sum, const Tensor& input);
Tensor finish_weight(const std::optional<Tensor>& sum, const Tensor& weight);

// Writes the output channels of `shape`, with `relu` none below 0; input and output are side by
// side.
void tap_forward(const ConvShape& shape, const Taps& taps, const Tensor& input,
                 const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
                 const Tensor& output);

// Adds to the sums that are given; returns the gradients of the scales, (N, 2) if needed.
std::optional<Tensor> tap_backward(const ConvShape& shape, const Taps& taps, const Tensor& grad,
                                   const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& sum_input,
                                   const std::optional<Tensor>& sum_weight, bool need_scales);

}  // namespace detkit::cuda
