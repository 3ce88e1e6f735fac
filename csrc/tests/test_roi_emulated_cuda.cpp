// The CUDA kernels of the RoI operators, run on the CPU, against the CPU operators.
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "common/roi.h"
#include "cuda/ps_roi_align_kernel.h"
#include "cuda/roi_align_kernel.h"
#include "tests/check.h"
#include "torch_stable.h"

using detkit::call1;
using detkit::RoiSpec;
using detkit::ScalarType;
using detkit::Tensor;

namespace {

constexpr int64_t kBatch = 2, kHeight = 9, kWidth = 7, kBins = 3, kDepth = 2;
constexpr double kScale = 0.5;

template <class T>
constexpr ScalarType scalar_type() {
  return sizeof(T) == 4 ? ScalarType::Float : ScalarType::Double;
}

template <class T>
Tensor tensor(const std::vector<T>& values, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size() - 1; i-- > 0;) strides[i] = strides[i + 1] * sizes[i + 1];
  return torch::stable::from_blob(const_cast<T*>(values.data()), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  scalar_type<T>());
}

template <class T>
std::vector<T> random_values(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<T> normal;
  std::vector<T> values(count);
  for (T& v : values) v = normal(random);
  return values;
}

// Boxes inside, across and outside the map, inverted, empty, and with a NaN.
template <class T>
std::vector<T> rois() {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  return {0, 1,  2, 9, 11, 1, 0,  0,  14, 18, 1, -30, -30, -20, -20, 0, 5, 5, 5, 5,
          1, 10, 9, 3, 2,  0, -5, -4, 40, 50, 1, nan, 1,   5,   5,   0, 3, 3, 4, 4};
}

template <class T>
void check_equal(const std::vector<T>& ours, const Tensor& expected) {
  const Tensor dense = torch::stable::contiguous(expected);
  const T* data = dense.const_data_ptr<T>();
  for (size_t i = 0; i < ours.size(); ++i) {
    CHECK_NEAR(ours[i], data[i], sizeof(T) == 4 ? 1e-5 : 1e-12);
  }
}

template <class T>
void compare_roi_align(int64_t sampling, bool aligned) {
  const int64_t channels = 3;
  const auto boxes = rois<T>();
  const auto count = int64_t(boxes.size() / 5);
  const auto input = random_values<T>(kBatch * channels * kHeight * kWidth, 1);
  const auto grad = random_values<T>(count * channels * kBins * kBins, 2);
  const Tensor roi_tensor = tensor(boxes, {count, 5});
  const RoiSpec spec = detkit::roi_align_spec(kBatch, channels, kHeight, kWidth, kBins, kBins,
                                              kScale, sampling, aligned);
  std::vector<T> output(grad.size()), grad_input(input.size(), T(0));
  detkit::cuda::roi_align_forward<T, T>(spec, input.data(), boxes.data(), count, output.data(),
                                        nullptr);
  detkit::cuda::roi_align_backward<T, T>(spec, grad.data(), boxes.data(), count, grad_input.data(),
                                         nullptr);
  check_equal(output,
              call1("detkit::roi_align", "", tensor(input, {kBatch, channels, kHeight, kWidth}),
                    roi_tensor, kScale, kBins, kBins, sampling, aligned));
  check_equal(grad_input,
              call1("detkit::_roi_align_backward", "",
                    tensor(grad, {count, channels, kBins, kBins}), roi_tensor, kScale, kBins, kBins,
                    kBatch, channels, kHeight, kWidth, sampling, aligned));
}

// The dispatcher's two outputs.
std::tuple<Tensor, Tensor> ps_roi_align(const Tensor& input, const Tensor& boxes, int64_t sampling,
                                        bool reduce_max, double offset) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 8> stack{from(input), from(boxes),    from(kScale),     from(kBins),
                                    from(kBins), from(sampling), from(reduce_max), from(offset)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("detkit::ps_roi_align", "", stack.data(), TORCH_ABI_VERSION));
  return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
}

template <class T>
void compare_ps_roi_align(int64_t sampling, bool reduce_max, double offset) {
  const int64_t channels = kDepth * kBins * kBins;
  const auto boxes = rois<T>();
  const auto count = int64_t(boxes.size() / 5);
  const auto input = random_values<T>(kBatch * channels * kHeight * kWidth, 3);
  const auto grad = random_values<T>(count * channels, 4);
  const RoiSpec spec = detkit::ps_roi_align_spec(kBatch, channels, kHeight, kWidth, kBins, kBins,
                                                 kScale, sampling, reduce_max, offset);
  std::vector<T> output(grad.size()), grad_input(input.size(), T(0));
  std::vector<int32_t> argmax(reduce_max ? grad.size() : 0);
  int32_t* winners = reduce_max ? argmax.data() : nullptr;
  detkit::cuda::ps_roi_align_forward<T, T>(spec, input.data(), boxes.data(), count, output.data(),
                                           winners, nullptr);
  detkit::cuda::ps_roi_align_backward<T, T>(spec, grad.data(), winners, boxes.data(), count,
                                            grad_input.data(), nullptr);
  const Tensor roi_tensor = tensor(boxes, {count, 5});
  const auto [expected, expected_argmax] = ps_roi_align(
      tensor(input, {kBatch, channels, kHeight, kWidth}), roi_tensor, sampling, reduce_max, offset);
  check_equal(output, expected);
  check_equal(grad_input, call1("detkit::_ps_roi_align_backward", "",
                                tensor(grad, {count, kDepth, kBins, kBins}), roi_tensor,
                                expected_argmax, kScale, kBins, kBins, sampling, reduce_max, offset,
                                kBatch, channels, kHeight, kWidth));
}

}  // namespace

TEST(roi_align_in_float32) {
  for (const int64_t sampling : {-1, 2}) {
    compare_roi_align<float>(sampling, true);
    compare_roi_align<float>(sampling, false);
  }
}

TEST(roi_align_in_float64) { compare_roi_align<double>(-1, true); }

TEST(mean_ps_roi_align) {
  compare_ps_roi_align<float>(-1, false, 0.5);
  compare_ps_roi_align<double>(2, false, 0.5);
}

TEST(max_ps_roi_align) {
  compare_ps_roi_align<float>(2, true, 0.0);
  compare_ps_roi_align<double>(3, true, 0.0);
}
