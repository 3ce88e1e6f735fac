#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/scaled_taps.h"
#include "conv_shapes.h"
#include "cpu/tap_conv.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

using Ints = std::vector<int64_t>;

template <typename T>
void add_taps(int64_t kernel, T scale, int64_t reach, std::vector<Tap<double>>& taps) {
  for (int64_t i = 0; i < kernel; ++i) {
    const Tap<T> tap = scaled_tap<T>(i - kernel / 2, scale, reach);
    taps.push_back(
        {tap.near, tap.far, double(tap.near_weight), double(tap.far_weight), double(tap.slope)});
  }
}

// One set of taps per sample; in the scales' precision, so that fractions are those of the
// reference. At whole scales the second pixels have no weight and the road is that of a dilated
// convolution.
template <typename T>
SampleTaps taps_of(const ConvShape& shape, const Tensor& scales) {
  const Tensor values = torch::stable::contiguous(scales);
  const T* scale = values.const_data_ptr<T>();
  SampleTaps taps{false, {}, {}};
  for (int64_t n = 0; n < shape.batch; ++n) {
    const T h = scale[2 * n], w = scale[2 * n + 1];
    STD_TORCH_CHECK(std::isfinite(h) && std::isfinite(w),
                    "scaled_conv2d: scales must be finite, got (", h, ", ", w, ") of sample ", n);
    add_taps(shape.kernel_h, h, shape.height, taps.rows);
    add_taps(shape.kernel_w, w, shape.width, taps.cols);
  }
  return taps;
}

SampleTaps scaled_taps(const ConvShape& shape, const Tensor& scales) {
  return scales.scalar_type() == ScalarType::Double ? taps_of<double>(shape, scales)
                                                    : taps_of<float>(shape, scales);
}

Tensor scaled_conv2d(const Tensor& input, const Tensor& weight, const Tensor& scales,
                     const std::optional<Tensor>& bias, const Ints& stride, int64_t groups,
                     int64_t algorithm, bool relu) {
  check_algorithm("scaled_conv2d", algorithm, false);
  const ConvShape shape = scaled_shape(input, weight, scales, bias, stride, groups);
  const RoadMap output = make_output(input, shape);
  tap_forward(shape, scaled_taps(shape, scales), prepared(input), prepared(weight), prepared(bias),
              output);
  return activated(finish(output), relu);
}

// (N, 2) in the scales' dtype, or empty.
Tensor scale_grads(const std::vector<double>& sums, const Tensor& scales, bool needed) {
  if (!needed) return torch::stable::new_empty(scales, {0});
  Tensor result = torch::stable::new_empty(scales, {scales.size(0), 2});
  if (result.scalar_type() == ScalarType::Double) {
    std::copy(sums.begin(), sums.end(), result.mutable_data_ptr<double>());
  } else {
    std::transform(sums.begin(), sums.end(), result.mutable_data_ptr<float>(),
                   [](double sum) { return static_cast<float>(sum); });
  }
  return result;
}

std::tuple<Tensor, Tensor, Tensor> scaled_conv2d_backward(const Tensor& grad, const Tensor& input,
                                                          const Tensor& weight,
                                                          const Tensor& scales, const Ints& stride,
                                                          int64_t groups, bool need_input,
                                                          bool need_weight, bool need_scales) {
  const ConvShape shape = scaled_shape(input, weight, scales, std::nullopt, stride, groups);
  check_grad("scaled_conv2d", input, grad, shape);
  const Sum grad_input(input, need_input), grad_weight(weight, need_weight);
  std::vector<double> sums(need_scales ? 2 * shape.batch : 0, 0.0);
  tap_backward(shape, scaled_taps(shape, scales), read_grad(grad),
               read_input(input, need_weight || need_scales), prepared(weight), grad_input.sum,
               grad_weight.sum, need_scales ? &sums : nullptr);
  return {grad_input.result(), grad_weight.result(), scale_grads(sums, scales, need_scales)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CPU, m) {
  m.impl("scaled_conv2d", TORCH_BOX(&scaled_conv2d));
  m.impl("_scaled_conv2d_backward", TORCH_BOX(&scaled_conv2d_backward));
}

}  // namespace detkit::cpu
