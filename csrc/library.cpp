// Every operator's schema in one block; kernels register beside their code, in cpu/ and cuda/.
// Autograd, autocast and fake rules stand in Python, in detkit/ops/<name>.py.
#include "torch_stable.h"

STABLE_TORCH_LIBRARY(detkit, m) {
  m.def("nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor");
  m.def("batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor");
  // The first `limit` survivors, then -1, and how many those are: sizes do not depend on data.
  m.def(
      "nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, int limit) "
      "-> (Tensor, Tensor)");

  m.def(
      "roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
      "int pooled_width, int sampling_ratio, bool aligned) -> Tensor");
  m.def(
      "_roi_align_backward(Tensor grad, Tensor rois, float spatial_scale, int pooled_height, "
      "int pooled_width, SymInt batch, SymInt channels, SymInt height, SymInt width, "
      "int sampling_ratio, bool aligned, bool deterministic=False) -> Tensor");

  // Deterministic: CUDA gathers in a fixed order and adds nothing by atomics; the CPU always does.
  // The second output is the index of the winning sample per output, empty for the mean.
  m.def(
      "ps_roi_align(Tensor input, Tensor rois, float spatial_scale, int pooled_height, "
      "int pooled_width, int sampling_ratio, bool reduce_max, float offset) -> (Tensor, Tensor)");
  m.def(
      "_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor argmax, float spatial_scale, "
      "int pooled_height, int pooled_width, int sampling_ratio, bool reduce_max, float offset, "
      "SymInt batch, SymInt channels, SymInt height, SymInt width, bool deterministic=False) "
      "-> Tensor");

  // The convolutions' algorithm: 0 columns, 1 fused (csrc/conv_shapes.h). `relu`: outputs below 0
  // are 0.
  m.def(
      "dilated_conv2d(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
      "int[] dilation, int groups, int algorithm=0, bool relu=False) -> Tensor");
  m.def(
      "_dilated_conv2d_backward(Tensor grad, Tensor input, Tensor weight, int[] stride, "
      "int[] padding, int[] dilation, int groups, bool need_input, bool need_weight) "
      "-> (Tensor, Tensor)");

  m.def(
      "scaled_conv2d(Tensor input, Tensor weight, Tensor scales, Tensor? bias, int[] stride, "
      "int groups, int algorithm=0, bool relu=False) -> Tensor");
  m.def(
      "_scaled_conv2d_backward(Tensor grad, Tensor input, Tensor weight, Tensor scales, "
      "int[] stride, int groups, bool need_input, bool need_weight, bool need_scales) "
      "-> (Tensor, Tensor, Tensor)");

  m.def(
      "split_conv2d(Tensor input, Tensor[] weights, Tensor? bias, int[] dilations, int[] stride, "
      "int groups, int algorithm=0, bool relu=False) -> Tensor");
  m.def(
      "_split_conv2d_backward(Tensor grad, Tensor input, Tensor[] weights, int[] dilations, "
      "int[] stride, int groups, bool need_input, bool need_weights) -> (Tensor, Tensor[])");
}
