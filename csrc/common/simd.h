// Fixed-width vectors by compiler extension. A function marked DETKIT_CLONES is compiled for each
// instruction set, and a vector becomes one register or several there.
#pragma once

#include <cstdint>

#include "common/macros.h"

namespace detkit {

constexpr int kVectorBytes = 32;

// One AVX register: 8 floats or 4 doubles. Loads and stores through it may alias and must be
// aligned to kVectorBytes.
template <class A>
struct Vector {
  typedef A type __attribute__((vector_size(kVectorBytes), may_alias));
  static constexpr int lanes = kVectorBytes / sizeof(A);
};

}  // namespace detkit
