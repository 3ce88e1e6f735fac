// The gradient of RoI pooling gathered instead of scattered: each block owns a tile of the map and
// adds up what the boxes give it, in the boxes' order. No atomics, so the sums are the same in
// every run.
#pragma once

#include <cstdint>

#include "common/roi_tiles.h"
#include "cuda/launch.cuh"
#include "cuda/roi_sample.cuh"

namespace detkit::cuda {

constexpr int kGatherBins = 16;      // bins along each axis whose weights are held at a time
constexpr int kGatherChannels = 32;  // of a block, a lane each; warps are the rows of the tile
static_assert(kGatherChannels * kRoiTile == kThreads);

// Gradients are (R, P, Q, depth). In plain pooling `depth` is the map's channels and each takes
// from all bins; with `per_bin`, channel d * P * Q + bin takes from that bin alone.
struct GatherShape {
  int64_t depth;
  bool per_bin;

  DETKIT_HD int64_t chunks() const { return (depth + kGatherChannels - 1) / kGatherChannels; }
};

inline int64_t gather_blocks(const RoiSpec& spec, const GatherShape& shape) {
  const int64_t down = (spec.height + kRoiTile - 1) / kRoiTile;
  const int64_t across = (spec.width + kRoiTile - 1) / kRoiTile;
  const int64_t bins = shape.per_bin ? spec.bins_down * spec.bins_across : 1;
  return spec.batch * bins * shape.chunks() * down * across;
}

// kMax: only the winning sample of each output, argmax (R, P, Q, depth), takes part.
template <class T, class A, bool kMax>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const RoiSpec spec, const GatherShape shape, const T* __restrict__ grad,
                  const int32_t* __restrict__ argmax, const A* __restrict__ rois, int64_t count,
                  int64_t blocks, T* __restrict__ grad_input) {
  __shared__ bool hits[kThreads];
  __shared__ A row_weights[kGatherBins][kRoiTile], column_weights[kGatherBins][kRoiTile];
  const int64_t down = (spec.height + kRoiTile - 1) / kRoiTile;
  const int64_t across = (spec.width + kRoiTile - 1) / kRoiTile;
  const int64_t all_bins = spec.bins_down * spec.bins_across;
  const int lane = threadIdx.x % kGatherChannels, line = threadIdx.x / kGatherChannels;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t left = block % across * kRoiTile, top = block / across % down * kRoiTile;
    const int64_t chunk = block / across / down % shape.chunks();
    const int64_t rest = block / across / down / shape.chunks();
    const int64_t own_bin = shape.per_bin ? rest % all_bins : 0;
    const int64_t image = shape.per_bin ? rest / all_bins : rest;
    const int64_t first_row = own_bin / spec.bins_across, first_column = own_bin % spec.bins_across;
    const int64_t last_row = shape.per_bin ? first_row + 1 : spec.bins_down;
    const int64_t last_column = shape.per_bin ? first_column + 1 : spec.bins_across;
    const int64_t channel = chunk * kGatherChannels + lane, row_at = top + line;
    A sums[kRoiTile] = {};
    for (int64_t base = 0; base < count; base += kThreads) {
      __syncthreads();  // the marks of the boxes before have been read
      const int64_t mine = base + threadIdx.x;
      bool hit = false;
      if (mine < count && roi_is_usable(rois + mine * 5, spec) &&
          static_cast<int64_t>(rois[mine * 5]) == image) {
        hit = roi_may_touch(roi_rows(rois + mine * 5, spec), spec.bins_down, top,
                            top + kRoiTile - 1) &&
              roi_may_touch(roi_columns(rois + mine * 5, spec), spec.bins_across, left,
                            left + kRoiTile - 1);
      }
      hits[threadIdx.x] = hit;
      __syncthreads();  // all marks stand
      for (int k = 0; k < kThreads; ++k) {
        if (!hits[k]) continue;  // alike in all threads
        const int64_t box = base + k;
        const RoiAxis<A> rows = roi_rows(rois + box * 5, spec);
        const RoiAxis<A> columns = roi_columns(rois + box * 5, spec);
        if constexpr (kMax) {
          if (channel >= shape.depth) continue;  // no barrier below
          const int64_t at = (box * all_bins + own_bin) * shape.depth + channel;
          const A weight = roi_sample_weight(rows, first_row, argmax[at] / columns.grid, row_at);
          if (weight == A(0)) continue;
          const A share = weight * widen(grad[at]);
          for (int w = 0; w < kRoiTile; ++w) {
            sums[w] += share * roi_sample_weight(columns, first_column, argmax[at] % columns.grid,
                                                 left + w);
          }
        } else {
          const A samples = roi_sample_count(rows, columns);
          for (int64_t p = first_row; p < last_row; p += kGatherBins) {
            for (int64_t q = first_column; q < last_column; q += kGatherBins) {
              __syncthreads();  // the weights before have been read
              for (int i = threadIdx.x; i < 2 * kGatherBins * kRoiTile; i += kThreads) {
                const int at = i % kRoiTile, bin = i / kRoiTile % kGatherBins;
                if (i < kGatherBins * kRoiTile) {
                  row_weights[bin][at] =
                      p + bin < last_row ? roi_bin_weight(rows, p + bin, top + at) : A(0);
                } else {
                  column_weights[bin][at] =
                      q + bin < last_column ? roi_bin_weight(columns, q + bin, left + at) : A(0);
                }
              }
              __syncthreads();  // all weights stand
              if (channel >= shape.depth) continue;
              for (int i = 0; i < kGatherBins; ++i) {
                const A row = row_weights[i][line] / samples;
                if (row == A(0)) continue;
                for (int j = 0; j < kGatherBins; ++j) {
                  A total = A(0);  // weights are not negative
                  for (int w = 0; w < kRoiTile; ++w) total += column_weights[j][w];
                  if (total == A(0)) continue;
                  const int64_t bin = (p + i) * spec.bins_across + q + j;
                  const A share = row * widen(grad[(box * all_bins + bin) * shape.depth + channel]);
                  for (int w = 0; w < kRoiTile; ++w) sums[w] += share * column_weights[j][w];
                }
              }
            }
          }
        }
      }
    }
    if (channel < shape.depth && row_at < spec.height) {
      const int64_t to = shape.per_bin ? channel * all_bins + own_bin : channel;
      T* cells = grad_input + ((image * spec.channels + to) * spec.height + row_at) * spec.width;
      for (int w = 0; w < kRoiTile && left + w < spec.width; ++w) store(cells + left + w, sums[w]);
    }
  }
}

}  // namespace detkit::cuda
