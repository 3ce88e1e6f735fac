// The convolutions through the dispatcher, so that their buffers run under the sanitizers too:
// forward against plain loops, and each gradient against <y(x + v) - y(x), g> for a random v.
#include <cmath>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "tests/check.h"
#include "torch_stable.h"

using detkit::call1;
using detkit::ScalarType;
using detkit::Tensor;

namespace {

using Ints = std::vector<int64_t>;

struct Map {  // a dense tensor of doubles
  Ints sizes;
  std::vector<double> values;

  explicit Map(Ints sizes_, unsigned seed = 0) : sizes(std::move(sizes_)) {
    int64_t size = 1;
    for (const int64_t s : sizes) size *= s;
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < size; ++i) values.push_back(normal(random));
  }
  explicit Map(const Tensor& tensor) {
    const Tensor dense = torch::stable::contiguous(tensor);
    for (int64_t d = 0; d < dense.dim(); ++d) sizes.push_back(dense.size(d));
    const double* data = dense.const_data_ptr<double>();
    values.assign(data, data + dense.numel());
  }
  Tensor tensor() const {
    Ints strides(sizes.size(), 1);
    for (size_t d = sizes.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * sizes[d];
    return torch::stable::from_blob(const_cast<double*>(values.data()), sizes, strides,
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                    ScalarType::Double);
  }
  double at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    if (h < 0 || w < 0 || h >= sizes[2] || w >= sizes[3]) return 0;
    return values[((n * sizes[1] + c) * sizes[2] + h) * sizes[3] + w];
  }
};

double dot(const Map& a, const Map& b) {
  double sum = 0;
  for (size_t i = 0; i < a.values.size(); ++i) sum += a.values[i] * b.values[i];
  return sum;
}

Map moved(const Map& from, const Map& by, double step) {
  Map to = from;
  for (size_t i = 0; i < to.values.size(); ++i) to.values[i] += step * by.values[i];
  return to;
}

struct Sizes {
  int64_t batch, groups, group_in, group_out, height, width, kernel;
  Ints stride;
};

// One tile and several, few pixels in many samples, small products (depthwise), strides.
const std::vector<Sizes> kSizes = {
    {1, 1, 30, 20, 20, 23, 3, {1, 1}}, {17, 1, 20, 18, 5, 6, 3, {1, 1}},
    {2, 4, 1, 1, 9, 12, 3, {2, 1}},    {2, 2, 18, 16, 19, 17, 3, {2, 2}},
    {1, 1, 40, 24, 18, 19, 1, {1, 1}}, {0, 1, 4, 4, 5, 5, 3, {1, 1}},
};

// All gradients of an operator's backward, which returns several tensors.
template <class... Args>
std::vector<Tensor> backward(const char* op, int outputs, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  std::vector<Tensor> result;
  for (int i = 0; i < outputs; ++i) result.push_back(torch::stable::detail::to<Tensor>(stack[i]));
  return result;
}

template <class F>
void check_gradient(const Map& at, const Map& gradient, const Map& g, const F& run) {
  const Map direction(at.sizes, 77);
  constexpr double kStep = 1e-4;
  const double change = dot(run(moved(at, direction, kStep)), g) - dot(run(at), g);
  const double expected = dot(gradient, direction) * kStep;
  CHECK_NEAR(change, expected, 1e-8 + 1e-4 * std::abs(expected));
}

}  // namespace

TEST(dilated_conv_equals_loops) {
  for (const Sizes& s : kSizes) {
    const Map x({s.batch, s.groups * s.group_in, s.height, s.width}, 1);
    const Map w({s.groups * s.group_out, s.group_in, s.kernel, s.kernel}, 2);
    const Map bias({s.groups * s.group_out}, 3);
    const Ints padding{1, 3}, dilation{1, 2};
    const auto run = [&](const Map& input, const Map& weight) {
      return Map(call1("detkit::dilated_conv2d", "", input.tensor(), weight.tensor(),
                       std::optional<Tensor>(bias.tensor()), s.stride, padding, dilation, s.groups,
                       int64_t(0), false));
    };
    const Map y = run(x, w);
    for (size_t i = 0; i < y.values.size(); ++i) {
      const int64_t q = int64_t(i) % y.sizes[3], p = int64_t(i) / y.sizes[3] % y.sizes[2];
      const int64_t o = int64_t(i) / y.sizes[3] / y.sizes[2] % y.sizes[1];
      const int64_t n = int64_t(i) / y.sizes[3] / y.sizes[2] / y.sizes[1];
      double sum = bias.values[o];
      for (int64_t c = 0; c < s.group_in; ++c) {
        for (int64_t a = 0; a < s.kernel; ++a) {
          for (int64_t b = 0; b < s.kernel; ++b) {
            sum += w.at(o, c, a, b) * x.at(n, o / s.group_out * s.group_in + c,
                                           p * s.stride[0] + a - padding[0],
                                           q * s.stride[1] + 2 * b - padding[1]);
          }
        }
      }
      CHECK_NEAR(y.values[i], sum, 1e-10);
    }
    const Map g(y.sizes, 4);
    const auto grads = backward("detkit::_dilated_conv2d_backward", 2, g.tensor(), x.tensor(),
                                w.tensor(), s.stride, padding, dilation, s.groups, true, true);
    check_gradient(x, Map(grads[0]), g, [&](const Map& to) { return run(to, w); });
    check_gradient(w, Map(grads[1]), g, [&](const Map& to) { return run(x, to); });
  }
}

TEST(scaled_conv_gradients_are_slopes) {
  for (const Sizes& s : kSizes) {
    const Map x({s.batch, s.groups * s.group_in, s.height, s.width}, 1);
    const Map w({s.groups * s.group_out, s.group_in, s.kernel, s.kernel}, 2);
    Map scales({s.batch, 2});
    for (size_t i = 0; i < scales.values.size(); ++i) scales.values[i] = 0.3 + 0.37 * double(i % 9);
    const auto run = [&](const Map& input, const Map& weight, const Map& at) {
      return Map(call1("detkit::scaled_conv2d", "", input.tensor(), weight.tensor(), at.tensor(),
                       std::optional<Tensor>(), s.stride, s.groups, int64_t(0), false));
    };
    const Map y = run(x, w, scales), g(y.sizes, 4);
    const auto grads = backward("detkit::_scaled_conv2d_backward", 3, g.tensor(), x.tensor(),
                                w.tensor(), scales.tensor(), s.stride, s.groups, true, true, true);
    check_gradient(x, Map(grads[0]), g, [&](const Map& to) { return run(to, w, scales); });
    check_gradient(w, Map(grads[1]), g, [&](const Map& to) { return run(x, to, scales); });
    check_gradient(scales, Map(grads[2]), g, [&](const Map& to) { return run(x, w, to); });
  }
}

TEST(split_conv_is_its_parts) {
  const Map x({2, 12, 17, 19}, 1), a({9, 12, 3, 3}, 2), b({20, 12, 1, 3}, 3);
  const Ints stride{2, 1}, dilations{2, 1, 0, 3};
  const std::vector<Tensor> weights{a.tensor(), b.tensor()};
  const Map y(call1("detkit::split_conv2d", "", x.tensor(), weights, std::optional<Tensor>(),
                    dilations, stride, int64_t(1), int64_t(0), false));
  const auto part = [&](const Map& w, Ints padding, Ints dilation) {
    return Map(call1("detkit::dilated_conv2d", "", x.tensor(), w.tensor(), std::optional<Tensor>(),
                     stride, padding, dilation, int64_t(1), int64_t(0), false));
  };
  const Map first = part(a, {2, 1}, {2, 1}), second = part(b, {0, 3}, {1, 3});
  for (int64_t n = 0; n < 2; ++n) {
    for (int64_t o = 0; o < 29; ++o) {
      for (int64_t p = 0; p < y.sizes[2]; ++p) {
        for (int64_t q = 0; q < y.sizes[3]; ++q) {
          const double expected = o < 9 ? first.at(n, o, p, q) : second.at(n, o - 9, p, q);
          CHECK_NEAR(y.at(n, o, p, q), expected, 1e-12);
        }
      }
    }
  }
}

TEST(convolutions_refuse_what_does_not_fit) {
  const Map x({1, 4, 5, 5}), w({6, 4, 3, 3}), scales({1, 2});
  const Ints one{1, 1}, three{3, 3}, none{0, 0};
  const auto refuses = [](const auto& call) {
    try {
      call();
    } catch (const std::exception&) {
      return true;
    }
    return false;
  };
  CHECK(refuses([&] {  // the kernel does not fit into the input
    call1("detkit::dilated_conv2d", "", x.tensor(), w.tensor(), std::optional<Tensor>(), one, none,
          three, int64_t(1), int64_t(0), false);
  }));
  CHECK(refuses([&] {  // 4 channels in 3 groups
    call1("detkit::scaled_conv2d", "", x.tensor(), w.tensor(), scales.tensor(),
          std::optional<Tensor>(), one, int64_t(3), int64_t(0), false);
  }));
  CHECK(refuses([&] {  // a 3x3 kernel at dilation 0
    const std::vector<Tensor> weights{w.tensor()};
    call1("detkit::split_conv2d", "", x.tensor(), weights, std::optional<Tensor>(), none, one,
          int64_t(1), int64_t(0), false);
  }));
}
