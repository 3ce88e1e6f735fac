#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "cpu/ps_roi_align_kernel.h"
#include "cpu/roi_align_kernel.h"
#include "tests/check.h"

using namespace detkit;
using namespace detkit::cpu;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

std::vector<double> random_values(int64_t count, int seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(count);
  for (double& v : values) v = normal(generator);
  return values;
}

// Boxes that reach over the border of a map of that size, some with sides swapped.
std::vector<double> random_boxes(int64_t count, const RoiSpec& spec) {
  std::mt19937 generator(7);
  std::uniform_real_distribution<double> at(-0.3, 1.2);
  std::vector<double> rois;
  for (int64_t r = 0; r < count; ++r) {
    const double w = double(spec.width) / spec.spatial_scale;
    const double h = double(spec.height) / spec.spatial_scale;
    const std::vector<double> box{double(r % spec.batch), at(generator) * w, at(generator) * h,
                                  at(generator) * w, at(generator) * h};
    rois.insert(rois.end(), box.begin(), box.end());
  }
  return rois;
}

MapStrides planes(const RoiSpec& spec) {
  return {spec.channels * spec.height * spec.width, spec.height * spec.width, spec.width, 1};
}

int64_t map_size(const RoiSpec& spec) {
  return spec.batch * spec.channels * spec.height * spec.width;
}

// The definition, written out: one sample of one plane by torchvision's border rule.
double clamped_sample(const double* plane, int64_t height, int64_t width, double y, double x) {
  if (!(y >= -1 && y <= double(height) && x >= -1 && x <= double(width))) return 0;
  y = std::clamp(y, 0.0, double(height - 1));
  x = std::clamp(x, 0.0, double(width - 1));
  const auto top = int64_t(y), left = int64_t(x);
  const int64_t bottom = std::min(top + 1, height - 1), right = std::min(left + 1, width - 1);
  const double b = y - double(top), r = x - double(left);
  const double upper = plane[top * width + left] * (1 - r) + plane[top * width + right] * r;
  const double lower = plane[bottom * width + left] * (1 - r) + plane[bottom * width + right] * r;
  return upper * (1 - b) + lower * b;
}

// And by the border rule of the maximum: what is off the map counts 0.
double zero_border_sample(const double* plane, int64_t height, int64_t width, double y, double x) {
  double value = 0;
  for (const double row : {std::floor(y), std::floor(y) + 1}) {
    for (const double column : {std::floor(x), std::floor(x) + 1}) {
      if (row < 0 || row >= double(height) || column < 0 || column >= double(width)) continue;
      const double weight = (1 - std::abs(y - row)) * (1 - std::abs(x - column));
      value += weight * plane[int64_t(row) * width + int64_t(column)];
    }
  }
  return value;
}

// The samples of one bin of one box on one plane.
std::vector<double> bin_samples(const RoiSpec& spec, const double* roi, const double* plane,
                                int64_t row, int64_t column) {
  double low[2], bin[2];
  int64_t grid[2];
  for (int axis = 0; axis < 2; ++axis) {
    low[axis] = roi[2 - axis] * spec.spatial_scale - spec.offset;
    double extent = roi[4 - axis] * spec.spatial_scale - spec.offset - low[axis];
    if (spec.has_floor) extent = std::max(extent, spec.floor);
    bin[axis] = extent / double(axis == 0 ? spec.bins_down : spec.bins_across);
    grid[axis] = spec.sampling_ratio > 0 ? spec.sampling_ratio
                                         : std::max<int64_t>(0, int64_t(std::ceil(bin[axis])));
  }
  std::vector<double> samples;
  for (int64_t i = 0; i < grid[0]; ++i) {
    for (int64_t j = 0; j < grid[1]; ++j) {
      const double y = low[0] + bin[0] * (double(row) + (double(i) + 0.5) / double(grid[0]));
      const double x = low[1] + bin[1] * (double(column) + (double(j) + 0.5) / double(grid[1]));
      samples.push_back((spec.zero_border ? zero_border_sample : clamped_sample)(plane, spec.height,
                                                                                 spec.width, y, x));
    }
  }
  return samples;
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / double(std::max<size_t>(values.size(), 1));
}

template <class A>
RoiAlignPlan<A> roi_plan(const RoiSpec& spec, const std::vector<A>& rois, int64_t lanes) {
  const auto count = int64_t(rois.size() / 5);
  RoiAlignPlan<A> plan{spec, group_by_image(rois.data(), count, spec),
                       std::vector<RoiWeights<A>>(count), lanes};
  roi_align_prepare(plan, rois.data(), 0, count);
  return plan;
}

template <class A>
PsRoiAlignPlan<A> ps_plan(const RoiSpec& spec, bool reduce_max, const std::vector<A>& rois) {
  const auto count = int64_t(rois.size() / 5);
  PsRoiAlignPlan<A> plan(spec, reduce_max, rois.data(), count);
  ps_roi_align_prepare(plan, rois.data(), 0, plan.boxes());
  return plan;
}

// In two parts each, the second before the first.
template <class A>
void ps_forward(const PsRoiAlignPlan<A>& plan, const std::vector<A>& input, std::vector<A>& output,
                std::vector<int32_t>& argmax) {
  const Scratch<A> pooled(plan.pooled_size());
  const int64_t middle = plan.work() / 3, half = plan.boxes() / 2;
  const MapStrides strides = planes(plan.spec);
  ps_roi_align_forward(plan, input.data(), strides, pooled.get(), argmax.data(), middle,
                       plan.work());
  ps_roi_align_forward(plan, input.data(), strides, pooled.get(), argmax.data(), 0, middle);
  ps_roi_align_collect(plan, pooled.get(), output.data(), half, plan.boxes());
  ps_roi_align_collect(plan, pooled.get(), output.data(), 0, half);
}

template <class A>
void ps_backward(const PsRoiAlignPlan<A>& plan, const std::vector<A>& grad,
                 const std::vector<int32_t>& argmax, std::vector<A>& grad_input) {
  const Scratch<A> shares(plan.pooled_size());
  const int64_t middle = plan.work() / 3, half = plan.boxes() / 2;
  ps_roi_align_distribute(plan, grad.data(), shares.get(), half, plan.boxes());
  ps_roi_align_distribute(plan, grad.data(), shares.get(), 0, half);
  ps_roi_align_backward(plan, shares.get(), argmax.data(), grad_input.data(), middle, plan.work());
  ps_roi_align_backward(plan, shares.get(), argmax.data(), grad_input.data(), 0, middle);
}

double inner_product(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

constexpr int64_t kBoxes = 12;

}  // namespace

TEST(roi_align_equals_the_definition_in_blocks_of_any_width) {
  for (const int64_t ratio : {-1, 2}) {
    for (const bool aligned : {false, true}) {
      const RoiSpec spec = roi_align_spec(2, 70, 9, 13, 3, 5, 0.5, ratio, aligned);
      const auto input = random_values(map_size(spec), 1), rois = random_boxes(kBoxes, spec);
      const int64_t size = spec.channels * 15;
      for (const int64_t lanes : {16, 32, 64}) {
        const auto plan = roi_plan(spec, rois, lanes);
        std::vector<double> output(kBoxes * size, kNan);
        const int64_t middle = plan.work() / 2;
        roi_align_forward(plan, input.data(), planes(spec), output.data(), middle, plan.work());
        roi_align_forward(plan, input.data(), planes(spec), output.data(), 0, middle);
        for (int64_t i = 0; i < kBoxes * size; ++i) {
          const double* roi = rois.data() + i / size * 5;
          const int64_t channel = i / 15 % spec.channels;
          const double* plane =
              input.data() + (int64_t(roi[0]) * spec.channels + channel) * spec.height * spec.width;
          const double expected = mean(bin_samples(spec, roi, plane, i / 5 % 3, i % 5));
          CHECK_NEAR(output[i], expected, 1e-12);
        }
      }
    }
  }
}

TEST(roi_align_backward_is_the_adjoint) {
  const RoiSpec spec = roi_align_spec(2, 70, 9, 13, 3, 5, 0.5, -1, false);
  const auto input = random_values(map_size(spec), 1), rois = random_boxes(kBoxes, spec);
  const auto grad = random_values(kBoxes * spec.channels * 15, 2);
  for (const int64_t lanes : {16, 32, 64}) {
    const auto plan = roi_plan(spec, rois, lanes);
    std::vector<double> output(grad.size()), grad_input(input.size(), kNan);
    roi_align_forward(plan, input.data(), planes(spec), output.data(), 0, plan.work());
    roi_align_backward(plan, grad.data(), grad_input.data(), 0, plan.work());
    CHECK_NEAR(inner_product(output, grad), inner_product(input, grad_input), 1e-9);
  }
}

TEST(roi_align_takes_any_strides) {
  const RoiSpec spec = roi_align_spec(1, 20, 6, 7, 2, 2, 1.0, 2, true);
  const auto input = random_values(map_size(spec), 1), rois = random_boxes(kBoxes, spec);
  std::vector<double> channels_last(input.size());
  for (int64_t c = 0; c < 20; ++c) {
    for (int64_t p = 0; p < 42; ++p) channels_last[p * 20 + c] = input[c * 42 + p];
  }
  const auto plan = roi_plan(spec, rois, 32);
  std::vector<double> output(kBoxes * 80), other(kBoxes * 80);
  roi_align_forward(plan, input.data(), planes(spec), output.data(), 0, plan.work());
  roi_align_forward(plan, channels_last.data(), MapStrides{840, 1, 140, 20}, other.data(), 0,
                    plan.work());
  CHECK(output == other);
}

// Twelve boxes are many on this map; two samples a side have code of their own.
TEST(ps_roi_align_equals_the_definition) {
  for (const bool maximum : {false, true}) {
    for (const int64_t ratio : {-1, 2, 3}) {
      const RoiSpec spec =
          ps_roi_align_spec(2, 19 * 6, 9, 13, 2, 3, 0.5, ratio, maximum, maximum ? 0.0 : 0.5);
      const auto input = random_values(map_size(spec), 1), rois = random_boxes(kBoxes, spec);
      const auto plan = ps_plan(spec, maximum, rois);
      std::vector<double> output(kBoxes * spec.channels, kNan);
      std::vector<int32_t> argmax(output.size(), -1);
      ps_forward(plan, input, output, argmax);
      for (int64_t i = 0; i < int64_t(output.size()); ++i) {
        const double* roi = rois.data() + i / spec.channels * 5;
        const int64_t map = int64_t(roi[0]) * spec.channels + i % spec.channels;
        const auto samples =
            bin_samples(spec, roi, input.data() + map * spec.height * spec.width, i / 3 % 2, i % 3);
        if (!maximum) {
          CHECK_NEAR(output[i], mean(samples), 1e-12);
          continue;
        }
        const double largest = *std::max_element(samples.begin(), samples.end());
        CHECK_NEAR(output[i], largest, 1e-12);
        CHECK(argmax[i] >= 0 && argmax[i] < int32_t(samples.size()));
        CHECK_NEAR(samples[argmax[i]], largest, 1e-12);
      }
    }
  }
}

TEST(ps_roi_align_backward_is_the_adjoint) {
  for (const auto& [ratio, maximum] : {std::pair{2, false}, {3, false}, {2, true}}) {
    const RoiSpec spec =
        ps_roi_align_spec(2, 19 * 6, 9, 13, 2, 3, 0.5, ratio, maximum, maximum ? 0.0 : 0.5);
    const auto input = random_values(map_size(spec), 1), rois = random_boxes(kBoxes, spec);
    const auto grad = random_values(kBoxes * spec.channels, 2);
    const auto plan = ps_plan(spec, maximum, rois);
    std::vector<double> output(grad.size()), grad_input(input.size(), kNan);
    std::vector<int32_t> argmax(grad.size());
    ps_forward(plan, input, output, argmax);
    ps_backward(plan, grad, argmax, grad_input);
    // the maximum is linear too once its winners are fixed
    CHECK_NEAR(inner_product(output, grad), inner_product(input, grad_input), 1e-9);
  }
}

TEST(odd_boxes_stay_in_bounds) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> values{0,    -1,     1e-30f, 5.5f, -1e6f,      1e6f,
                                  3e9f, -3e38f, 3e38f,  inf,  float(kNan)};
  std::vector<float> rois;
  for (const float a : values) {
    for (const float b : values) {
      for (const auto& box : {std::vector{0.f, a, 1.f, b, 4.f}, std::vector{0.f, 1.f, a, 4.f, b},
                              std::vector{0.f, a, a, b, b}, std::vector{a, 0.f, 0.f, 4.f, b}}) {
        rois.insert(rois.end(), box.begin(), box.end());
      }
    }
  }
  const auto count = int64_t(rois.size() / 5);
  for (const int64_t ratio : {-1, 2}) {
    const RoiSpec align = roi_align_spec(1, 6, 4, 5, 2, 3, 1.0, ratio, false);
    const std::vector<float> input(map_size(align), 1.f);
    const auto plan = roi_plan(align, rois, 16);
    std::vector<float> output(count * 36);
    roi_align_forward(plan, input.data(), planes(align), output.data(), 0, plan.work());
    const RoiSpec ps = ps_roi_align_spec(1, 6, 4, 5, 2, 3, 1.0, ratio, true, 0.0);
    const auto max_plan = ps_plan(ps, true, rois);
    std::vector<float> largest(count * 6);
    std::vector<int32_t> argmax(count * 6);
    ps_forward(max_plan, input, largest, argmax);
    // means of zeros and ones, and nothing else
    for (const float v : output) CHECK(v >= 0.f && v <= 1.0001f);
    for (const float v : largest) CHECK(v >= 0.f && v <= 1.0001f);
  }
}

TEST(a_window_holds_every_sample_on_the_map) {
  for (const double start : {-5e5, -3.3, 0.0, 2.5, 7e5}) {
    for (const double extent : {1.0, 300.0, 5e5, 1.2e6}) {
      RoiSpec spec = roi_align_spec(1, 1, 40, 40, 1, 1, 1.0, -1, false);
      const double roi[5] = {0, start, start, start + extent, start + extent};
      const RoiAxis<double> axis = roi_rows(roi, spec);
      const double begin = axis.bin_start(0);
      const RoiWindow window = roi_window(axis, begin);
      CHECK(window.begin >= 0 && window.end <= axis.grid);
      CHECK(window.end - window.begin <= 300);
      for (int64_t k = 0; k < axis.grid; ++k) {
        if (k == window.begin) k = std::max(window.begin, window.end - 1);
        if (k >= window.begin && k < window.end) continue;
        CHECK(!axis.taps(begin, k).low_inside);
      }
    }
  }
}
