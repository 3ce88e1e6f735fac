// Every CUDA operator, emulated on the CPU as detkit_emulated::*, against its CPU operator.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "tests/check.h"
#include "torch_stable.h"

using detkit::ScalarType;
using detkit::Tensor;

namespace {

namespace boxed = torch::stable::detail;
using Ints = std::vector<int64_t>;
constexpr auto kNoBias = std::optional<Tensor>();
const std::vector<ScalarType> kTypes{ScalarType::Float, ScalarType::Double, ScalarType::Half,
                                     ScalarType::BFloat16};

// How far two roundings of sums of a few dozen numbers near 1 may lie apart.
double tolerance(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return 1e-12;
    case ScalarType::Float:
      return 3e-5;
    case ScalarType::Half:
      return 2e-2;
    default:
      return 2e-1;
  }
}

Tensor tensor(const std::vector<double>& values, const Ints& sizes, ScalarType type) {
  const Tensor wide = torch::stable::empty(sizes, ScalarType::Double);
  std::copy(values.begin(), values.end(), wide.mutable_data_ptr<double>());
  return torch::stable::to(wide, type);
}

Tensor random(const Ints& sizes, ScalarType type, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<double> normal;
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  std::vector<double> values(count);
  for (double& v : values) v = normal(generator);
  return tensor(values, sizes, type);
}

Tensor channels_last(const Tensor& map) {
  const Tensor last = detkit::call1("aten::permute", "", map, Ints{0, 2, 3, 1});
  return detkit::call1("aten::permute", "", torch::stable::contiguous(last), Ints{0, 3, 1, 2});
}

std::vector<double> values(const Tensor& t) {
  const Tensor wide = torch::stable::contiguous(torch::stable::to(t, ScalarType::Double));
  const auto* data = wide.const_data_ptr<double>();
  return {data, data + wide.numel()};
}

void check_same(const std::string& what, const Tensor& ours, const Tensor& expected,
                double tolerance) {
  const auto a = values(ours), b = values(expected);
  bool same = a.size() == b.size() && ours.scalar_type() == expected.scalar_type() &&
              Ints(ours.sizes().begin(), ours.sizes().end()) ==
                  Ints(expected.sizes().begin(), expected.sizes().end());
  for (size_t i = 0; same && i < a.size(); ++i) {
    same = detkit::test::near(a[i], b[i], tolerance * std::max(1.0, std::abs(b[i])));
  }
  if (!same) detkit::test::fail(__FILE__, __LINE__, what + ": CUDA and CPU operators differ");
}

// The outputs of an operator of either library.
template <class... Args>
auto call(const std::string& op, const Args&... args) {
  constexpr size_t size = sizeof...(Args) > 3 ? sizeof...(Args) : 3;
  std::array<StableIValue, size> stack{boxed::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op.c_str(), "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

// Compares the operator's outputs, `count` tensors; returns the CPU's.
template <class... Args>
std::vector<Tensor> compare(const std::string& op, size_t count, double tolerance,
                            const Args&... args) {
  auto emulated = call("detkit_emulated::" + op, args...);
  auto expected = call("detkit::" + op, args...);
  std::vector<Tensor> outputs;
  for (size_t i = 0; i < count; ++i) {
    outputs.push_back(boxed::to<Tensor>(expected[i]));
    check_same(op, boxed::to<Tensor>(emulated[i]), outputs.back(), tolerance);
  }
  return outputs;
}

ScalarType coordinates(ScalarType features) {
  return features == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor rois(ScalarType features) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const std::vector<double> rows{
      0, 1,   2,   9,   11,   // inside
      1, 0,   0,   14,  18,   // the whole map
      1, -30, -30, -20, -20,  // outside
      0, 5,   5,   5,   5,    // empty
      1, 10,  9,   3,   2,    // inverted
      0, -5,  -4,  40,  50,   // across every border
      1, nan, 1,   5,   5,
  };
  return tensor(rows, {7, 5}, coordinates(features));
}

}  // namespace

namespace {

struct Candidates {
  std::vector<double> boxes, scores, classes;
};

// Boxes on a small grid, so that many overlap, and by just the threshold; many scores are equal.
Candidates candidates(int n, int classes, int area) {
  std::mt19937 generator(n + classes);
  Candidates all;
  for (int i = 0; i < n; ++i) {
    const double x = generator() % area, y = generator() % area;
    all.boxes.insert(all.boxes.end(), {x, y, x + generator() % 16, y + generator() % 16});
    all.scores.push_back(generator() % 50);
    all.classes.push_back(double(generator() % classes) - 1);
  }
  if (n > 60) all.boxes[4 * 7 + 1] = std::numeric_limits<double>::quiet_NaN();
  return all;
}

void compare_nms(const Candidates& all, ScalarType type, double threshold) {
  const auto n = int64_t(all.scores.size());
  const Tensor b = tensor(all.boxes, {n, 4}, type), s = tensor(all.scores, {n}, type);
  const auto idxs = std::optional(tensor(all.classes, {n}, ScalarType::Long));
  compare("nms", 1, 0, b, s, threshold);
  compare("batched_nms", 1, 0, b, s, *idxs, threshold);
  for (const int64_t limit : {int64_t(0), int64_t(10), n + 3}) {
    compare("nms_padded", 2, 0, b, s, std::optional<Tensor>(), threshold, limit);
    compare("nms_padded", 2, 0, b, s, idxs, threshold, limit);
  }
}

}  // namespace

TEST(nms) {
  for (const int n : {0, 1, 63, 64, 65, 300}) {
    for (const ScalarType type : kTypes) {
      for (const double threshold : {0.0, 0.25, 2.0 / 3, 1.0}) {
        compare_nms(candidates(n, 3, 40), type, threshold);
      }
    }
  }
}

// Survivors suppress boxes of their own chunk, of the next one, and of later ones.
TEST(nms_over_several_chunks) {
  for (const int n : {511, 512, 513, 1024, 1025, 2300}) {
    compare_nms(candidates(n, 4, 60), ScalarType::Float, 0.3);
    compare_nms(candidates(n, 200, 400), ScalarType::Float, 0.1);
  }
}

// Each box overlaps its neighbours only: every second one stays, by as many rounds as there are
// boxes in a chunk.
TEST(nms_of_a_chain) {
  Candidates chain;
  for (int i = 0; i < 1300; ++i) {
    chain.boxes.insert(chain.boxes.end(), {4.0 * i, 0, 4.0 * i + 6, 5});
    chain.scores.push_back(-i);
    chain.classes.push_back(0);
  }
  compare_nms(chain, ScalarType::Float, 0.1);
}

TEST(roi_align) {
  const int64_t n = 2, c = 3, h = 9, w = 7, bins = 3;
  for (const ScalarType type : kTypes) {
    const Tensor boxes = rois(type), input = random({n, c, h, w}, type, 1);
    const Tensor grad = random({boxes.size(0), c, bins, bins}, type, 2);
    for (const int64_t sampling : {-1, 2}) {
      for (const bool aligned : {false, true}) {
        for (const Tensor& x : {input, channels_last(input)}) {
          compare("roi_align", 1, tolerance(type), x, boxes, 0.5, bins, bins, sampling, aligned);
        }
        compare("_roi_align_backward", 1, tolerance(type), grad, boxes, 0.5, bins, bins, n, c, h, w,
                sampling, aligned);
      }
    }
  }
}

TEST(ps_roi_align) {
  const int64_t n = 2, depth = 2, h = 9, w = 7, bins = 3, c = depth * bins * bins;
  for (const ScalarType type : kTypes) {
    const Tensor boxes = rois(type), input = random({n, c, h, w}, type, 3);
    const Tensor grad = random({boxes.size(0), depth, bins, bins}, type, 4);
    for (const bool reduce_max : {false, true}) {
      const double offset = reduce_max ? 0.0 : 0.5;
      for (const int64_t sampling : {int64_t(2), reduce_max ? int64_t(3) : int64_t(-1)}) {
        const auto outputs = compare("ps_roi_align", 2, tolerance(type), input, boxes, 0.5, bins,
                                     bins, sampling, reduce_max, offset);
        compare("_ps_roi_align_backward", 1, tolerance(type), grad, boxes, outputs[1], 0.5, bins,
                bins, sampling, reduce_max, offset, n, c, h, w);
      }
    }
  }
}

TEST(dilated_conv2d) {
  for (const ScalarType type : kTypes) {
    for (const int64_t groups : {1, 2}) {
      const Tensor input = random({2, 8, 9, 7}, type, 5), bias = random({6}, type, 6);
      const Tensor weight = random({6, 8 / groups, 3, 3}, type, 7);
      for (const Tensor& x : {input, channels_last(input)}) {
        const auto outputs =
            compare("dilated_conv2d", 1, 10 * tolerance(type), x, weight,
                    std::optional<Tensor>(bias), Ints{2, 1}, Ints{2, 3}, Ints{2, 3}, groups);
        compare("_dilated_conv2d_backward", 2, 40 * tolerance(type), outputs[0], x, weight,
                Ints{2, 1}, Ints{2, 3}, Ints{2, 3}, groups, true, true);
      }
    }
  }
}

TEST(scaled_conv2d) {
  for (const ScalarType type : kTypes) {
    const Tensor scales = tensor({2.37, 1.61, 0.4, 3.0}, {2, 2}, coordinates(type));
    for (const int64_t groups : {1, 2}) {
      // 8 channels load in packs, 3 do not
      for (const int64_t channels : {8, 3}) {
        if (channels % groups != 0) continue;
        const Tensor input = random({2, channels, 9, 7}, type, 8);
        const Tensor weight = random({6, channels / groups, 3, 3}, type, 9);
        const auto outputs = compare("scaled_conv2d", 1, 10 * tolerance(type), input, weight,
                                     scales, kNoBias, Ints{1, 2}, groups);
        compare("_scaled_conv2d_backward", 3, 100 * tolerance(type), random({2, 6, 9, 4}, type, 10),
                input, weight, scales, Ints{1, 2}, groups, true, true, true);
        CHECK(outputs[0].size(2) == 9 && outputs[0].size(3) == 4);
      }
    }
  }
}

// Its backward returns a list, which torch's C++ dispatcher call cannot hand over beside a tensor:
// split_backward.py compares it.
TEST(split_conv2d) {
  const Ints dilations{1, 1, 2, 3, 0, 2}, stride{1, 2};
  for (const ScalarType type : kTypes) {
    const Tensor input = random({2, 8, 9, 7}, type, 11);
    const std::vector<Tensor> weights{random({3, 8, 3, 3}, type, 13),
                                      random({2, 8, 3, 3}, type, 14),
                                      random({1, 8, 1, 3}, type, 15)};
    compare("split_conv2d", 1, 10 * tolerance(type), input, weights,
            std::optional<Tensor>(random({6}, type, 16)), dilations, stride, int64_t(1));
  }
}
