#include <algorithm>
#include <optional>
#include <tuple>

#include "cpu/nms_kernel.h"
#include "nms_inputs.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

template <class T>
int64_t run(const Tensor& boxes, const Tensor& scores, const int64_t* classes, double threshold,
            int64_t* keep) {
  const auto* box = boxes.const_data_ptr<T>();
  const int64_t n = boxes.size(0);
  if (scores.scalar_type() == ScalarType::Double) {
    return nms(box, scores.const_data_ptr<double>(), classes, n, threshold, keep);
  }
  return nms(box, scores.const_data_ptr<float>(), classes, n, threshold, keep);
}

Tensor nms_of_classes(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                      double threshold) {
  const NmsInputs in = nms_inputs(boxes, scores, idxs);
  const int64_t n = in.boxes.size(0);
  STD_TORCH_CHECK(n <= INT32_MAX, "nms: at most 2^31 - 1 boxes, got ", n);
  Tensor keep = torch::stable::new_empty(boxes, {n}, ScalarType::Long);
  auto* keep_data = keep.mutable_data_ptr<int64_t>();
  const int64_t count =
      in.boxes.scalar_type() == ScalarType::Double
          ? run<double>(in.boxes, in.scores, in.class_data(), threshold, keep_data)
          : run<float>(in.boxes, in.scores, in.class_data(), threshold, keep_data);
  // A copy, so that a few survivors do not hold the memory of all candidates.
  return torch::stable::clone(torch::stable::narrow(keep, 0, 0, count));
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
