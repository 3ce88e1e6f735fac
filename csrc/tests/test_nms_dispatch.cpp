#include <cstdint>
#include <vector>

#include "tests/check.h"
#include "torch_stable.h"

using detkit::call1;
using detkit::ScalarType;
using detkit::Tensor;

namespace {

Tensor tensor(std::vector<float>& values, std::vector<int64_t> sizes,
              std::vector<int64_t> strides) {
  return torch::stable::from_blob(values.data(), sizes, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  ScalarType::Float);
}

std::vector<int64_t> values(const Tensor& t) {
  const auto* data = t.const_data_ptr<int64_t>();
  return {data, data + t.size(0)};
}

}  // namespace

TEST(nms_through_the_dispatcher) {
  std::vector<float> boxes{0, 0, 10, 10, 1, 1, 11, 11, 20, 20, 30, 30};
  std::vector<float> scores{.5F, .9F, .1F};
  const Tensor b = tensor(boxes, {3, 4}, {4, 1});
  const Tensor s = tensor(scores, {3}, {1});
  CHECK(values(call1("detkit::nms", "", b, s, 0.5)) == (std::vector<int64_t>{1, 2}));
  const Tensor classes = torch::stable::full({3}, 5.0, ScalarType::Long);
  CHECK(values(call1("detkit::batched_nms", "", b, s, classes, 0.5)) ==
        (std::vector<int64_t>{1, 2}));
}

TEST(nms_takes_strided_boxes) {
  std::vector<float> columns{0, 1, 20, 0, 1, 20, 10, 11, 30, 10, 11, 30};
  std::vector<float> scores{.5F, .9F, .1F};
  const Tensor b = tensor(columns, {3, 4}, {1, 3});
  CHECK(values(call1("detkit::nms", "", b, tensor(scores, {3}, {1}), 0.5)) ==
        (std::vector<int64_t>{1, 2}));
}

TEST(nms_refuses_wrong_shapes) {
  std::vector<float> boxes{0, 0, 10};
  const Tensor b = tensor(boxes, {1, 3}, {3, 1});
  bool threw = false;
  try {
    call1("detkit::nms", "", b, tensor(boxes, {1}, {1}), 0.5);
  } catch (const std::exception&) {
    threw = true;
  }
  CHECK(threw);
}
