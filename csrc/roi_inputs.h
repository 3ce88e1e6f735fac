// What the wrappers of the RoI operators check, on any device.
#pragma once

#include "common/roi.h"
#include "torch_stable.h"

namespace detkit {

// The dtype that coordinates and sums of features of this dtype are computed in.
inline ScalarType accumulate_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

inline void check_rois(const char* op, const Tensor& features, const Tensor& rois) {
  STD_TORCH_CHECK(rois.dim() == 2 && rois.size(1) == 5, op, ": rois must be (R, 5)");
  STD_TORCH_CHECK(rois.scalar_type() == accumulate_type(features.scalar_type()), op,
                  ": rois must be float32, or float64 for float64 features");
  STD_TORCH_CHECK(rois.is_cuda() == features.is_cuda() &&
                      rois.get_device_index() == features.get_device_index(),
                  op, ": rois must be on the features' device");
}

// A NaN index passes: that box's outputs are NaN.
template <class A>
void check_batch_indices(const char* op, const A* rois, int64_t count, int64_t batch) {
  for (int64_t r = 0; r < count; ++r) {
    const A image = rois[r * 5];
    STD_TORCH_CHECK(!(image < A(0) || image >= A(batch)), op, ": batch indices must be in 0..",
                    batch - 1, ", got ", image);
  }
}

inline void check_sizes(const char* op, const RoiSpec& spec) {
  STD_TORCH_CHECK(spec.batch >= 0 && spec.channels >= 0 && spec.height >= 0 && spec.width >= 0, op,
                  ": sizes must not be negative");
  STD_TORCH_CHECK(spec.bins_down > 0 && spec.bins_across > 0, op,
                  ": pooled sizes must be positive");
}

inline void check_pooled(const char* op, const Tensor& grad, int64_t rois, int64_t channels,
                         const RoiSpec& spec) {
  STD_TORCH_CHECK(grad.dim() == 4 && grad.size(0) == rois && grad.size(1) == channels &&
                      grad.size(2) == spec.bins_down && grad.size(3) == spec.bins_across,
                  op, ": grad must have the output's shape");
}

// Output channels of PS-RoIAlign.
inline int64_t ps_depth(const RoiSpec& spec) {
  const int64_t bins = spec.bins_down * spec.bins_across;
  STD_TORCH_CHECK(spec.channels % bins == 0, "ps_roi_align: channels must be a multiple of ", bins,
                  ", got ", spec.channels);
  return spec.channels / bins;
}

// The winning sample of every output of the maximum; empty for the mean.
inline Tensor ps_new_argmax(const Tensor& input, int64_t rois, const RoiSpec& spec,
                            bool reduce_max) {
  if (!reduce_max) return torch::stable::new_empty(input, {0}, ScalarType::Int);
  return torch::stable::new_empty(input, {rois, ps_depth(spec), spec.bins_down, spec.bins_across},
                                  ScalarType::Int);
}

inline void check_argmax(const Tensor& argmax, const Tensor& grad, bool reduce_max) {
  STD_TORCH_CHECK(
      argmax.scalar_type() == ScalarType::Int && argmax.numel() == (reduce_max ? grad.numel() : 0),
      "ps_roi_align: argmax must be int32, as the forward gave it");
  STD_TORCH_CHECK(!reduce_max || argmax.device() == grad.device(),
                  "ps_roi_align: argmax must be on the gradient's device");
}

}  // namespace detkit
