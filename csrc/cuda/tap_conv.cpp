#include "cuda/tap_conv.h"

#include <algorithm>
#include <vector>

#include "cuda/tap_conv_kernel.h"

namespace detkit::cuda {
namespace {

using torch::headeronly::MemoryFormat;

constexpr int64_t kColumnBytes = int64_t(16) << 20;  // of a chunk, to stay in the second cache

ScalarType sum_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor permuted(const Tensor& tensor, const std::vector<int64_t>& order) {
  return call1("aten::permute", "", tensor, order);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out) {
  call1("aten::bmm", "out", a, b, out);
}

// Chunks of at most kColumnBytes: whole samples, or parts of one at multiples of kScalePixels.
std::vector<Chunk> chunks_of(const ConvShape& shape, int64_t element_size) {
  const int64_t pixels = shape.pixels();
  const int64_t depth = shape.groups * shape.group_in * shape.kernel() * element_size;
  const int64_t fitting = std::max<int64_t>(kColumnBytes / std::max<int64_t>(depth, 1), 1);
  std::vector<Chunk> chunks;
  if (fitting >= pixels) {
    const int64_t samples = fitting / pixels;
    for (int64_t n = 0; n < shape.batch; n += samples) {
      chunks.push_back({n, std::min(samples, shape.batch - n), 0, pixels});
    }
    return chunks;
  }
  const int64_t step = (fitting + kScalePixels - 1) / kScalePixels * kScalePixels;
  for (int64_t n = 0; n < shape.batch; ++n) {
    for (int64_t first = 0; first < pixels; first += step) {
      chunks.push_back({n, 1, first, std::min(first + step, pixels)});
    }
  }
  return chunks;
}

// One convolution of storage type T. Views of maps and columns are (groups, rows, columns) batches.
template <typename T>
struct Road {
  using A = compute_t<T>;
  const ConvShape& shape;
  const Tensor input, weight;  // weight (groups, group_out, kernel * group_in)
  TapPlan<A> plan;
  cudaStream_t stream;
  std::vector<Chunk> chunks;
  int64_t depth;

  Road(const ConvShape& shape, const Taps& taps, const Tensor& input, const Tensor& weight)
      : shape(shape),
        input(input),
        weight(torch::stable::reshape(
            permuted(weight, {0, 2, 3, 1}),
            {shape.groups, shape.group_out, shape.kernel() * shape.group_in})),
        plan{shape.channels,   shape.in_begin,
             shape.height,     shape.width,
             shape.out_height, shape.out_width,
             shape.stride_h,   shape.stride_w,
             shape.kernel_h,   shape.kernel_w,
             shape.groups,     shape.group_in,
             taps.whole,       taps.scales ? taps.scales->const_data_ptr<A>() : nullptr},
        stream(current_stream(input)),
        chunks(chunks_of(shape, sizeof(T))),
        depth(shape.kernel() * shape.group_in) {}

  // Part of a tensor as a batch of matrices, in place.
  Tensor viewed(const Tensor& tensor, int64_t offset, const std::vector<int64_t>& size,
                const std::vector<int64_t>& stride) const {
    return torch::stable::from_blob(static_cast<T*>(tensor.data_ptr()) + offset, size, stride,
                                    tensor.device(), tensor.scalar_type());
  }

  const T* data(const Tensor& tensor) const { return static_cast<const T*>(tensor.data_ptr()); }

  // Memory for the columns of the largest chunk.
  Tensor column_buffer() const {
    int64_t largest = 0;
    for (const Chunk& chunk : chunks) largest = std::max(largest, chunk.size());
    return torch::stable::new_empty(weight, {shape.groups * largest * depth});
  }

  Tensor columns_view(const Tensor& buffer, const Chunk& chunk) const {
    return viewed(buffer, 0, {shape.groups, chunk.size(), depth}, {chunk.size() * depth, depth, 1});
  }

  // Outputs of a chunk as (groups, chunk, group_out), in place.
  Tensor outputs_view(const Tensor& map, const Chunk& chunk) const {
    const int64_t offset =
        (chunk.sample * shape.pixels() + chunk.first) * shape.outputs + shape.out_begin;
    return viewed(map, offset, {shape.groups, chunk.size(), shape.group_out},
                  {shape.group_out, shape.outputs, 1});
  }

  void forward(const Tensor& output, const std::optional<Tensor>& bias, bool relu) const {
    const Tensor buffer = column_buffer();
    T* columns = static_cast<T*>(buffer.data_ptr());
    const Tensor transposed = permuted(weight, {0, 2, 1});
    for (const Chunk& chunk : chunks) {
      sample_columns<T>(plan, chunk, data(input), columns, stream);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      multiply(columns_view(buffer, chunk), transposed, outputs_view(output, chunk));
    }
    if (bias || relu) {
      finish_outputs<T>(bias ? data(*bias) : nullptr, relu, static_cast<T*>(output.data_ptr()),
                        shape.batch * shape.pixels(), shape.outputs, shape.out_begin,
                        shape.groups * shape.group_out, stream);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }

  void backward(const Tensor& grad, const std::optional<Tensor>& sum_input,
                const std::optional<Tensor>& sum_weight,
                const std::optional<Tensor>& partials) const {
    const Tensor buffer = column_buffer();
    T* columns = static_cast<T*>(buffer.data_ptr());
    const Tensor product =
        torch::stable::new_empty(weight, {shape.groups, shape.group_out, sum_weight ? depth : 0});
    for (const Chunk& chunk : chunks) {
      const Tensor g = outputs_view(grad, chunk), view = columns_view(buffer, chunk);
      if (sum_input || partials) multiply(g, weight, view);
      if (sum_input) {
        gather_columns<T>(plan, chunk, columns, static_cast<A*>(sum_input->data_ptr()), stream);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (partials) {
        scale_partials<T>(plan, chunk, data(input), columns, static_cast<A*>(partials->data_ptr()),
                          stream);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
      if (sum_weight) {
        sample_columns<T>(plan, chunk, data(input), columns, stream);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
        multiply(permuted(g, {0, 2, 1}), view, product);
        accumulate<T>(data(product), static_cast<A*>(sum_weight->data_ptr()),
                      shape.groups * shape.group_out * depth, stream);
        STD_CUDA_KERNEL_LAUNCH_CHECK();
      }
    }
  }
};

// Calls body with a value of the storage type.
template <typename F>
void for_dtype(ScalarType dtype, const F& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Half:
      return body(__half{});
    case ScalarType::BFloat16:
      return body(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, "detkit convolutions: tensors must have a floating dtype");
  }
}

}  // namespace

Tensor side_by_side(const Tensor& map) {
  return torch::stable::contiguous(map, MemoryFormat::ChannelsLast);
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

Tensor read_input(const Tensor& input, bool needed) {
  return needed ? side_by_side(input) : torch::stable::new_empty(input, {0});
}

Tensor empty_output(const Tensor& input, const ConvShape& shape) {
  return torch::stable::empty({shape.batch, shape.outputs, shape.out_height, shape.out_width},
                              input.scalar_type(), std::nullopt, input.device(), std::nullopt,
                              MemoryFormat::ChannelsLast);
}

Tensor laid_out(const Tensor& map, const Tensor& like) {
  return torch::stable::contiguous(
      map, is_channels_last(like) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

std::optional<Tensor> grad_map(const Tensor& input, bool needed) {
  if (!needed) return std::nullopt;
  const Tensor zeros = torch::stable::new_zeros(
      input, {input.size(0), input.size(2), input.size(3), input.size(1)}, sum_dtype(input));
  return permuted(zeros, {0, 3, 1, 2});
}

std::optional<Tensor> grad_weight(const Tensor& weight, bool needed) {
  if (!needed) return std::nullopt;
  return torch::stable::new_zeros(
      weight, {weight.size(0), weight.size(2), weight.size(3), weight.size(1)}, sum_dtype(weight));
}

Tensor finish_map(const std::optional<Tensor>& sum, const Tensor& input) {
  if (!sum) return torch::stable::new_empty(input, {0});
  return laid_out(torch::stable::to(*sum, input.scalar_type()), input);
}

Tensor finish_weight(const std::optional<Tensor>& sum, const Tensor& weight) {
  if (!sum) return torch::stable::new_empty(weight, {0});
  return laid_out(torch::stable::to(permuted(*sum, {0, 3, 1, 2}), weight.scalar_type()), weight);
}

void tap_forward(const ConvShape& shape, const Taps& taps, const Tensor& input,
                 const Tensor& weight, const std::optional<Tensor>& bias, bool relu,
                 const Tensor& output) {
  if (shape.batch * shape.pixels() * shape.groups * shape.group_out == 0) return;
  for_dtype(input.scalar_type(), [&](auto type) {
    Road<decltype(type)>(shape, taps, input, weight).forward(output, bias, relu);
  });
}

std::optional<Tensor> tap_backward(const ConvShape& shape, const Taps& taps, const Tensor& grad,
                                   const Tensor& input, const Tensor& weight,
                                   const std::optional<Tensor>& sum_input,
                                   const std::optional<Tensor>& sum_weight, bool need_scales) {
  const int64_t blocks = (shape.pixels() + kScalePixels - 1) / kScalePixels;
  std::optional<Tensor> partials;
  if (need_scales) {
    partials = torch::stable::new_zeros(weight, {shape.batch, blocks, 2}, sum_dtype(weight));
  }
  if (!shape.empty()) {
    for_dtype(weight.scalar_type(), [&](auto type) {
      Road<decltype(type)>(shape, taps, input, weight)
          .backward(grad, sum_input, sum_weight, partials);
    });
  }
  if (!partials) return std::nullopt;
  const std::vector<int64_t> over_blocks{1};
  return torch::stable::sum(*partials, over_blocks);
}

}  // namespace detkit::cuda
