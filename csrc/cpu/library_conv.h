// Torch's own convolution (oneDNN) in place of ours at whole dilations, where it is faster. Its
// sums run in an order that may depend on the number of threads.
#pragma once

#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "conv_shapes.h"
#include "torch_stable.h"

namespace detkit::cpu {

// A convolution at whole dilations, as torch's operators want it.
struct LibraryConv {
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
  int64_t products;  // numbers to multiply

  LibraryConv(const ConvShape& shape, const WholeTaps& taps)
      : stride{shape.stride_h, shape.stride_w},
        padding{taps.padding_h, taps.padding_w},
        dilation{taps.dilation_h > 0 ? taps.dilation_h : 1,
                 taps.dilation_w > 0 ? taps.dilation_w : 1},
        groups(shape.groups),
        products(shape.products()) {}

  // In the layout of the input.
  Tensor forward(const Tensor& input, const Tensor& weight,
                 const std::optional<Tensor>& bias) const;

  // Gradients of input and weight, those that are needed, in the layouts of these.
  std::pair<Tensor, Tensor> backward(const Tensor& grad, const Tensor& input, const Tensor& weight,
                                     bool need_input, bool need_weight) const;
};

// Multiplications from which on it pays to lay maps out anew, to call the library twice, or to give
// each thread a call of its own.
constexpr int64_t kManyProducts = int64_t(1) << 24;

// Whether to call the library: for float32 and bfloat16, but forward not where taps lie so many
// columns apart that its code for planes falls back and there is too little work to do otherwise.
bool library_runs_forward(const ConvShape& shape, const WholeTaps& taps, const Tensor& input);
bool library_runs_backward(const ConvShape& shape, const Tensor& input);

}  // namespace detkit::cpu
