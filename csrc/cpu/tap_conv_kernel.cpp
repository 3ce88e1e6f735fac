#include "cpu/tap_conv_kernel.h"

#include <algorithm>
#include <type_traits>

#include "common/macros.h"

namespace detkit::cpu {
namespace {

// Sums run in this many lanes on every instruction set, so results do not depend on it.
constexpr int64_t kLanes = 16;

// Outputs [q0, q1) of one row: they read x[q * stride + offset].
struct Span {
  int64_t q0, q1;
};

template <typename A>
DETKIT_INLINE void clear(A* to, int64_t size) {
  for (int64_t t = 0; t < size; ++t) to[t] = A(0);
}

// line = the row that tap `rows` sees at output row p; false where it lies outside the map.
template <typename T, typename A>
DETKIT_INLINE bool blend_rows(const TapGrid<A>& grid, const Tap<A>& tap, const T* plane, int64_t p,
                              A* DETKIT_RESTRICT line) {
  const int64_t width = grid.width;
  const int64_t near = p * grid.stride_h + tap.near, far = p * grid.stride_h + tap.far;
  const bool has_near = near >= 0 && near < grid.height;
  const bool has_far = far >= 0 && far < grid.height && tap.far_weight != A(0);
  const T* DETKIT_RESTRICT a = plane + (has_near ? near * width : 0);
  const T* DETKIT_RESTRICT b = plane + (has_far ? far * width : 0);
  const A wa = tap.near_weight, wb = tap.far_weight;
  if (has_near && has_far) {
    for (int64_t t = 0; t < width; ++t) line[t] = load(a[t]) * wa + load(b[t]) * wb;
  } else if (has_near) {
    for (int64_t t = 0; t < width; ++t) line[t] = load(a[t]) * wa;
  } else if (has_far) {
    for (int64_t t = 0; t < width; ++t) line[t] = load(b[t]) * wb;
  }
  return has_near || has_far;
}

// out = what tap `tap` sees of the line at outputs [q0, q1); Stride 0 means `stride`.
template <int Stride, typename T, typename A>
DETKIT_INLINE void blend_cols(const A* DETKIT_RESTRICT line, const Tap<A>& tap, bool has_near,
                              bool has_far, int64_t stride, Span span, T* DETKIT_RESTRICT out) {
  const int64_t step = Stride == 0 ? stride : Stride;
  const int64_t size = span.q1 - span.q0;
  const A wa = tap.near_weight, wb = tap.far_weight;
  const A* DETKIT_RESTRICT a = line + span.q0 * step + (has_near ? tap.near : 0);
  const A* DETKIT_RESTRICT b = line + span.q0 * step + (has_far ? tap.far : 0);
  if (has_near && has_far) {
    for (int64_t q = 0; q < size; ++q) out[q] = store<T>(a[q * step] * wa + b[q * step] * wb);
  } else if (has_near) {
    for (int64_t q = 0; q < size; ++q) out[q] = store<T>(a[q * step] * wa);
  } else if (has_far) {
    for (int64_t q = 0; q < size; ++q) out[q] = store<T>(b[q * step] * wb);
  } else {
    for (int64_t q = 0; q < size; ++q) out[q] = store<T>(A(0));
  }
}

template <int Stride, typename T, typename A>
DETKIT_INLINE void sample_rows(const TapGrid<A>& grid, const T* plane, int64_t first, int64_t last,
                               T* columns, int64_t row_stride, A* line) {
  const Border edge = border(grid);
  clear(line, edge.before);
  clear(line + edge.before + grid.width, edge.behind);
  A* middle = line + edge.before;
  for (int64_t p = first / grid.out_width; p * grid.out_width < last; ++p) {
    const int64_t begin = p * grid.out_width;
    const Span span{std::max(first - begin, int64_t(0)), std::min(last - begin, grid.out_width)};
    T* out = columns + begin + span.q0 - first;
    for (int64_t i = 0; i < grid.kernel_h; ++i) {
      const bool any = blend_rows(grid, grid.rows[i], plane, p, middle);
      for (int64_t j = 0; j < grid.kernel_w; ++j, out += row_stride) {
        const Tap<A>& tap = grid.cols[j];
        const bool near = any && present(tap.near, grid.width, grid.out_width, grid.stride_w);
        const bool far = any && tap.far_weight != A(0) &&
                         present(tap.far, grid.width, grid.out_width, grid.stride_w);
        blend_cols<Stride>(middle, tap, near, far, grid.stride_w, span, out);
      }
    }
  }
}

template <typename T>
DETKIT_CLONES void sample(const TapGrid<compute_t<T>>& grid, const T* plane, int64_t first,
                          int64_t last, T* columns, int64_t row_stride, compute_t<T>* line) {
  if (grid.stride_w == 1) {
    sample_rows<1>(grid, plane, first, last, columns, row_stride, line);
  } else if (grid.stride_w == 2) {
    sample_rows<2>(grid, plane, first, last, columns, row_stride, line);
  } else {
    sample_rows<0>(grid, plane, first, last, columns, row_stride, line);
  }
}

template <typename A>
DETKIT_INLINE A lane_sum(const A* lanes) {
  A sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// sum_q g[q] * line[q * step]
template <int Stride, typename T, typename A>
DETKIT_INLINE A dot(const T* DETKIT_RESTRICT g, const A* DETKIT_RESTRICT line, int64_t size,
                    int64_t stride) {
  const int64_t step = Stride == 0 ? stride : Stride;
  A lanes[kLanes] = {};
  int64_t q = 0;
  for (; q + kLanes <= size; q += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += load(g[q + l]) * line[(q + l) * step];
  }
  for (int64_t l = 0; q + l < size; ++l) lanes[l] += load(g[q + l]) * line[(q + l) * step];
  return lane_sum(lanes);
}

// to[q * step] += g[q] * weight
template <int Stride, typename T, typename A>
DETKIT_INLINE void spread(const T* DETKIT_RESTRICT g, A weight, int64_t size, int64_t stride,
                          A* DETKIT_RESTRICT to) {
  const int64_t step = Stride == 0 ? stride : Stride;
  for (int64_t q = 0; q < size; ++q) to[q * step] += load(g[q]) * weight;
}

template <typename A>
DETKIT_INLINE void add_scaled(const A* DETKIT_RESTRICT from, A weight, int64_t size,
                              A* DETKIT_RESTRICT to) {
  for (int64_t t = 0; t < size; ++t) to[t] += from[t] * weight;
}

// line = gradient of the row that tap row i saw: the adjoint of blend_cols over all its taps.
// Columns of consecutive taps lie `row_stride` apart.
template <int Stride, typename T, typename A>
DETKIT_INLINE void spread_taps(const TapGrid<A>& grid, const T* columns, int64_t row_stride,
                               Span span, A* middle) {
  for (int64_t j = 0; j < grid.kernel_w; ++j, columns += row_stride) {
    const Tap<A>& tap = grid.cols[j];
    A* to = middle + span.q0 * grid.stride_w;
    const int64_t size = span.q1 - span.q0;
    if (present(tap.near, grid.width, grid.out_width, grid.stride_w)) {
      spread<Stride>(columns, tap.near_weight, size, grid.stride_w, to + tap.near);
    }
    if (tap.far_weight != A(0) && present(tap.far, grid.width, grid.out_width, grid.stride_w)) {
      spread<Stride>(columns, tap.far_weight, size, grid.stride_w, to + tap.far);
    }
  }
}

// d/d scale_w of one tap row: sum_j slope_j <g_j, line at far - line at near>.
template <int Stride, typename T, typename A>
DETKIT_INLINE double slope_cols(const TapGrid<A>& grid, const T* columns, int64_t row_stride,
                                Span span, const A* middle) {
  double sum = 0;
  for (int64_t j = 0; j < grid.kernel_w; ++j, columns += row_stride) {
    const Tap<A>& tap = grid.cols[j];
    if (tap.slope == A(0)) continue;
    const A* from = middle + span.q0 * grid.stride_w;
    const int64_t size = span.q1 - span.q0;
    A change = 0;
    if (present(tap.far, grid.width, grid.out_width, grid.stride_w)) {
      change += dot<Stride>(columns, from + tap.far, size, grid.stride_w);
    }
    if (present(tap.near, grid.width, grid.out_width, grid.stride_w)) {
      change -= dot<Stride>(columns, from + tap.near, size, grid.stride_w);
    }
    sum += static_cast<double>(tap.slope) * static_cast<double>(change);
  }
  return sum;
}

template <int Stride, typename T, typename A>
DETKIT_INLINE ScaleGrad gather_rows(const TapGrid<A>& grid, const T* columns, int64_t row_stride,
                                    int64_t first, int64_t last, const T* plane, A* grad_plane,
                                    A* lines) {
  const Border edge = border(grid);
  const int64_t width = grid.width, full = edge.width(width);
  A* row_grad = lines + edge.before;
  A* row = lines + full + edge.before;
  clear(lines + full, full);  // blend_rows writes the middle only
  ScaleGrad grad;
  for (int64_t p = first / grid.out_width; p * grid.out_width < last; ++p) {
    const int64_t begin = p * grid.out_width;
    const Span span{std::max(first - begin, int64_t(0)), std::min(last - begin, grid.out_width)};
    for (int64_t i = 0; i < grid.kernel_h; ++i) {
      const Tap<A>& tap = grid.rows[i];
      const T* taps = columns + i * grid.kernel_w * row_stride + begin + span.q0 - first;
      const int64_t near = p * grid.stride_h + tap.near, far = p * grid.stride_h + tap.far;
      const bool has_near = near >= 0 && near < grid.height;
      const bool has_far = far >= 0 && far < grid.height;
      if (!has_near && !has_far) continue;
      clear(lines, full);
      spread_taps<Stride>(grid, taps, row_stride, span, row_grad);
      if (grad_plane != nullptr) {
        if (has_near) add_scaled(row_grad, tap.near_weight, width, grad_plane + near * width);
        if (has_far && tap.far_weight != A(0)) {
          add_scaled(row_grad, tap.far_weight, width, grad_plane + far * width);
        }
      }
      if (plane == nullptr) continue;
      if (tap.slope != A(0)) {
        A change = 0;
        if (has_far) change += dot<1>(plane + far * width, row_grad, width, 1);
        if (has_near) change -= dot<1>(plane + near * width, row_grad, width, 1);
        grad.h += static_cast<double>(tap.slope) * static_cast<double>(change);
      }
      if (grid.kernel_w > 1 && blend_rows(grid, tap, plane, p, row)) {
        grad.w += slope_cols<Stride>(grid, taps, row_stride, span, row);
      }
    }
  }
  return grad;
}

template <typename T>
DETKIT_CLONES ScaleGrad gather(const TapGrid<compute_t<T>>& grid, const T* columns,
                               int64_t row_stride, int64_t first, int64_t last, const T* plane,
                               compute_t<T>* grad_plane, compute_t<T>* lines) {
  if (grid.stride_w == 1) {
    return gather_rows<1>(grid, columns, row_stride, first, last, plane, grad_plane, lines);
  }
  if (grid.stride_w == 2) {
    return gather_rows<2>(grid, columns, row_stride, first, last, plane, grad_plane, lines);
  }
  return gather_rows<0>(grid, columns, row_stride, first, last, plane, grad_plane, lines);
}

template <typename T>
DETKIT_CLONES void multiply(int64_t M, int64_t N, int64_t K, const T* a, const T* b, int64_t b_row,
                            const T* bias, T* out, int64_t out_row, int64_t out_col,
                            compute_t<T>* line) {
  using A = compute_t<T>;
  for (int64_t m = 0; m < M; ++m, a += K, out += out_row) {
    const A start = bias == nullptr ? A(0) : load(bias[m]);
    for (int64_t n = 0; n < N; ++n) line[n] = start;
    for (int64_t k = 0; k < K; ++k) spread<1>(b + k * b_row, load(a[k]), N, 1, line);
    if (out_col == 1) {
      for (int64_t n = 0; n < N; ++n) out[n] = store<T>(line[n]);
    } else {
      for (int64_t n = 0; n < N; ++n) out[n * out_col] = store<T>(line[n]);
    }
  }
}

template <typename T>
DETKIT_CLONES void multiply_transposed(int64_t M, int64_t N, int64_t K, const T* a, const T* b,
                                       int64_t b_row, compute_t<T>* out) {
  // In blocks, so that float sums stay short and b stays in the first cache.
  constexpr int64_t kBlock = 2048;
  for (int64_t k = 0; k < K; k += kBlock) {
    const int64_t size = std::min(kBlock, K - k);
    for (int64_t m = 0; m < M; ++m) {
      for (int64_t n = 0; n < N; ++n) {
        const T* x = a + m * K + k;
        const T* y = b + n * b_row + k;
        compute_t<T> lanes[kLanes] = {};
        int64_t t = 0;
        for (; t + kLanes <= size; t += kLanes) {
          for (int64_t l = 0; l < kLanes; ++l) lanes[l] += load(x[t + l]) * load(y[t + l]);
        }
        for (int64_t l = 0; t + l < size; ++l) lanes[l] += load(x[t + l]) * load(y[t + l]);
        out[m * N + n] += lane_sum(lanes);
      }
    }
  }
}

template <typename T>
DETKIT_CLONES void convert_all(const compute_t<T>* DETKIT_RESTRICT from, T* DETKIT_RESTRICT to,
                               int64_t size) {
  for (int64_t t = 0; t < size; ++t) to[t] = store<T>(from[t]);
}

template <typename T>
DETKIT_CLONES void accumulate_all(const T* DETKIT_RESTRICT from, compute_t<T>* DETKIT_RESTRICT to,
                                  int64_t size) {
  for (int64_t t = 0; t < size; ++t) to[t] += load(from[t]);
}

template <typename T>
DETKIT_CLONES void add_bias_all(const T* bias, T* out, int64_t M, int64_t N, int64_t out_row,
                                int64_t out_col) {
  if (out_row == 1) {  // channels lie side by side
    for (int64_t n = 0; n < N; ++n) {
      T* pixel = out + n * out_col;
      for (int64_t m = 0; m < M; ++m) pixel[m] = store<T>(load(pixel[m]) + load(bias[m]));
    }
    return;
  }
  for (int64_t m = 0; m < M; ++m) {
    const compute_t<T> value = load(bias[m]);
    T* row = out + m * out_row;
    for (int64_t n = 0; n < N; ++n) row[n] = store<T>(load(row[n]) + value);
  }
}

}  // namespace

template <typename T>
Border border(const TapGrid<T>& grid) {
  Border edge{0, 0};
  const int64_t last = (grid.out_width - 1) * grid.stride_w;
  for (int64_t j = 0; j < grid.kernel_w; ++j) {
    for (const int64_t offset : {grid.cols[j].near, grid.cols[j].far}) {
      if (!present(offset, grid.width, grid.out_width, grid.stride_w)) continue;
      edge.before = std::max(edge.before, -offset);
      edge.behind = std::max(edge.behind, last + offset + 1 - grid.width);
    }
  }
  return edge;
}

template <typename T>
void sample_plane(const TapGrid<compute_t<T>>& grid, const T* plane, int64_t first, int64_t last,
                  T* columns, int64_t row_stride, compute_t<T>* line) {
  sample<T>(grid, plane, first, last, columns, row_stride, line);
}

template <typename T>
ScaleGrad gather_plane(const TapGrid<compute_t<T>>& grid, const T* columns, int64_t row_stride,
                       int64_t first, int64_t last, const T* plane, compute_t<T>* grad_plane,
                       compute_t<T>* lines) {
  return gather<T>(grid, columns, row_stride, first, last, plane, grad_plane, lines);
}

template <typename T>
void small_gemm(int64_t M, int64_t N, int64_t K, const T* a, const T* b, int64_t b_row,
                const T* bias, T* out, int64_t out_row, int64_t out_col, compute_t<T>* line) {
  multiply<T>(M, N, K, a, b, b_row, bias, out, out_row, out_col, line);
}

template <typename T>
void small_gemm_transposed(int64_t M, int64_t N, int64_t K, const T* a, const T* b, int64_t b_row,
                           compute_t<T>* out) {
  multiply_transposed<T>(M, N, K, a, b, b_row, out);
}

template <typename T>
void convert(const compute_t<T>* from, T* to, int64_t size) {
  convert_all<T>(from, to, size);
}

template <typename T>
void accumulate(const T* from, compute_t<T>* to, int64_t size) {
  accumulate_all<T>(from, to, size);
}

template <typename T>
void add_bias(const T* bias, T* out, int64_t M, int64_t N, int64_t out_row, int64_t out_col) {
  add_bias_all<T>(bias, out, M, N, out_row, out_col);
}

template Border border<float>(const TapGrid<float>&);
template Border border<double>(const TapGrid<double>&);

#define DETKIT_INSTANTIATE(T)                                                                    \
  template void sample_plane<T>(const TapGrid<compute_t<T>>&, const T*, int64_t, int64_t, T*,    \
                                int64_t, compute_t<T>*);                                         \
  template ScaleGrad gather_plane<T>(const TapGrid<compute_t<T>>&, const T*, int64_t, int64_t,   \
                                     int64_t, const T*, compute_t<T>*, compute_t<T>*);           \
  template void small_gemm<T>(int64_t, int64_t, int64_t, const T*, const T*, int64_t, const T*,  \
                              T*, int64_t, int64_t, compute_t<T>*);                              \
  template void small_gemm_transposed<T>(int64_t, int64_t, int64_t, const T*, const T*, int64_t, \
                                         compute_t<T>*);                                         \
  template void convert<T>(const compute_t<T>*, T*, int64_t);                                    \
  template void accumulate<T>(const T*, compute_t<T>*, int64_t);                                 \
  template void add_bias<T>(const T*, T*, int64_t, int64_t, int64_t, int64_t);

DETKIT_INSTANTIATE(double)
DETKIT_INSTANTIATE(float)
DETKIT_INSTANTIATE(BFloat16)

}  // namespace detkit::cpu
