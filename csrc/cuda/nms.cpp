#include <optional>

#include "cuda/nms_kernel.h"
#include "nms_inputs.h"
#include "torch_stable.h"

namespace detkit::cuda {
namespace {

template <class T>
void run(const NmsInputs& in, const Tensor& order, double threshold, const Tensor& keep) {
  const int64_t n = in.boxes.size(0);
  const int64_t words = (n + kNmsWord - 1) / kNmsWord;
  const Tensor mask = torch::stable::new_empty(in.boxes, {n, words}, ScalarType::Long);
  const Tensor removed = torch::stable::new_empty(in.boxes, {words}, ScalarType::Long);
  nms(in.boxes.const_data_ptr<T>(), order.const_data_ptr<int64_t>(), in.class_data(), n, threshold,
      static_cast<unsigned long long*>(mask.mutable_data_ptr()),
      static_cast<unsigned long long*>(removed.mutable_data_ptr()), keep.mutable_data_ptr<bool>(),
      current_stream(in.boxes));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor nms_of_classes(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                      double threshold) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const NmsInputs in = nms_inputs(boxes, scores, idxs);
  const Tensor order = call1("aten::argsort", "stable", in.scores, true, int64_t(0), true);
  const Tensor keep = torch::stable::new_empty(boxes, {boxes.size(0)}, ScalarType::Bool);
  if (in.boxes.scalar_type() == ScalarType::Double) {
    run<double>(in, order, threshold, keep);
  } else {
    run<float>(in, order, threshold, keep);
  }
  // The output's size is read here: the only wait for the device.
  return call1("aten::masked_select", "", order, keep);
}

Tensor nms_op(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  return nms_of_classes(boxes, scores, std::nullopt, iou_threshold);
}

Tensor batched_nms_op(const Tensor& boxes, const Tensor& scores, const Tensor& idxs,
                      double iou_threshold) {
  return nms_of_classes(boxes, scores, idxs, iou_threshold);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CUDA, m) {
  m.impl("nms", TORCH_BOX(&nms_op));
  m.impl("batched_nms", TORCH_BOX(&batched_nms_op));
}

}  // namespace detkit::cuda
