#include <limits>
#include <tuple>

#include "cpu/ps_roi_align_kernel.h"
#include "roi_inputs.h"
#include "torch_stable.h"

namespace detkit::cpu {
namespace {

constexpr int64_t kBoxesPerTask = 32;

template <class A>
PsRoiAlignPlan<A> make_plan(const RoiSpec& spec, bool reduce_max, const Tensor& rois) {
  const auto* data = rois.const_data_ptr<A>();
  const int64_t count = rois.size(0);
  check_batch_indices("ps_roi_align", data, count, spec.batch);
  PsRoiAlignPlan<A> plan(spec, reduce_max, data, count);
  torch::stable::parallel_for(0, plan.boxes(), kBoxesPerTask, [&](int64_t begin, int64_t end) {
    ps_roi_align_prepare(plan, data, begin, end);
  });
  return plan;
}

std::tuple<Tensor, Tensor> ps_roi_align_op(const Tensor& input, const Tensor& rois,
                                           double spatial_scale, int64_t pooled_height,
                                           int64_t pooled_width, int64_t sampling_ratio,
                                           bool reduce_max, double offset) {
  STD_TORCH_CHECK(input.dim() == 4, "ps_roi_align: input must be (N, C, H, W)");
  check_rois("ps_roi_align", input, rois);
  const RoiSpec spec =
      ps_roi_align_spec(input.size(0), input.size(1), input.size(2), input.size(3), pooled_height,
                        pooled_width, spatial_scale, sampling_ratio, reduce_max, offset);
  check_sizes("ps_roi_align", spec);
  const int64_t depth = ps_depth(spec), count = rois.size(0);
  Tensor output = torch::stable::new_empty(input, {count, depth, pooled_height, pooled_width});
  Tensor argmax = ps_new_argmax(input, count, spec, reduce_max);
  const Tensor boxes = torch::stable::contiguous(rois);
  const MapStrides strides{input.stride(0), input.stride(1), input.stride(2), input.stride(3)};
  DETKIT_DISPATCH(input.scalar_type(), "ps_roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    const PsRoiAlignPlan<A> plan = make_plan<A>(spec, reduce_max, boxes);
    const auto* source = input.const_data_ptr<scalar_t>();
    auto* target = output.mutable_data_ptr<scalar_t>();
    expect_huge(target, output.numel() * sizeof(scalar_t));
    auto* winners = argmax.mutable_data_ptr<int32_t>();
    const Scratch<A> pooled(plan.pooled_size());
    torch::stable::parallel_for(0, plan.work(), 1, [&](int64_t begin, int64_t end) {
      ps_roi_align_forward(plan, source, strides, pooled.get(), winners, begin, end);
    });
    torch::stable::parallel_for(0, plan.boxes(), kBoxesPerTask, [&](int64_t begin, int64_t end) {
      ps_roi_align_collect(plan, pooled.get(), target, begin, end);
    });
    const int64_t size = depth * plan.bins();
    const auto* data = boxes.const_data_ptr<A>();
    fill_unusable(data, count, spec, size, std::numeric_limits<A>::quiet_NaN(), target);
    if (reduce_max) fill_unusable(data, count, spec, size, A(0), winners);
  });
  return {output, argmax};
}

Tensor ps_roi_align_backward_op(const Tensor& grad, const Tensor& rois, const Tensor& argmax,
                                double spatial_scale, int64_t pooled_height, int64_t pooled_width,
                                int64_t sampling_ratio, bool reduce_max, double offset,
                                int64_t batch, int64_t channels, int64_t height, int64_t width,
                                bool) {
  check_rois("ps_roi_align", grad, rois);
  const RoiSpec spec =
      ps_roi_align_spec(batch, channels, height, width, pooled_height, pooled_width, spatial_scale,
                        sampling_ratio, reduce_max, offset);
  check_sizes("ps_roi_align", spec);
  check_pooled("ps_roi_align", grad, rois.size(0), ps_depth(spec), spec);
  check_argmax(argmax, grad, reduce_max);
  Tensor grad_input = torch::stable::new_empty(grad, {batch, channels, height, width});
  const Tensor boxes = torch::stable::contiguous(rois), pooled = torch::stable::contiguous(grad),
               samples = torch::stable::contiguous(argmax);
  DETKIT_DISPATCH(grad.scalar_type(), "ps_roi_align", [&] {
    using A = typename Accumulate<scalar_t>::type;
    const PsRoiAlignPlan<A> plan = make_plan<A>(spec, reduce_max, boxes);
    const auto* source = pooled.const_data_ptr<scalar_t>();
    const auto* winners = samples.const_data_ptr<int32_t>();
    auto* target = grad_input.mutable_data_ptr<scalar_t>();
    expect_huge(target, grad_input.numel() * sizeof(scalar_t));
    const Scratch<A> shares(plan.pooled_size());
    torch::stable::parallel_for(0, plan.boxes(), kBoxesPerTask, [&](int64_t begin, int64_t end) {
      ps_roi_align_distribute(plan, source, shares.get(), begin, end);
    });
    torch::stable::parallel_for(0, plan.work(), 1, [&](int64_t begin, int64_t end) {
      ps_roi_align_backward(plan, shares.get(), winners, target, begin, end);
    });
  });
  return grad_input;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(detkit, CPU, m) {
  m.impl("ps_roi_align", TORCH_BOX(&ps_roi_align_op));
  m.impl("_ps_roi_align_backward", TORCH_BOX(&ps_roi_align_backward_op));
}

}  // namespace detkit::cpu
