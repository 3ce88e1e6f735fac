#include <limits>

#include "cpu/roi_align_kernel.h"
#include "roi_inputs.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

constexpr int64_t kBoxesPerTask = 32;

template <class A>
RoiAlignPlan<A> make_plan(const RoiSpec& spec, const Tensor& rois) {
  const auto* data = rois.const_data_ptr<A>();
  const int64_t count = rois.size(0);
  check_batch_indices("roi_align", data, count, spec.batch);
  RoiAlignPlan<A> plan{spec, group_by_image(data, count, spec), std::vector<RoiWeights<A>>(count),
                       roi_align_lanes(spec, torch::stable::get_num_threads())};
  torch::stable::parallel_for(0, count, kBoxesPerTask, [&](int64_t begin, int64_t end) {
    roi_align_prepare(plan, data, begin, end);
  });
  return plan;
}

Tensor roi_align_op(const Tensor& input, const Tensor& rois, double spatial_scale,
                    int64_t pooled_height, int64_t pooled_width, int64_t sampling_ratio,
                    bool aligned) {
  STD_TORCH_CHECK(input.dim() == 4, "roi_align: input must be (N, C, H, W)");
  check_rois("roi_align", input, rois);
  const RoiSpec spec =
      roi_align_spec(input.size(0), input.size(1), input.size(2), input.size(3), pooled_height,
                     pooled_width, spatial_scale, sampling_ratio, aligned);
  check_sizes("roi_align", spec);
  Tensor output =
      torch::stable::new_empty(input, {rois.size(0), spec.channels, pooled_height, pooled_width});
  const Tensor boxes = torch::stable::contiguous(rois);
  const MapStrides strides{input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
  DETKIT_DISPATCH(input.scalar_type(), "roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    const RoiAlignPlan<A> plan = make_plan<A>(spec, boxes);
    const auto* source = input.const_data_ptr<scalar_t>();
    auto* target = output.mutable_data_ptr<scalar_t>();
    expect_huge(target, output.numel() * sizeof(scalar_t));
    torch::stable::parallel_for(0, plan.work(), 1, [&](int64_t begin, int64_t end) {
      roi_align_forward(plan, source, strides, target, begin, end);
    });
    fill_unusable(boxes.const_data_ptr<A>(), boxes.size(0), spec,
                  spec.channels * pooled_height * pooled_width, std::numeric_limits<A>::quiet_NaN(),
                  target);
  });
  return output;
}

Tensor roi_align_backward_op(const Tensor& grad, const Tensor& rois, double spatial_scale,
                             int64_t pooled_height, int64_t pooled_width, int64_t batch,
                             int64_t channels, int64_t height, int64_t width,
                             int64_t sampling_ratio, bool aligned, bool) {
  check_rois("roi_align", grad, rois);
  const RoiSpec spec = roi_align_spec(batch, channels, height, width, pooled_height, pooled_width,
                                      spatial_scale, sampling_ratio, aligned);
  check_sizes("roi_align", spec);
  check_pooled("roi_align", grad, rois.size(0), channels, spec);
  Tensor grad_input = torch::stable::new_empty(grad, {batch, channels, height, width});
  const Tensor boxes = torch::stable::contiguous(rois), pooled = torch::stable::contiguous(grad);
  DETKIT_DISPATCH(grad.scalar_type(), "roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    const RoiAlignPlan<A> plan = make_plan<A>(spec, boxes);
    const auto* source = pooled.const_data_ptr<scalar_t>();
    auto* target = grad_input.mutable_data_ptr<scalar_t>();
    expect_huge(target, grad_input.numel() * sizeof(scalar_t));
    torch::stable::parallel_for(0, plan.work(), 1, [&](int64_t begin, int64_t end) {
      roi_align_backward(plan, source, target, begin, end);
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CPU, m) {
  m.impl("roi_align", TORCH_BOX(&roi_align_op));
  m.impl("_roi_align_backward", TORCH_BOX(&roi_align_backward_op));
}

}  // namespace detkit::cpu
