#include "conv_shapes.h"
#include "cuda/roi_align_kernel.h"
#include "cuda/roi_types.h"
#include "roi_inputs.h"
#include "torch_stable.h"

namespace detkit::cuda {
namespace {

Tensor roi_align_op(const Tensor& input, const Tensor& rois, double spatial_scale,
                    int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio,
                    bool aligned) {
  STD_TORCH_CHECK(input.dim() == 4, "roi_align: input must be (N, C, H, W)");
  check_rois("roi_align", input, rois);
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const RoiSpec spec =
      roi_align_spec(input.size(0), input.size(1), input.size(2), input.size(3), pooled_height,
                     pooled_width, spatial_scale, sampling_ratio, aligned);
  check_sizes("roi_align", spec);
  Tensor output =
      torch::stable::new_empty(input, {rois.size(0), spec.channels, pooled_height, pooled_width});
  const bool last = is_channels_last(input);
  const cudaStream_t stream = current_stream(input);
  const Tensor features = last ? input : torch::stable::contiguous(input);
  const Tensor boxes = torch::stable::contiguous(rois);
  DETKIT_DISPATCH(input.scalar_type(), "roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    using T = typename DeviceType<scalar_t>::type;
    const auto* from = static_cast<const T*>(features.const_data_ptr());
    const auto* data = boxes.const_data_ptr<A>();
    auto* to = static_cast<T*>(output.mutable_data_ptr());
    if (last) {
      roi_align_forward_side_by_side(spec, from, data, rois.size(0), to, stream);
    } else {
      roi_align_forward(spec, from, data, rois.size(0), to, stream);
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

Tensor roi_align_backward_op(const Tensor& grad, const Tensor& rois, double spatial_scale,
                             int64_t pooled_height, int64_t pooled_width, int64_t batch,
                             int64_t channels, int64_t height, int64_t width,
                             int64_t sampling_ratio, bool aligned, bool deterministic) {
  check_rois("roi_align", grad, rois);
  const torch::stable::accelerator::DeviceGuard guard(grad.get_device_index());
  const RoiSpec spec = roi_align_spec(batch, channels, height, width, pooled_height, pooled_width,
                                      spatial_scale, sampling_ratio, aligned);
  check_sizes("roi_align", spec);
  check_pooled("roi_align", grad, rois.size(0), channels, spec);
  const Tensor pooled = bins_first(grad), boxes = torch::stable::contiguous(rois);
  Tensor result = torch::stable::new_empty(grad, {batch, channels, height, width});
  const cudaStream_t stream = current_stream(grad);
  const std::vector<int64_t> channels_second{0, 3, 1, 2};
  DETKIT_DISPATCH(grad.scalar_type(), "roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    using T = typename DeviceType<scalar_t>::type;
    const auto* from = static_cast<const T*>(pooled.const_data_ptr());
    const auto* data = boxes.const_data_ptr<A>();
    if (deterministic) {
      roi_align_gather(spec, from, data, rois.size(0), static_cast<T*>(result.mutable_data_ptr()),
                       stream);
    } else {
      const Tensor sums = torch::stable::new_zeros(grad, {batch, height, width, channels},
                                                   accumulate_type(grad.scalar_type()));
      roi_align_backward(spec, from, data, rois.size(0), sums.mutable_data_ptr<A>(), stream);
      torch::stable::copy_(result, call1("aten::permute", "", sums, channels_second));
    }
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CUDA, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align_op));
  m.impl("_roi_align_backward", TORCH_BOX(&roi_align_backward_op));
}

}  // namespace detkit::cuda
