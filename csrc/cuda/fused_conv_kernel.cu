// A block computes a square tile of (outputs of the map) x (output channels) of one part and group.
// Its warps share the tile two by (tile / 32). Depth goes in steps through a ring of kGemmStages
// stages in shared memory: while one is multiplied, the next two are on their way.
#include "cuda/fused_conv_kernel.h"
#include "cuda/launch.cuh"
#include "cuda/tensor_core.cuh"

namespace detkit::cuda {
namespace {

constexpr int threads_of(int tile) { return 2 * tile; }

// What a thread of a block fetches: the same chunk of depth of kRows rows of either operand.
template <typename T, int kTile, bool kScaled>
class Loader {
 public:
  static constexpr int kRows = kTile * kGemmChunks / threads_of(kTile);

  __device__ Loader(const FusedConv<T>& conv, const GemmPart<T>& part, int64_t group,
                    int64_t first_pixel, int64_t first_output)
      : part_(part), input_(conv.input), group_(group), first_output_(first_output) {
    DETKIT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      pixels_[i] = gemm_pixel(part, conv.input, group, first_pixel + row(i), conv.pixels);
    }
  }

  // Starts what step `step` needs; scaled taps wait in registers until finish().
  __device__ void start(int step, uint4* stage) {
    const int chunk = step * kGemmChunks + own_chunk();
    const GemmDepth depth = gemm_depth(part_, chunk);
    DETKIT_UNROLL
    for (int i = 0; i < kRows; ++i) {
      if constexpr (kScaled) {
        corners_[i] = gemm_scaled_tap(part_, pixels_[i], depth);
      } else {
        const T* from = gemm_whole_tap(part_, pixels_[i], depth);
        copy_async(stage + gemm_slot(row(i), own_chunk()), from ? from : input_, from != nullptr);
      }
      const T* from = gemm_weight(part_, group_, first_output_ + row(i), chunk);
      copy_async(stage + gemm_slot(kTile + row(i), own_chunk()), from ? from : part_.weight,
                 from != nullptr);
    }
  }

  __device__ void finish(uint4* stage) {
    if constexpr (kScaled) {
      DETKIT_UNROLL
      for (int i = 0; i < kRows; ++i) {
        auto* to = reinterpret_cast<Pack<T, kGemmPack<T>>*>(stage + gemm_slot(row(i), own_chunk()));
        *to = sampled(corners_[i]);
      }
    }
  }

 private:
  __device__ static int row(int i) {
    return threadIdx.x / kGemmChunks + i * (threads_of(kTile) / kGemmChunks);
  }
  __device__ static int own_chunk() { return threadIdx.x % kGemmChunks; }

  const GemmPart<T>& part_;
  const T* input_;
  int64_t group_, first_output_;
  GemmPixel<T> pixels_[kRows];
  RawCorners<T, kGemmPack<T>> corners_[kScaled ? kRows : 1];
};

// A warp's share of the tile: kBands fragments of 16 rows by four of 8 columns.
template <typename T, int kTile>
class WarpTile {
 public:
  static constexpr int kBands = kTile / 2 / 16, kPairs = kGemmWarpColumns / 16;

  __device__ void multiply(const uint4* stage) {
    const int lane = threadIdx.x % 32;
    DETKIT_UNROLL
    for (int chunk = 0; chunk < kGemmChunks; chunk += kGemmProduct) {
      uint32_t a[kBands][4], b[kPairs][4];
      DETKIT_UNROLL
      for (int i = 0; i < kBands; ++i) {
        const GemmCell cell = gemm_lane_a(lane);
        load_matrices<T>(a[i],
                         stage + gemm_slot(first_row() + 16 * i + cell.row, chunk + cell.chunk));
      }
      DETKIT_UNROLL
      for (int j = 0; j < kPairs; ++j) {
        const GemmCell cell = gemm_lane_b(lane);
        load_matrices<T>(b[j], stage + gemm_slot(kTile + first_column() + 16 * j + cell.row,
                                                 chunk + cell.chunk));
      }
      DETKIT_UNROLL
      for (int i = 0; i < kBands; ++i) {
        DETKIT_UNROLL
        for (int j = 0; j < 2 * kPairs; ++j) {
          const uint32_t column[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
          multiply_add<T>(sums_[i][j], a[i], column);
        }
      }
    }
  }

  // Adds the bias, cuts at 0 if asked to, and rounds once. Neighbouring channels go out in pairs
  // where they are aligned.
  __device__ void write(const FusedConv<T>& conv, const GemmPart<T>& part, int64_t group,
                        int64_t first_pixel, int64_t first_output) const {
    const int lane = threadIdx.x % 32;
    const int64_t begin = part.out_begin + group * part.group_out;
    const bool pairs = conv.outputs % 2 == 0 && begin % 2 == 0;
    DETKIT_UNROLL
    for (int i = 0; i < kBands; ++i) {
      DETKIT_UNROLL
      for (int j = 0; j < 2 * kPairs; ++j) {
        DETKIT_UNROLL
        for (int u = 0; u < 4; u += 2) {
          const int64_t pixel = first_pixel + first_row() + 16 * i + gemm_sum_row(lane, u);
          const int64_t output = first_output + first_column() + 8 * j + gemm_sum_column(lane, u);
          if (pixel >= conv.pixels || output >= part.group_out) continue;
          const bool both = output + 1 < part.group_out;
          const T* bias = conv.bias ? conv.bias + begin + output : nullptr;
          Pack<T, 2> pair{};
          DETKIT_UNROLL
          for (int v = 0; v < 2; ++v) {
            if (v == 1 && !both) continue;
            const float sum = sums_[i][j][u + v] + (bias ? Cell<T>::load(bias[v]) : 0.f);
            pair.value[v] = Cell<T>::store(conv.relu ? rectified(sum) : sum);
          }
          T* to = conv.output + pixel * conv.outputs + begin + output;
          if (pairs && both) {
            *reinterpret_cast<Pack<T, 2>*>(to) = pair;
          } else {
            to[0] = pair.value[0];
            if (both) to[1] = pair.value[1];
          }
        }
      }
    }
  }

 private:
  __device__ static int first_row() {
    return threadIdx.x / 32 / (kTile / kGemmWarpColumns) * (kTile / 2);
  }
  __device__ static int first_column() {
    return threadIdx.x / 32 % (kTile / kGemmWarpColumns) * kGemmWarpColumns;
  }

  float sums_[kBands][2 * kPairs][4] = {};
};

// Blocks side by side share rows: column tiles of all parts vary fastest.
template <typename T, int kTile, bool kScaled>
__global__ void __launch_bounds__(threads_of(kTile))
    fused_kernel(const __grid_constant__ FusedConv<T> conv, int column_tiles) {
  __shared__ uint4 stages[kGemmStages][2 * kTile * kGemmChunks];
  const int64_t tile = blockIdx.x % column_tiles;
  const int64_t first_pixel = int64_t(blockIdx.x / column_tiles) * kTile;
  int index = 0;
  while (index + 1 < conv.parts && tile >= conv.part[index + 1].first_tile) ++index;
  const GemmPart<T>& part = conv.part[index];
  const int64_t group = (tile - part.first_tile) / part.group_tiles;
  const int64_t first_output = (tile - part.first_tile) % part.group_tiles * kTile;

  Loader<T, kTile, kScaled> loader(conv, part, group, first_pixel, first_output);
  WarpTile<T, kTile> sums;
  const int steps = part.steps();
  for (int step = 0; step < kGemmStages - 1; ++step) {
    if (step < steps) {
      loader.start(step, stages[step]);
      loader.finish(stages[step]);
    }
    copies_commit();  // also where there is nothing: the number of groups counts the steps
  }
  for (int step = 0; step < steps; ++step) {
    copies_wait<kGemmStages - 2>();  // this thread's share of this step has arrived
    // So has every other thread's, and all have done with the step before, whose stage is next.
    __syncthreads();
    const int ahead = step + kGemmStages - 1;
    uint4* stage = stages[ahead % kGemmStages];
    if (ahead < steps) loader.start(ahead, stage);
    copies_commit();
    sums.multiply(stages[step % kGemmStages]);
    if (ahead < steps) loader.finish(stage);
  }
  copies_wait<0>();
  sums.write(conv, part, group, first_pixel, first_output);
}

// Numbers the column tiles of all parts; returns how many there are.
template <typename T>
int64_t number_tiles(FusedConv<T>& conv, int tile) {
  int64_t tiles = 0;
  for (int i = 0; i < conv.parts; ++i) {
    GemmPart<T>& part = conv.part[i];
    part.first_tile = tiles;
    part.group_tiles = (part.group_out + tile - 1) / tile;
    tiles += part.taps.groups * part.group_tiles;
  }
  return tiles;
}

template <typename T, int kTile>
void run(FusedConv<T> conv, bool scaled, cudaStream_t stream) {
  const int columns = static_cast<int>(number_tiles(conv, kTile));
  const unsigned blocks = static_cast<unsigned>((conv.pixels + kTile - 1) / kTile * columns);
  constexpr int kBlock = threads_of(kTile);
  if (scaled) {
    fused_kernel<T, kTile, true><<<blocks, kBlock, 0, stream>>>(conv, columns);
  } else {
    fused_kernel<T, kTile, false><<<blocks, kBlock, 0, stream>>>(conv, columns);
  }
}

}  // namespace

template <typename T>
void fused_conv(FusedConv<T> conv, bool scaled, int processors, cudaStream_t stream) {
  const int64_t large =
      (conv.pixels + kGemmLargeTile - 1) / kGemmLargeTile * number_tiles(conv, kGemmLargeTile);
  if (large >= processors) {
    run<T, kGemmLargeTile>(conv, scaled, stream);
  } else {
    run<T, kGemmSmallTile>(conv, scaled, stream);
  }
}

template void fused_conv(FusedConv<float>, bool, int, cudaStream_t);
template void fused_conv(FusedConv<__half>, bool, int, cudaStream_t);
template void fused_conv(FusedConv<__nv_bfloat16>, bool, int, cudaStream_t);

}  // namespace detkit::cuda
