// Index arithmetic of the convolutions' matrix product on tensor cores, as plain functions that
// tests run on the CPU too.
//
// A step of the product takes rows of four 16-byte chunks: of 8 halves, or of 4 floats. Fragments
// of mma.m16n8k16 of halves and mma.m16n8k8 of floats are as the PTX manual draws them, 32 bytes
// deep either; ldmatrix reads 8 rows of 16 bytes for each of its four matrices, lane l giving row l
// % 8 of matrix l / 8.
#pragma once

#include <cstdint>

#include "common/macros.h"
#include "common/tap_elements.h"

namespace detkit {

constexpr int kGemmChunks = 4;   // of a step
constexpr int kGemmProduct = 2;  // chunks that one instruction multiplies
constexpr int kGemmStages = 3;   // steps in shared memory: one in use, two on the way
constexpr int kGemmWarpColumns = 32;

// Numbers of a chunk.
template <typename T>
constexpr int kGemmPack = 16 / sizeof(T);

// Where a chunk lies in a stage. Chunks that one ldmatrix, or 8 neighbouring threads, touch lie in
// different banks: two rows fill all banks once, and every two rows the chunks trade places.
DETKIT_HD int gemm_slot(int row, int chunk) {
  return row * kGemmChunks + (chunk ^ (row / 2 % kGemmChunks));
}

struct GemmCell {
  int row, chunk;
};

// The chunk whose address lane `lane` gives to ldmatrix.x4 for a fragment A, 16 rows by two chunks.
DETKIT_HD GemmCell gemm_lane_a(int lane) { return {lane % 16, lane / 16}; }

// The same for two fragments B of 8 columns by two chunks; columns of B are rows of the weights.
DETKIT_HD GemmCell gemm_lane_b(int lane) { return {lane / 16 * 8 + lane % 8, lane / 8 % 2}; }

// Row and column of accumulator `i` (0..3) of a lane.
DETKIT_HD int gemm_sum_row(int lane, int i) { return lane / 4 + i / 2 * 8; }
DETKIT_HD int gemm_sum_column(int lane, int i) { return lane % 4 * 2 + i % 2; }

// One of the convolutions that a launch computes; T is a half type or float.
template <typename T>
struct GemmPart {
  TapPlan<float> taps;
  const T* weight;  // (groups, group_out, kernel, group_in)
  int64_t out_begin, group_out;
  int64_t first_tile, group_tiles;  // tiles of columns: before this part, and of one group

  DETKIT_HD int64_t depth() const { return taps.kernel() * taps.group_in; }
  DETKIT_HD int steps() const {
    constexpr int kStep = kGemmChunks * kGemmPack<T>;
    return static_cast<int>((depth() + kStep - 1) / kStep);
  }
};

// Which tap and channel a chunk of depth is, in units of chunks.
struct GemmDepth {
  int tap_row, tap_column, channel;
  bool inside;
};

template <typename T>
DETKIT_HD GemmDepth gemm_depth(const GemmPart<T>& part, int chunk) {
  const int per_tap = static_cast<int>(part.taps.group_in) / kGemmPack<T>;
  const int across = static_cast<int>(part.taps.kernel_w), tap = chunk / per_tap;
  return {tap / across, tap % across, chunk % per_tap * kGemmPack<T>, tap < part.taps.kernel()};
}

// The output that a row of the product stands for.
template <typename T>
struct GemmPixel {
  const T* image;  // the sample's first channel of the group
  int64_t sample;
  int row, column;
  bool inside;
};

template <typename T>
DETKIT_HD GemmPixel<T> gemm_pixel(const GemmPart<T>& part, const T* input, int64_t group,
                                  int64_t index, int64_t count) {
  const TapPlan<float>& taps = part.taps;
  if (index >= count) return {input, 0, 0, 0, false};
  const int64_t sample = index / taps.pixels(), pixel = index % taps.pixels();
  const T* image = input + sample * taps.height * taps.width * taps.channels + taps.in_begin +
                   group * taps.group_in;
  return {image, sample, static_cast<int>(pixel / taps.out_width),
          static_cast<int>(pixel % taps.out_width), true};
}

// The chunk that a whole tap reads, null outside the map.
template <typename T>
DETKIT_HD const T* gemm_whole_tap(const GemmPart<T>& part, const GemmPixel<T>& pixel,
                                  const GemmDepth& depth) {
  const TapPlan<float>& taps = part.taps;
  const int64_t h =
      pixel.row * taps.stride_h + depth.tap_row * taps.whole.dilation_h - taps.whole.padding_h;
  const int64_t w = pixel.column * taps.stride_w + depth.tap_column * taps.whole.dilation_w -
                    taps.whole.padding_w;
  const bool inside =
      pixel.inside && depth.inside && h >= 0 && h < taps.height && w >= 0 && w < taps.width;
  return inside ? pixel.image + (h * taps.width + w) * taps.channels + depth.channel : nullptr;
}

// The four chunks between which a scaled tap samples; zeros where there is none.
template <typename T>
DETKIT_HD RawCorners<T, kGemmPack<T>> gemm_scaled_tap(const GemmPart<T>& part,
                                                      const GemmPixel<T>& pixel,
                                                      const GemmDepth& depth) {
  if (!pixel.inside || !depth.inside) return {};
  return fetch_corners<T, kGemmPack<T>>(
      part.taps, pixel.image + depth.channel, part.taps.row(pixel.sample, depth.tap_row),
      part.taps.col(pixel.sample, depth.tap_column), pixel.row, pixel.column, false);
}

// The chunk of weights of one output, null outside.
template <typename T>
DETKIT_HD const T* gemm_weight(const GemmPart<T>& part, int64_t group, int64_t output, int chunk) {
  const int64_t at = int64_t(chunk) * kGemmPack<T>;
  const bool inside = output < part.group_out && at < part.depth();
  return inside ? part.weight + (group * part.group_out + output) * part.depth() + at : nullptr;
}

}  // namespace detkit
