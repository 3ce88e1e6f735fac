// float16 and bfloat16 for the raw kernels: torch's header-only types, nothing else of torch.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace detkit::cpu {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

}  // namespace detkit::cpu
