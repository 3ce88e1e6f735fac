#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/nms_kernel.h"
#include "nms_inputs.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

// The survivors' indices, best score first.
template <class T>
std::vector<int64_t> survivors(const NmsInputs& in, double threshold) {
  const auto* box = in.boxes.const_data_ptr<T>();
  const int64_t n = in.boxes.size(0);
  if (in.scores.scalar_type() == ScalarType::Double) {
    return nms(box, in.scores.const_data_ptr<double>(), in.class_data(), n, threshold);
  }
  return nms(box, in.scores.const_data_ptr<float>(), in.class_data(), n, threshold);
}

Tensor nms_of_classes(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                      double threshold) {
  const NmsInputs in = nms_inputs(boxes, scores, idxs);
  const int64_t n = in.boxes.size(0);
  STD_TORCH_CHECK(n <= INT32_MAX, "nms: at most 2^31 - 1 boxes, got ", n);
  const std::vector<int64_t> kept = in.boxes.scalar_type() == ScalarType::Double
                                        ? survivors<double>(in, threshold)
                                        : survivors<float>(in, threshold);
  Tensor result = torch::stable::new_empty(boxes, {int64_t(kept.size())}, ScalarType::Long);
  if (!kept.empty()) std::copy(kept.begin(), kept.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

Tensor nms_op(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return nms_of_classes(boxes, scores, std::nullopt, iou_threshold);
}

Tensor batched_nms_op(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                      double iou_threshold) {
  return nms_of_classes(boxes, scores, idxs, iou_threshold);
}

std::tuple<Tensor, Tensor> nms_padded_op(const Tensor& boxes, const Tensor& scores,
                                         const std::optional<Tensor>& idxs, double iou_threshold,
                                         int64_t limit) {
  check_limit(limit);
  const Tensor all = nms_of_classes(boxes, scores, idxs, iou_threshold);
  const int64_t total = std::min(all.size(0), limit);
  Tensor kept = torch::stable::new_empty(boxes, {limit}, ScalarType::Long);
  Tensor count = torch::stable::new_empty(boxes, {}, ScalarType::Long);
  auto* rows = kept.mutable_data_ptr<int64_t>();
  std::copy_n(all.const_data_ptr<int64_t>(), total, rows);
  std::fill(rows + total, rows + limit, int64_t(-1));
  *count.mutable_data_ptr<int64_t>() = total;
  return {kept, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CPU, m) {
  m.impl("nms", TORCH_BOX(&nms_op));
  m.impl("batched_nms", TORCH_BOX(&batched_nms_op));
  m.impl("nms_padded", TORCH_BOX(&nms_padded_op));
}

}  // namespace detkit::cpu
