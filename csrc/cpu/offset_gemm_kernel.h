// A matrix product whose operands need not be packed: tables say where the columns of one and the
// rows of the other begin. Convolutions multiply their weights as they lie with maps as they lie.
// No torch; float only, written with the vector instructions of x86-64.
#pragma once

#include <cstdint>

namespace detkit::cpu {

// out[r, n] = sum_k a[r, k] b[k, n], plus bias[r] or plus what `out` held.
struct OffsetProduct {
  int64_t rows, cols, depth;
  const float* a;  // a[r, k] = a[r * a_row + a_at[k]]
  int64_t a_row;
  const int64_t* a_at;
  const float* b;  // b[k, n] = b[b_at[k] + n]
  const int64_t* b_at;
  float* out;  // out[r, n] = out[r * out_row + n]
  int64_t out_row;
  const float* bias;  // of each row, null for 0
  bool add;           // to what `out` held, in place of the bias
};

// What is fastest to multiply at once, none where this processor has no kernel.
struct OffsetGemm {
  int64_t rows, cols;  // what is held in registers: products should have multiples of these
  int64_t depth;       // and about this depth at once
  void (*multiply)(const OffsetProduct&);
  // to[i] = a[i] * a_weight, plus b[i] * b_weight unless b is null.
  void (*blend)(const float* a, float a_weight, const float* b, float b_weight, int64_t size,
                float* to);
};

// The kernels that run here, best first, ended by one of 0 columns.
const OffsetGemm* offset_gemms();

}  // namespace detkit::cpu
