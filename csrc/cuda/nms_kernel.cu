// Two kernels: all pairs into a bit mask, then one block walks the mask. Nothing returns to the
// host in between.
#include "common/box.h"
#include "cuda/launch.cuh"
#include "cuda/nms_kernel.h"

namespace detkit::cuda {
namespace {

using Word = unsigned long long;
constexpr int kReduceThreads = 1024;

// One block per pair of 64-box groups, one thread per row; groups below the diagonal are not
// needed.
template <class T>
__global__ void suppression_mask(const T* __restrict__ boxes, const int64_t* __restrict__ order,
                                 const int64_t* __restrict__ classes, int64_t n, int64_t words,
                                 T threshold, Word* __restrict__ mask) {
  __shared__ Box<T> other[kNmsWord];
  __shared__ T other_area[kNmsWord];
  __shared__ int64_t other_class[kNmsWord];
  const int lane = threadIdx.x;
  for (int64_t row_group = blockIdx.y; row_group < words; row_group += gridDim.y) {
    const int64_t column_group = blockIdx.x;
    if (column_group < row_group) return;  // so are all later row groups
    const int64_t column = column_group * kNmsWord + lane;
    if (column < n) {
      const int64_t index = order[column];
      const T* b = boxes + 4 * index;
      other[lane] = Box<T>{b[0], b[1], b[2], b[3]};
      other_area[lane] = box_area(other[lane]);
      other_class[lane] = classes ? classes[index] : 0;
    }
    __syncthreads();
    const int64_t row = row_group * kNmsWord + lane;
    if (row < n) {
      const int64_t index = order[row];
      const T* b = boxes + 4 * index;
      const Box<T> box{b[0], b[1], b[2], b[3]};
      const T area = box_area(box);
      const int64_t own_class = classes ? classes[index] : 0;
      const int first = row_group == column_group ? lane + 1 : 0;
      const int64_t left = n - column_group * kNmsWord;
      const int last = left < kNmsWord ? static_cast<int>(left) : kNmsWord;
      Word bits = 0;
      for (int k = first; k < last; ++k) {
        const bool hit = own_class == other_class[k] &&
                         iou_exceeds(box, area, other[k], other_area[k], threshold);
        bits |= Word(hit) << k;
      }
      mask[row * words + column_group] = bits;
    }
    __syncthreads();
  }
}

// One block. Group by group: one thread settles the group's own boxes, then all threads spread what
// its survivors suppress over the later groups.
__global__ void walk_mask(const Word* __restrict__ mask, int64_t n, int64_t words,
                          Word* __restrict__ removed, bool* __restrict__ keep) {
  __shared__ Word diagonal[kNmsWord];
  __shared__ Word survivors;
  for (int64_t w = threadIdx.x; w < words; w += blockDim.x) removed[w] = 0;
  __syncthreads();
  for (int64_t group = 0; group < words; ++group) {
    const int64_t base = group * kNmsWord;
    const int64_t left = n - base;
    const int size = left < kNmsWord ? static_cast<int>(left) : kNmsWord;
    if (threadIdx.x < size) diagonal[threadIdx.x] = mask[(base + threadIdx.x) * words + group];
    __syncthreads();
    if (threadIdx.x == 0) {
      Word gone = removed[group];
      Word kept = 0;
      for (int k = 0; k < size; ++k) {
        if (gone >> k & 1) continue;
        kept |= Word(1) << k;
        gone |= diagonal[k];
      }
      survivors = kept;
    }
    __syncthreads();
    const Word kept = survivors;
    if (threadIdx.x < size) keep[base + threadIdx.x] = kept >> threadIdx.x & 1;
    for (int64_t w = group + 1 + threadIdx.x; w < words; w += blockDim.x) {
      Word gone = removed[w];
      for (Word rest = kept; rest != 0; rest &= rest - 1) {
        gone |= mask[(base + __ffsll(static_cast<long long>(rest)) - 1) * words + w];
      }
      removed[w] = gone;
    }
    __syncthreads();
  }
}

}  // namespace

template <class T>
void nms(const T* boxes, const int64_t* order, const int64_t* classes, int64_t n, double threshold,
         unsigned long long* mask, unsigned long long* removed, bool* keep, cudaStream_t stream) {
  if (n == 0) return;
  const int64_t words = (n + kNmsWord - 1) / kNmsWord;
  constexpr int64_t kGridLimit = 65535;  // of the grid's second dimension
  const dim3 grid(static_cast<unsigned>(words),
                  static_cast<unsigned>(words < kGridLimit ? words : kGridLimit));
  suppression_mask<T><<<grid, kNmsWord, 0, stream>>>(boxes, order, classes, n, words,
                                                     round_down<T>(threshold), mask);
  walk_mask<<<1, kReduceThreads, 0, stream>>>(mask, n, words, removed, keep);
}

template void nms(const float*, const int64_t*, const int64_t*, int64_t, double,
                  unsigned long long*, unsigned long long*, bool*, cudaStream_t);
template void nms(const double*, const int64_t*, const int64_t*, int64_t, double,
                  unsigned long long*, unsigned long long*, bool*, cudaStream_t);

}  // namespace detkit::cuda
