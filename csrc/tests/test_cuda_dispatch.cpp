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

using Ints3 = std::array<int64_t, 3>;

struct Sizes {
  int64_t channels, bins, boxes;
};

// Boxes of a map of about 20 x 20 at scale 0.5, some across its border.
Tensor random_rois(int64_t count, int64_t batch, ScalarType type) {
  std::mt19937 generator(count);
  std::vector<double> rows;
  for (int64_t i = 0; i < count; ++i) {
    const double x = double(generator() % 400) / 10 - 4, y = double(generator() % 400) / 10 - 4;
    const double across = double(generator() % 150) / 10, down = double(generator() % 150) / 10;
    rows.insert(rows.end(), {double(generator() % batch), x, y, x + across, y + down});
  }
  return tensor(rows, {count, 5}, type);
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
  for (const int64_t limit : n < 400 ? Ints{0, 10, n + 3} : Ints{10}) {
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
        for (const bool deterministic : {false, true}) {
          compare("_roi_align_backward", 1, tolerance(type), grad, boxes, 0.5, bins, bins, n, c, h,
                  w, sampling, aligned, deterministic);
        }
      }
    }
  }
}

// More boxes, bins, channels and positions than a block takes: packs of channels, and single ones.
TEST(roi_align_over_several_blocks) {
  const int64_t n = 2, h = 20, w = 18;
  for (const auto& [c, bins, count] : {Sizes{72, 3, 260}, Sizes{36, 9, 7}, Sizes{35, 17, 5}}) {
    const Tensor boxes = random_rois(count, n, ScalarType::Float);
    for (const ScalarType type : {ScalarType::Float, ScalarType::Half}) {
      const Tensor x = channels_last(random({n, c, h, w}, type, 20));
      compare("roi_align", 1, tolerance(type), x, boxes, 0.5, bins, bins, int64_t(-1), true);
    }
    const Tensor grad = random({count, c, bins, bins}, ScalarType::Float, 21);
    for (const bool deterministic : {false, true}) {
      compare("_roi_align_backward", 1, 1e-3, grad, boxes, 0.5, bins, bins, n, c, h, w, int64_t(-1),
              true, deterministic);
    }
  }
}

TEST(ps_roi_align_over_several_blocks) {
  const int64_t n = 2, depth = 34, bins = 2, c = depth * bins * bins, h = 17, w = 12, count = 260;
  const Tensor boxes = random_rois(count, n, ScalarType::Float);
  const Tensor x = random({n, c, h, w}, ScalarType::Float, 22);
  const Tensor grad = random({count, depth, bins, bins}, ScalarType::Float, 23);
  for (const bool reduce_max : {false, true}) {
    const auto outputs = compare("ps_roi_align", 2, 1e-4, channels_last(x), boxes, 0.5, bins, bins,
                                 int64_t(2), reduce_max, 0.0);
    compare("_ps_roi_align_backward", 1, 1e-3, grad, boxes, outputs[1], 0.5, bins, bins, int64_t(2),
            reduce_max, 0.0, n, c, h, w, true);
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
        for (const bool deterministic : {false, true}) {
          compare("_ps_roi_align_backward", 1, tolerance(type), grad, boxes, outputs[1], 0.5, bins,
                  bins, sampling, reduce_max, offset, n, c, h, w, deterministic);
        }
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
        const auto outputs = compare("dilated_conv2d", 1, 10 * tolerance(type), x, weight,
                                     std::optional<Tensor>(bias), Ints{2, 1}, Ints{2, 3},
                                     Ints{2, 3}, groups, int64_t(0), false);
        for (const auto& shift : {std::optional<Tensor>(bias), kNoBias}) {
          const auto cut = compare("dilated_conv2d", 1, 10 * tolerance(type), x, weight, shift,
                                   Ints{2, 1}, Ints{2, 3}, Ints{2, 3}, groups, int64_t(0), true);
          for (const double y : values(cut[0])) CHECK(y >= 0);
        }
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
                                     scales, kNoBias, Ints{1, 2}, groups, int64_t(0), false);
        compare("scaled_conv2d", 1, 10 * tolerance(type), input, weight, scales, kNoBias,
                Ints{1, 2}, groups, int64_t(0), true);
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
    for (const bool relu : {false, true}) {
      compare("split_conv2d", 1, 10 * tolerance(type), input, weights,
              std::optional<Tensor>(random({6}, type, 16)), dilations, stride, int64_t(1),
              int64_t(0), relu);
    }
  }
}

namespace {

// The fused CUDA operator against the CPU's, which has no such algorithm; both with ReLU or
// without.
template <class... Args>
void compare_fused(const std::string& op, double tolerance, const Args&... args) {
  for (const bool relu : {false, true}) {
    auto fused = call("detkit_emulated::" + op, args..., int64_t(1), relu);
    auto expected = call("detkit::" + op, args..., int64_t(0), relu);
    check_same(op + ", fused", boxed::to<Tensor>(fused[0]), boxed::to<Tensor>(expected[0]),
               tolerance);
  }
}

const std::vector<ScalarType> kFusedTypes{ScalarType::Float, ScalarType::Half,
                                          ScalarType::BFloat16};

// Floats are multiplied with the mantissa of a half.
double fused_tolerance(ScalarType type) {
  return 4 * tolerance(type == ScalarType::Float ? ScalarType::Half : type);
}

}  // namespace

// Depth of less than a step and of many, outputs that end inside a tile, odd numbers of them,
// groups, strides, kernels beyond the map; small tiles and, for three and more of them, large ones.
TEST(fused_dilated_conv2d) {
  struct Case {
    int64_t batch, channels, outputs, height, width, kernel, groups;
    Ints stride, padding, dilation;
  };
  const std::vector<Case> cases{
      {1, 8, 8, 5, 4, 3, 1, {1, 1}, {1, 1}, {1, 1}},
      {2, 16, 6, 9, 7, 3, 1, {2, 1}, {2, 3}, {2, 3}},
      {1, 48, 70, 7, 11, 3, 1, {1, 2}, {9, 9}, {9, 9}},
      {3, 32, 10, 6, 6, 1, 2, {1, 1}, {0, 0}, {1, 1}},
      {1, 16, 7, 8, 9, 5, 1, {1, 1}, {4, 2}, {2, 1}},
      {2, 16, 130, 13, 12, 3, 2, {1, 1}, {1, 1}, {1, 1}},
      {4, 8, 9, 12, 10, 3, 1, {1, 1}, {1, 1}, {1, 1}},
      {0, 8, 8, 5, 4, 3, 1, {1, 1}, {1, 1}, {1, 1}},
  };
  unsigned seed = 30;
  for (const Case& c : cases) {
    for (const ScalarType type : kFusedTypes) {
      const Tensor x = random({c.batch, c.channels, c.height, c.width}, type, ++seed);
      const Tensor weight =
          random({c.outputs, c.channels / c.groups, c.kernel, c.kernel}, type, ++seed);
      const auto bias = std::optional(random({c.outputs}, type, ++seed));
      for (const auto& shift : {bias, kNoBias}) {
        compare_fused("dilated_conv2d", fused_tolerance(type), x, weight, shift, c.stride,
                      c.padding, c.dilation, c.groups);
      }
    }
  }
}

// Floats are rounded to the nearest number of 10 bits of mantissa before they are multiplied.
TEST(fused_rounds_floats_to_tf32) {
  const auto product = [](double x, double w) {
    const Tensor a = tensor(std::vector<double>(4, x), {1, 4, 1, 1}, ScalarType::Float);
    const Tensor b = tensor({w, 0, 0, 0}, {1, 4, 1, 1}, ScalarType::Float);
    return values(
        boxed::to<Tensor>(call("detkit_emulated::dilated_conv2d", a, b, kNoBias, Ints{1, 1},
                               Ints{0, 0}, Ints{1, 1}, int64_t(1), int64_t(1), false)[0]))[0];
  };
  const double step = std::ldexp(1.0, -10);
  CHECK(product(1 + 0.75 * step, 1) == 1 + step);
  CHECK(product(1 + 0.25 * step, 1) == 1);
  CHECK(product(-3, 1 + 0.5 * step) == -3 * (1 + step));
}

TEST(fused_scaled_conv2d) {
  const Tensor scales = tensor({2.37, 1.61, 0.4, 3.0, -1.5, 40.0}, {3, 2}, ScalarType::Float);
  for (const ScalarType type : kFusedTypes) {
    for (const auto& [channels, outputs, groups] :
         {Ints3{8, 5, 1}, Ints3{48, 70, 1}, Ints3{32, 12, 2}}) {
      const Tensor x = random({3, channels, 9, 11}, type, 50);
      const Tensor weight = random({outputs, channels / groups, 3, 3}, type, 51);
      const auto bias = std::optional(random({outputs}, type, 52));
      compare_fused("scaled_conv2d", fused_tolerance(type), channels_last(x), weight, scales, bias,
                    Ints{1, 1}, groups);
      compare_fused("scaled_conv2d", fused_tolerance(type), x, weight, scales, kNoBias, Ints{2, 3},
                    groups);
    }
  }
}

// A sample with a non-finite scale is NaN, the CPU operator refuses it.
TEST(fused_scaled_conv2d_of_a_non_finite_scale) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const Tensor scales = tensor({nan, 1.5, 2.5, 1.5}, {2, 2}, ScalarType::Float);
  const Tensor x = random({2, 8, 6, 5}, ScalarType::Half, 53);
  const Tensor weight = random({4, 8, 3, 3}, ScalarType::Half, 54);
  auto fused = call("detkit_emulated::scaled_conv2d", x, weight, scales, kNoBias, Ints{1, 1},
                    int64_t(1), int64_t(1), true);
  const auto y = values(boxed::to<Tensor>(fused[0]));
  for (size_t i = 0; i < y.size(); ++i) CHECK(std::isnan(y[i]) == (i < y.size() / 2));
}

// More parts than a launch takes, each with its own kernel, dilation and end of a tile.
TEST(fused_split_conv2d) {
  const Ints dilations{1, 1, 2, 3, 0, 2, 4, 4, 1, 1};
  for (const ScalarType type : kFusedTypes) {
    const Tensor x = random({2, 16, 9, 7}, type, 60);
    const std::vector<Tensor> weights{
        random({3, 16, 3, 3}, type, 61), random({66, 16, 3, 3}, type, 62),
        random({5, 16, 1, 3}, type, 63), random({64, 16, 5, 3}, type, 64),
        random({2, 16, 1, 1}, type, 65)};
    compare_fused("split_conv2d", fused_tolerance(type), x, weights,
                  std::optional<Tensor>(random({140}, type, 66)), dilations, Ints{1, 2},
                  int64_t(1));
  }
}

TEST(fused_refuses_what_does_not_fit) {
  const auto refuses = [](const Tensor& x, const Tensor& weight) {
    try {
      call("detkit_emulated::dilated_conv2d", x, weight, kNoBias, Ints{1, 1}, Ints{1, 1},
           Ints{1, 1}, int64_t(1), int64_t(1), false);
    } catch (const std::exception&) {
      return true;
    }
    return false;
  };
  CHECK(refuses(random({1, 8, 5, 5}, ScalarType::Double, 1),
                random({4, 8, 3, 3}, ScalarType::Double, 2)));
  for (const auto& [type, channels] :
       {std::pair(ScalarType::Half, 12), std::pair(ScalarType::Float, 6)}) {
    CHECK(refuses(random({1, channels, 5, 5}, type, 1), random({4, channels, 3, 3}, type, 2)));
  }
}
