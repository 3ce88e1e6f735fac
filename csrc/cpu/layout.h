// Maps between planes (contiguous) and channels side by side (channels_last), in about the time
// that memory takes; torch's own strided copies take two to four times that.
#pragma once

#include "torch_stable.h"

namespace detkit::cpu {

// The map in that layout: itself where it is in it already.
Tensor side_by_side(const Tensor& map);
Tensor in_planes(const Tensor& map);

// to = map, where `to` is a slice of the channels of a contiguous tensor.
void copy_to_planes(const Tensor& map, Tensor to);

}  // namespace detkit::cpu
