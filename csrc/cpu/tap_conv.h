// The convolutions' common CPU road: sample taps into columns, multiply with the weights, and back.
// An operator says where its taps read and how large it is, and calls these. Work is cut into tasks
// by its sizes alone and each task runs on one thread, so results do not depend on their number.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/scaled_taps.h"
#include "conv_shapes.h"
#include "torch_stable.h"

namespace detkit::cpu {

// Taps of every sample, held in double, which loses nothing of float.
struct SampleTaps {
  bool shared;                    // one set for all samples
  std::vector<Tap<double>> rows;  // kernel_h per set
  std::vector<Tap<double>> cols;  // kernel_w per set
};

// Taps at whole pixels, for all samples.
SampleTaps whole_taps(const ConvShape& shape, const WholeTaps& taps);

// The working dtype is that of the input, but float for Half, which CPUs multiply slowly; sums are
// held in float, or in double.

// The result of an operator, and the map the road reads or writes in its place: in the working
// dtype, channels side by side if the result is so or a product must span several small samples.
struct RoadMap {
  Tensor result, work;
  bool channels_last;
};
RoadMap make_output(const Tensor& input, const ConvShape& shape);
Tensor finish(const RoadMap& output);

// With `relu`, what is below 0 made 0 in place.
inline Tensor activated(const Tensor& output, bool relu) {
  return relu ? call1("aten::relu_", "", output) : output;
}

RoadMap read_grad(const Tensor& grad);

// A contiguous tensor in the working dtype: the tensor itself where it is that already.
Tensor prepared(const Tensor& tensor);
std::optional<Tensor> prepared(const std::optional<Tensor>& tensor);

// The same; where only the shape was needed, a tensor that must not be read.
Tensor read_input(const Tensor& input, bool needed);

// A gradient while it is added up, contiguous zeros in the sum dtype at first, and then as
// `like` wants it: its dtype, and channels_last if it is. Empty where not needed.
class Sum {
 public:
  Sum(const Tensor& like, bool needed);
  Tensor result() const;

  std::optional<Tensor> sum;

 private:
  Tensor like_;
};

// Writes the output channels of `shape`. Input, weight and bias are prepared in the working dtype.
void tap_forward(const ConvShape& shape, const SampleTaps& taps, const Tensor& input,
                 const Tensor& weight, const std::optional<Tensor>& bias, const RoadMap& output);

// Adds to the gradients that are given: of input and weight contiguous in the sum dtype, of scales
// (N, 2) doubles.
void tap_backward(const ConvShape& shape, const SampleTaps& taps, const RoadMap& grad,
                  const Tensor& input, const Tensor& weight,
                  const std::optional<Tensor>& grad_input, const std::optional<Tensor>& grad_weight,
                  std::vector<double>* grad_scales);

}  // namespace detkit::cpu
