// The convolutions' CUDA arithmetic, one element at a time: V neighbouring channels of a map whose
// channels lie side by side. Plain functions, so that tests run them on the CPU too.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/scaled_taps.h"

namespace detkit {

// How a storage type is read and written; half types add theirs where they are known.
template <typename T>
struct Cell {
  using Compute = T;
  static DETKIT_HD T load(T value) { return value; }
  static DETKIT_HD T store(T value) { return value; }
};

// ReLU; NaN stays NaN.
template <typename T>
DETKIT_HD T rectified(T value) {
  return value < T(0) ? T(0) : value;
}

// V channels that move in one instruction.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
  T value[V];
};

// Geometry of one convolution and where its taps read; T computes.
template <typename T>
struct TapPlan {
  int64_t channels, in_begin;  // of the input, and the first one used
  int64_t height, width, out_height, out_width;
  int64_t stride_h, stride_w, kernel_h, kernel_w;
  int64_t groups, group_in;
  WholeTaps whole;
  const T* scales;  // (samples, 2), or null for the whole taps

  DETKIT_HD Tap<T> row(int64_t sample, int64_t i) const {
    if (scales == nullptr) return whole_tap<T>(i * whole.dilation_h - whole.padding_h);
    return scaled_tap<T>(i - kernel_h / 2, scales[2 * sample], height);
  }
  DETKIT_HD Tap<T> col(int64_t sample, int64_t j) const {
    if (scales == nullptr) return whole_tap<T>(j * whole.dilation_w - whole.padding_w);
    return scaled_tap<T>(j - kernel_w / 2, scales[2 * sample + 1], width);
  }
  DETKIT_HD int64_t pixels() const { return out_height * out_width; }
  DETKIT_HD int64_t kernel() const { return kernel_h * kernel_w; }
};

// The four pixels between which one tap samples, zero outside the map; rows first, then columns.
template <typename T>
struct Corners {
  T near_near, near_far, far_near, far_far;
};

// Zeros outside the map.
template <typename T, int V>
DETKIT_HD Pack<T, V> load_pixel(const TapPlan<typename Cell<T>::Compute>& plan, const T* image,
                                int64_t h, int64_t w) {
  if (h < 0 || h >= plan.height || w < 0 || w >= plan.width) return {};
  return *reinterpret_cast<const Pack<T, V>*>(image + (h * plan.width + w) * plan.channels);
}

// The corners of V channels as they are stored, with the taps that weigh them.
template <typename T, int V>
struct RawCorners {
  Pack<T, V> near_near, near_far, far_near, far_far;
  Tap<typename Cell<T>::Compute> row, col;
};

// `image` is the sample's first channel of the pack. A far corner of no weight is read only where
// derivatives ask for it.
template <typename T, int V>
DETKIT_HD RawCorners<T, V> fetch_corners(const TapPlan<typename Cell<T>::Compute>& plan,
                                         const T* image, const Tap<typename Cell<T>::Compute>& row,
                                         const Tap<typename Cell<T>::Compute>& col, int64_t p,
                                         int64_t q, bool derivatives) {
  const int64_t h0 = p * plan.stride_h + row.near, h1 = p * plan.stride_h + row.far;
  const int64_t w0 = q * plan.stride_w + col.near, w1 = q * plan.stride_w + col.far;
  const bool far_h = derivatives || row.far_weight != 0;
  const bool far_w = derivatives || col.far_weight != 0;
  RawCorners<T, V> raw{{}, {}, {}, {}, row, col};
  raw.near_near = load_pixel<T, V>(plan, image, h0, w0);
  if (far_w) raw.near_far = load_pixel<T, V>(plan, image, h0, w1);
  if (far_h) raw.far_near = load_pixel<T, V>(plan, image, h1, w0);
  if (far_h && far_w) raw.far_far = load_pixel<T, V>(plan, image, h1, w1);
  return raw;
}

template <typename T, int V>
DETKIT_HD Corners<typename Cell<T>::Compute> corners_of(const RawCorners<T, V>& raw, int v) {
  return {Cell<T>::load(raw.near_near.value[v]), Cell<T>::load(raw.near_far.value[v]),
          Cell<T>::load(raw.far_near.value[v]), Cell<T>::load(raw.far_far.value[v])};
}

template <typename T, int V>
DETKIT_HD void load_corners(const TapPlan<typename Cell<T>::Compute>& plan, const T* image,
                            const Tap<typename Cell<T>::Compute>& row,
                            const Tap<typename Cell<T>::Compute>& col, int64_t p, int64_t q,
                            bool derivatives, Corners<typename Cell<T>::Compute> (&corners)[V]) {
  const auto raw = fetch_corners<T, V>(plan, image, row, col, p, q, derivatives);
  for (int v = 0; v < V; ++v) corners[v] = corners_of(raw, v);
}

template <typename T>
DETKIT_HD T sampled(const Tap<T>& row, const Tap<T>& col, const Corners<T>& x) {
  return blend(col, blend(row, x.near_near, x.far_near), blend(row, x.near_far, x.far_far));
}

// The V samples between the corners, rounded once.
template <typename T, int V>
DETKIT_HD Pack<T, V> sampled(const RawCorners<T, V>& raw) {
  Pack<T, V> out;
  for (int v = 0; v < V; ++v) {
    out.value[v] = Cell<T>::store(sampled(raw.row, raw.col, corners_of(raw, v)));
  }
  return out;
}

// What one column gradient g adds to those of the two scales.
template <typename T>
struct ScaleTerms {
  T h, w;
};

template <typename T>
DETKIT_HD ScaleTerms<T> scale_terms(const Tap<T>& row, const Tap<T>& col, const Corners<T>& x,
                                    T g) {
  const T rows = blend(col, x.far_near, x.far_far) - blend(col, x.near_near, x.near_far);
  const T cols = blend(row, x.near_far, x.far_far) - blend(row, x.near_near, x.far_near);
  return {row.slope == T(0) ? T(0) : row.slope * g * rows,
          col.slope == T(0) ? T(0) : col.slope * g * cols};
}

// Adds the gradient that outputs [first, last) of one sample give to V channels of input (r, t).
// `columns` points to the first channel of the pack at output `first`, tap 0; outputs lie
// `pixel_step` apart and taps `tap_step`.
template <typename T, int V>
DETKIT_HD void gather_input(const TapPlan<typename Cell<T>::Compute>& plan, int64_t sample,
                            int64_t r, int64_t t, int64_t first, int64_t last, const T* columns,
                            int64_t pixel_step, int64_t tap_step,
                            typename Cell<T>::Compute (&sum)[V]) {
  using A = typename Cell<T>::Compute;
  for (int64_t i = 0; i < plan.kernel_h; ++i) {
    const Tap<A> row = plan.row(sample, i);
    for (int u = 0; u < 2; ++u) {
      const A row_weight = u ? row.far_weight : row.near_weight;
      if (row_weight == A(0)) continue;
      const int64_t p = reading_output(r, u ? row.far : row.near, plan.stride_h, plan.out_height);
      if (p < 0 || (p + 1) * plan.out_width <= first || p * plan.out_width >= last) continue;
      for (int64_t j = 0; j < plan.kernel_w; ++j) {
        const Tap<A> col = plan.col(sample, j);
        for (int v = 0; v < 2; ++v) {
          const A weight = row_weight * (v ? col.far_weight : col.near_weight);
          const int64_t q =
              reading_output(t, v ? col.far : col.near, plan.stride_w, plan.out_width);
          const int64_t output = p * plan.out_width + q;
          if (weight == A(0) || q < 0 || output < first || output >= last) continue;
          const auto pack = *reinterpret_cast<const Pack<T, V>*>(
              columns + (output - first) * pixel_step + (i * plan.kernel_w + j) * tap_step);
          for (int c = 0; c < V; ++c) sum[c] += weight * Cell<T>::load(pack.value[c]);
        }
      }
    }
  }
}

}  // namespace detkit
