// The convolutions' other CUDA road: sampled on the fly into one matrix product on tensor cores,
// for halves, and floats as TF32, whose channels fill 16-byte chunks. Forward only; gradients take
// the common road.
#pragma once

#include <optional>
#include <vector>

#include "conv_shapes.h"
#include "torch_stable.h"

namespace detkit::cuda {

struct FusedPart {
  ConvShape shape;
  WholeTaps whole;  // not read where there are scales
  Tensor weight;
};

// Writes the outputs of all parts, with `relu` none below 0. Input (channels side by side), bias
// and scales (N, 2) dense. Refuses what does not fit, saying why.
void fused_forward(const char* op, const std::vector<FusedPart>& parts, const Tensor& input,
                   const std::optional<Tensor>& scales, const std::optional<Tensor>& bias,
                   bool relu, const Tensor& output);

}  // namespace detkit::cuda
