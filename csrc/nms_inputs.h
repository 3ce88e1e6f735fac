// Checks and conversions that the CPU and CUDA wrappers of nms share.
#pragma once

#include <optional>

#include "torch_stable.h"

namespace detkit {

// Contiguous; boxes and scores in float32 or float64 (half precisions are widened), classes in
// int64.
struct NmsInputs {
  Tensor boxes, scores;
  std::optional<Tensor> classes;

  const int64_t* class_data() const {
    return classes ? classes->const_data_ptr<int64_t>() : nullptr;
  }
};

// Each call of an operator costs as much as the suppression of a few boxes, even one that has
// nothing to do.
inline Tensor contiguous_as(const Tensor& t, ScalarType type) {
  const Tensor typed = t.scalar_type() == type ? t : torch::stable::to(t, type);
  return typed.is_contiguous() ? typed : torch::stable::contiguous(typed);
}

inline Tensor widened(const Tensor& t) {
  const bool wide = t.scalar_type() == ScalarType::Double;
  return contiguous_as(t, wide ? ScalarType::Double : ScalarType::Float);
}

inline NmsInputs nms_inputs(const Tensor& boxes, const Tensor& scores,
                            const std::optional<Tensor>& idxs) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "nms: boxes must have shape (N, 4)");
  const int64_t n = boxes.size(0);
  STD_TORCH_CHECK(scores.dim() == 1 && scores.size(0) == n, "nms: scores must have shape (N,)");
  STD_TORCH_CHECK(scores.device() == boxes.device(), "nms: scores must be on the boxes' device");
  NmsInputs in{widened(boxes), widened(scores), std::nullopt};
  if (idxs) {
    STD_TORCH_CHECK(idxs->dim() == 1 && idxs->size(0) == n,
                    "batched_nms: idxs must have shape (N,)");
    STD_TORCH_CHECK(idxs->device() == boxes.device(),
                    "batched_nms: idxs must be on the boxes' device");
    in.classes = contiguous_as(*idxs, ScalarType::Long);
  }
  return in;
}

inline void check_limit(int64_t limit) {
  STD_TORCH_CHECK(limit >= 0, "nms_padded: limit must be at least 0, got ", limit);
}

}  // namespace detkit
