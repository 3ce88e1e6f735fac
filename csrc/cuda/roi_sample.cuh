// One bilinear sample of a plane or of channels side by side, its adjoint, and loads and stores of
// any dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "common/roi.h"
#include "common/tap_elements.h"

namespace detkit::cuda {

// By name, not by cast: torch's build flags take the implicit conversions of half away.
__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void store(float* to, float v) { *to = v; }
__device__ __forceinline__ void store(double* to, double v) { *to = v; }
__device__ __forceinline__ void store(__half* to, float v) { *to = __float2half_rn(v); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float v) { *to = __float2bfloat16_rn(v); }

template <class A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(nanf(""));
}

// The value at (y, x); taps outside the map are not read.
template <class T, class A>
__device__ A sample(const T* __restrict__ plane, int64_t width, const Taps<A>& y,
                    const Taps<A>& x) {
  A value = A(0);
  const auto row = [&](int64_t index, A weight) {
    const T* cells = plane + index * width;
    if (x.low_inside) value += weight * x.low_weight * widen(cells[x.low]);
    if (x.high_inside) value += weight * x.high_weight * widen(cells[x.high]);
  };
  if (y.low_inside) row(y.low, y.low_weight);
  if (y.high_inside) row(y.high, y.high_weight);
  return value;
}

// V channels that lie side by side, added up at (y, x); `map` is the first one at the origin.
template <class T, class A, int V>
__device__ void add_sample(const T* __restrict__ map, int64_t width, int64_t channels,
                           const Taps<A>& y, const Taps<A>& x, A (&sums)[V]) {
  const auto cell = [&](int64_t h, int64_t w, A weight) {
    const auto pack = *reinterpret_cast<const Pack<T, V>*>(map + (h * width + w) * channels);
    for (int v = 0; v < V; ++v) sums[v] += weight * widen(pack.value[v]);
  };
  const auto row = [&](int64_t index, A weight) {
    if (x.low_inside) cell(index, x.low, weight * x.low_weight);
    if (x.high_inside) cell(index, x.high, weight * x.high_weight);
  };
  if (y.low_inside) row(y.low, y.low_weight);
  if (y.high_inside) row(y.high, y.high_weight);
}

// Adds the gradient of sample() by atomics, in no fixed order. Neighbours in a row of the map lie
// `step` apart.
template <class A>
__device__ void spread(A* plane, int64_t width, int64_t step, const Taps<A>& y, const Taps<A>& x,
                       A grad) {
  const auto row = [&](int64_t index, A weight) {
    A* cells = plane + index * width * step;
    if (x.low_inside) atomicAdd(cells + x.low * step, weight * x.low_weight * grad);
    if (x.high_inside) atomicAdd(cells + x.high * step, weight * x.high_weight * grad);
  };
  if (y.low_inside) row(y.low, y.low_weight);
  if (y.high_inside) row(y.high, y.high_weight);
}

// Calls visit(y taps, x taps) for the samples of a bin that can lie on the map, row by row.
template <class A, class Visit>
__device__ void for_each_sample(const RoiAxis<A>& rows, const RoiAxis<A>& columns, int64_t row_bin,
                                int64_t column_bin, Visit visit) {
  const A top = rows.bin_start(row_bin), left = columns.bin_start(column_bin);
  const RoiWindow down = roi_window(rows, top), across = roi_window(columns, left);
  for (int64_t i = down.begin; i < down.end; ++i) {
    const Taps<A> y = rows.taps(top, i);
    if (!y.low_inside && !y.high_inside) continue;
    for (int64_t j = across.begin; j < across.end; ++j) visit(y, columns.taps(left, j));
  }
}

}  // namespace detkit::cuda
