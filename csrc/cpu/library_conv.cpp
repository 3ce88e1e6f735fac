#include "cpu/library_conv.h"

#include <array>

namespace detkit::cpu {
namespace {

using torch::headeronly::MemoryFormat;

// Columns between taps from which on the library's code for float planes falls back, to 0.8 and
// less of its speed: measured at 128 to 512 channels, dilations 1 to 12, with AVX-512.
constexpr int64_t kFarForward = 7, kFarBackward = 8;

Tensor in_layout_of(const Tensor& like, const Tensor& tensor) {
  return torch::stable::contiguous(
      tensor, is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

bool far_apart(int64_t columns, int64_t far, const Tensor& input) {
  return columns >= far && input.scalar_type() == ScalarType::Float && !is_channels_last(input);
}

}  // namespace

Tensor LibraryConv::forward(const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias) const {
  const std::vector<int64_t> no_padding{0, 0};
  return in_layout_of(input, call1("aten::convolution", "", input, weight, bias, stride, padding,
                                   dilation, false, no_padding, groups));
}

std::pair<Tensor, Tensor> LibraryConv::backward(const Tensor& grad, const Tensor& input,
                                                const Tensor& weight, bool need_input,
                                                bool need_weight) const {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  // Copies with channels side by side cost less than what the library loses on planes.
  const bool copies = weight.size(3) > 1 && far_apart(dilation[1], kFarBackward, input);
  const auto laid = [&](const Tensor& map) {
    return copies ? torch::stable::contiguous(map, MemoryFormat::ChannelsLast) : map;
  };
  const std::vector<int64_t> no_padding{0, 0};
  const std::optional<std::vector<int64_t>> no_bias;
  const std::array<bool, 3> needed{need_input, need_weight, false};
  std::array<StableIValue, 11> stack{
      from(laid(grad)),
      from(laid(input)),
      from(weight),
      from(no_bias),
      from(stride),
      from(padding),
      from(dilation),
      from(false),
      from(no_padding),
      from(groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(needed.data(), needed.size()))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor of_input = to<Tensor>(stack[0]), of_weight = to<Tensor>(stack[1]);
  to<Tensor>(stack[2]);  // undefined, and ours to free
  const auto result = [](bool wanted, const Tensor& of, const Tensor& gradient) {
    return wanted ? in_layout_of(of, gradient) : torch::stable::new_empty(of, {0});
  };
  return {result(need_input, input, of_input), result(need_weight, weight, of_weight)};
}

bool library_runs_backward(const ConvShape& shape, const Tensor& input) {
  const ScalarType dtype = input.scalar_type();
  return !shape.empty() && (dtype == ScalarType::Float || dtype == ScalarType::BFloat16);
}

bool library_runs_forward(const ConvShape& shape, const WholeTaps& taps, const Tensor& input) {
  const bool ours =
      shape.groups == 1 && shape.kernel_w > 1 && far_apart(taps.dilation_w, kFarForward, input);
  return !ours && library_runs_backward(shape, input);
}

}  // namespace detkit::cpu
