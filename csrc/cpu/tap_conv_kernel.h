// What the convolutions do apart from matrix products, on one channel plane at a time: sampling the
// taps of a row of outputs into columns, and the adjoint with the gradients of the two scales.
// No torch; instantiated for double, float and BFloat16 (computed in float).
#pragma once

#include <cstdint>

#include "common/bfloat16.h"
#include "common/scaled_taps.h"

namespace detkit::cpu {

// The map of one channel, its outputs, and where the kernel's taps read in it.
template <typename T>
struct TapGrid {
  int64_t height, width;          // of the input
  int64_t out_height, out_width;  // of the output
  int64_t stride_h, stride_w;
  int64_t kernel_h, kernel_w;
  const Tap<T>* rows;  // kernel_h taps
  const Tap<T>* cols;  // kernel_w taps
};

// Zeros that a line of `width` pixels needs before and behind it so that no tap leaves it.
struct Border {
  int64_t before, behind;
  int64_t width(int64_t line) const { return before + line + behind; }
};

template <typename T>
Border border(const TapGrid<T>& grid);

// Whether some output of an axis can read the map at this offset.
inline bool present(int64_t offset, int64_t length, int64_t outputs, int64_t stride) {
  return offset < length && (outputs - 1) * stride + offset >= 0;
}

// Samples outputs [first, last) (row-major) of one plane: tap (i, j) goes to
// columns[(i * kernel_w + j) * row_stride + output - first].
// `line` is scratch of border(grid).width(width) elements.
template <typename T>
void sample_plane(const TapGrid<compute_t<T>>& grid, const T* plane, int64_t first, int64_t last,
                  T* columns, int64_t row_stride, compute_t<T>* line);

// Gradients of the two scales, summed in float64.
struct ScaleGrad {
  double h = 0, w = 0;
};

// The adjoint of sample_plane: adds the gradient of the plane to `grad_plane` (unless null) and
// returns those of the scales (0 unless `plane` is given).
// `lines` is scratch of 2 * border(grid).width(width) elements.
template <typename T>
ScaleGrad gather_plane(const TapGrid<compute_t<T>>& grid, const T* columns, int64_t row_stride,
                       int64_t first, int64_t last, const T* plane, compute_t<T>* grad_plane,
                       compute_t<T>* lines);

// out[m * out_row + n * out_col] = sum_k a[m * K + k] * b[k * b_row + n] + bias[m] for matrices too
// small for a library's GEMM. `line` is scratch of N elements; `bias` may be null.
template <typename T>
void small_gemm(int64_t M, int64_t N, int64_t K, const T* a, const T* b, int64_t b_row,
                const T* bias, T* out, int64_t out_row, int64_t out_col, compute_t<T>* line);

// out[m * N + n] += sum_k a[m * K + k] * b[n * b_row + k], alike.
template <typename T>
void small_gemm_transposed(int64_t M, int64_t N, int64_t K, const T* a, const T* b, int64_t b_row,
                           compute_t<T>* out);

// to[i] = from[i], and to[i] += from[i].
template <typename T>
void convert(const compute_t<T>* from, T* to, int64_t size);
template <typename T>
void accumulate(const T* from, compute_t<T>* to, int64_t size);

// Adds bias[m] to the M x N matrix.
template <typename T>
void add_bias(const T* bias, T* out, int64_t M, int64_t N, int64_t out_row, int64_t out_col);

}  // namespace detkit::cpu
