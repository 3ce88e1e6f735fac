// Products and sums that round once each, on devices too, so that host and device give the same
// bits. On the host -ffp-contract=off says so for every expression.
#pragma once

#include "common/macros.h"

namespace detkit {

#if defined(__CUDA_ARCH__)
DETKIT_HD float rounded_mul(float a, float b) { return __fmul_rn(a, b); }
DETKIT_HD double rounded_mul(double a, double b) { return __dmul_rn(a, b); }
DETKIT_HD float rounded_add(float a, float b) { return __fadd_rn(a, b); }
DETKIT_HD double rounded_add(double a, double b) { return __dadd_rn(a, b); }
#else
template <class T>
DETKIT_HD T rounded_mul(T a, T b) {
  return a * b;
}
template <class T>
DETKIT_HD T rounded_add(T a, T b) {
  return a + b;
}
#endif

}  // namespace detkit
