#include "cpu/library_conv.h"

#include <array>
#include <tuple>

#include "cpu/layout.h"

namespace detkit::cpu {
namespace {

using torch::headeronly::MemoryFormat;

// Columns between taps from which on the library's code for float planes falls back, to 0.8 and
// less of its speed: measured at 128 to 512 channels, dilations 1 to 12, with AVX-512.
constexpr int64_t kFarForward = 7, kFarBackward = 8;

bool far_apart(int64_t groups, int64_t kernel_w, int64_t columns, int64_t far,
               const Tensor& input) {
  return groups == 1 && kernel_w > 1 && columns >= far &&
         input.scalar_type() == ScalarType::Float && !is_channels_last(input);
}

Tensor in_layout_of(const Tensor& like, const Tensor& tensor) {
  return is_channels_last(like) ? side_by_side(tensor) : in_planes(tensor);
}

Tensor empty_side_by_side(const Tensor& like) {
  return torch::stable::empty(like.sizes(), like.scalar_type(), std::nullopt, like.device(),
                              std::nullopt, MemoryFormat::ChannelsLast);
}

// Gradients of input and weight, of which those not needed are undefined.
std::pair<Tensor, Tensor> call_backward(const LibraryConv& conv, const Tensor& grad,
                                        const Tensor& input, const Tensor& weight, bool need_input,
                                        bool need_weight) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const std::vector<int64_t> no_padding{0, 0};
  const std::optional<std::vector<int64_t>> no_bias;
  const std::array<bool, 3> needed{need_input, need_weight, false};
  std::array<StableIValue, 11> stack{
      from(grad),
      from(input),
      from(weight),
      from(no_bias),
      from(conv.stride),
      from(conv.padding),
      from(conv.dilation),
      from(false),
      from(no_padding),
      from(conv.groups),
      from(torch::headeronly::HeaderOnlyArrayRef<bool>(needed.data(), needed.size()))};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution_backward", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor of_input = to<Tensor>(stack[0]), of_weight = to<Tensor>(stack[1]);
  to<Tensor>(stack[2]);  // undefined, and ours to free
  return {of_input, of_weight};
}

}  // namespace

Tensor LibraryConv::forward(const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias) const {
  const bool far = far_apart(groups, weight.size(3), dilation[1], kFarForward, input);
  const bool lay = far && products >= kManyProducts;
  const std::vector<int64_t> no_padding{0, 0};
  return in_layout_of(input, call1("aten::convolution", "", lay ? side_by_side(input) : input,
                                   lay ? side_by_side(weight) : weight, bias, stride, padding,
                                   dilation, false, no_padding, groups));
}

std::pair<Tensor, Tensor> LibraryConv::backward(const Tensor& grad, const Tensor& input,
                                                const Tensor& weight, bool need_input,
                                                bool need_weight) const {
  // In float the library is best at the input's gradient with channels side by side if the input is
  // so or taps are far apart, and at the weight's always with planes; copies cost less.
  const bool last = is_channels_last(input) ||
                    far_apart(groups, weight.size(3), dilation[1], kFarBackward, input);
  const bool apart =
      last && groups == 1 && input.scalar_type() == ScalarType::Float && products >= kManyProducts;
  Tensor of_input, of_weight;
  if (!apart) {
    std::tie(of_input, of_weight) =
        call_backward(*this, grad, input, weight, need_input, need_weight);
  } else {
    if (need_input) {
      const Tensor unread = is_channels_last(input) ? input : empty_side_by_side(input);
      of_input =
          call_backward(*this, side_by_side(grad), unread, side_by_side(weight), true, false).first;
    }
    if (need_weight) {
      of_weight =
          call_backward(*this, in_planes(grad), in_planes(input), in_planes(weight), false, true)
              .second;
    }
  }
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
  const bool far = far_apart(shape.groups, shape.kernel_w, taps.dilation_w, kFarForward, input);
  return library_runs_backward(shape, input) && !(far && shape.products() < kManyProducts);
}

}  // namespace detkit::cpu
