#include <tuple>

#include "cuda/ps_roi_align_kernel.h"
#include "cuda/roi_types.h"
#include "roi_inputs.h"
#include "torch_stable.h"

namespace detkit::cuda {
namespace {

std::tuple<Tensor, Tensor> ps_roi_align_op(const Tensor& input, const Tensor& rois,
                                           double spatial_scale, int64_t pooled_height,
                                           int64_t pooled_width, int64_t sampling_ratio,
                                           bool reduce_max, double offset) {
  STD_TORCH_CHECK(input.dim() == 4, "ps_roi_align: input must be (N, C, H, W)");
  check_rois("ps_roi_align", input, rois);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const RoiSpec spec =
      ps_roi_align_spec(input.size(0), input.size(1), input.size(2), input.size(3), pooled_height,
                        pooled_width, spatial_scale, sampling_ratio, reduce_max, offset);
  check_sizes("ps_roi_align", spec);
  Tensor output =
      torch::stable::new_empty(input, {rois.size(0), ps_depth(spec), pooled_height, pooled_width});
  Tensor argmax = ps_new_argmax(input, rois.size(0), spec, reduce_max);
  const Tensor features = torch::stable::contiguous(input), boxes = torch::stable::contiguous(rois);
  DETKIT_DISPATCH(input.scalar_type(), "ps_roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    using T = typename DeviceType<scalar_t>::type;
    ps_roi_align_forward(
        spec, static_cast<const T*>(features.const_data_ptr()), boxes.const_data_ptr<A>(),
        rois.size(0), static_cast<T*>(output.mutable_data_ptr()),
        reduce_max ? argmax.mutable_data_ptr<int32_t>() : nullptr, current_stream(input));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {output, argmax};
}

Tensor ps_roi_align_backward_op(const Tensor& grad, const Tensor& rois, const Tensor& argmax,
                                double spatial_scale, int64_t pooled_height, int64_t pooled_width,
                                int64_t sampling_ratio, bool reduce_max, double offset,
                                int64_t batch, int64_t channels, int64_t height, int64_t width,
                                bool deterministic) {
  check_rois("ps_roi_align", grad, rois);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const RoiSpec spec =
      ps_roi_align_spec(batch, channels, height, width, pooled_height, pooled_width, spatial_scale,
                        sampling_ratio, reduce_max, offset);
  check_sizes("ps_roi_align", spec);
  check_pooled("ps_roi_align", grad, rois.size(0), ps_depth(spec), spec);
  check_argmax(argmax, grad, reduce_max);
  const auto dense = [&](const Tensor& of) {
    if (!deterministic || of.dim() != 4) return torch::stable::contiguous(of);
    return bins_first(of);
  };
  const Tensor pooled = dense(grad), boxes = torch::stable::contiguous(rois);
  const Tensor samples = dense(argmax);
  const ScalarType sum_type =
      deterministic ? grad.scalar_type() : accumulate_type(grad.scalar_type());
  const Tensor sums = torch::stable::new_zeros(grad, {batch, channels, height, width}, sum_type);
  const cudaStream_t stream = current_stream(grad);
  DETKIT_DISPATCH(grad.scalar_type(), "ps_roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    using T = typename DeviceType<scalar_t>::type;
    const auto* from = static_cast<const T*>(pooled.const_data_ptr());
    const auto* winners = reduce_max ? samples.const_data_ptr<int32_t>() : nullptr;
    const auto* data = boxes.const_data_ptr<A>();
    if (deterministic) {
      ps_roi_align_gather(spec, from, winners, data, rois.size(0),
                          static_cast<T*>(sums.mutable_data_ptr()), stream);
    } else {
      ps_roi_align_backward(spec, from, winners, data, rois.size(0), sums.mutable_data_ptr<A>(),
                            stream);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return torch::stable::to(sums, grad.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CUDA, m) {
  m.impl("ps_roi_align", TORCH_BOX(&ps_roi_align_op));
  m.impl("_ps_roi_align_backward", TORCH_BOX(&ps_roi_align_backward_op));
}

}  // namespace detkit::cuda
