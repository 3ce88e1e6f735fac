#include <optional>
#include <tuple>

#include "cuda/nms_kernel.h"
#include "nms_inputs.h"
#include "torch_stable.h"

namespace detkit::cuda {
namespace {

// Rows by descending score, and by place in that order whether the box survives.
struct Survivors {
  Tensor order, keep;
};

template <class T>
void run(const NmsInputs& in, const Tensor& order, double threshold, const Tensor& keep) {
  const int64_t n = in.boxes.size(0), chunks = nms_chunks(n);
  const auto scratch = [&](int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(in.boxes, {size}, dtype);
  };
  std::optional<Tensor> by_class, classes;
  if (in.classes) {
    const Tensor ranked = call1("aten::index_select", "", *in.classes, int64_t(0), order);
    by_class = call1("aten::argsort", "stable", ranked, true, int64_t(0), false);
    classes = scratch(n, ScalarType::Long);
  }
  const Tensor boxes = scratch(4 * n, in.boxes.scalar_type()),
               removed = scratch(n, ScalarType::Byte),
               overlaps = scratch(chunks * kNmsWords * kNmsChunk, ScalarType::Int),
               survivors = scratch(chunks * kNmsChunkWords, ScalarType::Int);
  const NmsWork<T> work{n,
                        round_down<T>(threshold),
                        static_cast<Box<T>*>(boxes.mutable_data_ptr()),
                        classes ? classes->mutable_data_ptr<int64_t>() : nullptr,
                        static_cast<uint32_t*>(overlaps.mutable_data_ptr()),
                        static_cast<uint32_t*>(survivors.mutable_data_ptr()),
                        removed.mutable_data_ptr<uint8_t>()};
  const int64_t* place = by_class ? by_class->const_data_ptr<int64_t>() : nullptr;
  const cudaStream_t stream = current_stream(in.boxes);
  nms_rank(work, in.boxes.const_data_ptr<T>(), order.const_data_ptr<int64_t>(), place,
           in.class_data(), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  nms_settle(work, place, keep.mutable_data_ptr<bool>(), stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Survivors survivors(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                    double threshold) {
  const NmsInputs in = nms_inputs(boxes, scores, idxs);
  const Tensor order = call1("aten::argsort", "stable", in.scores, true, int64_t(0), true);
  const Tensor keep = torch::stable::new_empty(boxes, {boxes.size(0)}, ScalarType::Bool);
  if (in.boxes.scalar_type() == ScalarType::Double) {
    run<double>(in, order, threshold, keep);
  } else {
    run<float>(in, order, threshold, keep);
  }
  return {order, keep};
}

Tensor nms_of_classes(const Tensor& boxes, const Tensor& scores, const std::optional<Tensor>& idxs,
                      double threshold) {
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const Survivors found = survivors(boxes, scores, idxs, threshold);
  // The output's size is read here: the only wait for the device.
  return call1("aten::masked_select", "", found.order, found.keep);
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
  const torch::stable::accelerator::DeviceGuard guard(boxes.get_device_index());
  const Survivors found = survivors(boxes, scores, idxs, iou_threshold);
  const Tensor places = call1("aten::cumsum", "", found.keep, int64_t(0),
                              std::optional<ScalarType>(ScalarType::Long));
  const Tensor kept = torch::stable::new_empty(boxes, {limit}, ScalarType::Long),
               count = torch::stable::new_empty(boxes, {}, ScalarType::Long);
  nms_pack(found.keep.const_data_ptr<bool>(), places.const_data_ptr<int64_t>(),
           found.order.const_data_ptr<int64_t>(), boxes.size(0), limit,
           kept.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>(),
           current_stream(boxes));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {kept, count};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CUDA, m) {
  m.impl("nms", TORCH_BOX(&nms_op));
  m.impl("batched_nms", TORCH_BOX(&batched_nms_op));
  m.impl("nms_padded", TORCH_BOX(&nms_padded_op));
}

}  // namespace detkit::cuda
