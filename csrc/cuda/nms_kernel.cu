// One launch per chunk of ranks: its first block settles a chunk, the others let the survivors of
// the chunk before it suppress all later boxes. A launch reads only what earlier launches wrote, so
// blocks never wait for each other.
#include "cuda/launch.cuh"
#include "cuda/nms_kernel.h"

namespace detkit::cuda {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kShares = 4;  // threads that share the survivors for one later box
constexpr int kLaterBoxes = kNmsChunk / kShares;

template <class T>
__device__ Box<T> box_at(const T* boxes, int64_t row) {
  const T* b = boxes + 4 * row;
  return {b[0], b[1], b[2], b[3]};
}

template <class T>
__global__ void rank_kernel(const NmsWork<T> work, const T* __restrict__ boxes,
                            const int64_t* __restrict__ order, const int64_t* __restrict__ by_class,
                            const int64_t* __restrict__ classes) {
  DETKIT_GRID_STRIDE(rank, work.n) {
    const int64_t row = order[by_class ? by_class[rank] : rank];
    work.ranked[rank] = box_at(boxes, row);
    if (classes) work.classes[rank] = classes[row];
    work.removed[rank] = 0;
  }
}

// A thread per word: neighbouring threads look from neighbouring boxes at the same 32 others.
template <class T>
__global__ void overlap_kernel(const NmsWork<T> work) {
  DETKIT_GRID_STRIDE(index, nms_chunks(work.n) * kNmsWords * kNmsChunk) {
    const int64_t chunk = index / kNmsChunk / kNmsWords;
    const int word = static_cast<int>(index / kNmsChunk % kNmsWords);
    const int64_t rank = chunk * kNmsChunk + index % kNmsChunk;
    const int64_t first = nms_word_rank(chunk, word);
    uint32_t bits = 0;
    if (rank < work.n && first >= 0 && first < rank) {
      const Box<T> box = work.ranked[rank];
      const int64_t own_class = work.classes ? work.classes[rank] : 0;
      const int earlier = rank - first < 32 ? static_cast<int>(rank - first) : 32;
      for (int k = 0; k < earlier; ++k) {
        if (work.classes && work.classes[first + k] != own_class) continue;
        bits |= uint32_t(suppresses(work.ranked[first + k], box, work.threshold)) << k;
      }
    }
    work.overlaps[index] = bits;
  }
}

// Settles `chunk`, a thread per rank. A box stays once no earlier box that overlaps it can stay
// any more, and goes once one does stay; each round decides at least the first open box.
template <class T>
__device__ void settle_chunk(const NmsWork<T>& work, int64_t chunk, const int64_t* by_class,
                             bool* keep) {
  __shared__ uint32_t standing[kNmsChunkWords];  // neither removed nor outside
  __shared__ uint32_t staying[kNmsChunkWords];
  const int offset = threadIdx.x, warp = offset / 32;
  const int64_t rank = chunk * kNmsChunk + offset;
  bool open = rank < work.n && !work.removed[rank];
  uint32_t own[kNmsChunkWords];
  for (int w = 0; w < kNmsChunkWords; ++w) {
    own[w] = work.overlaps[nms_word_index(chunk, kNmsChunkWords + w, offset)];
    if (chunk == 0) continue;
    const uint32_t before = work.overlaps[nms_word_index(chunk, w, offset)];
    if (before & work.survivors[(chunk - 1) * kNmsChunkWords + w]) open = false;
  }
  bool stays = false;
  uint32_t stay_bits;
  while (true) {
    const uint32_t open_bits = __ballot_sync(kFullWarp, open);
    stay_bits = __ballot_sync(kFullWarp, stays);
    if (offset % 32 == 0) {
      standing[warp] = open_bits | stay_bits;
      staying[warp] = stay_bits;
    }
    // Every word stands before any thread reads it.
    if (!__syncthreads_or(open)) break;
    if (open) {
      uint32_t hit = 0, waits = 0;
      for (int w = 0; w < kNmsChunkWords; ++w) {
        hit |= own[w] & staying[w];
        waits |= own[w] & standing[w];
      }
      stays = !hit && !waits;
      open = !hit && waits;
    }
    __syncthreads();  // every thread has read the words before the next round writes them
  }
  if (offset % 32 == 0) work.survivors[chunk * kNmsChunkWords + warp] = stay_bits;
  if (rank < work.n) keep[by_class ? by_class[rank] : rank] = stays;
}

// The survivors of `chunk` suppress boxes of chunk + 2 and later; settle_chunk sees to the next.
template <class T>
__device__ void suppress_later(const NmsWork<T>& work, int64_t chunk, int64_t block,
                               int64_t blocks) {
  __shared__ Box<T> boxes[kNmsChunk];
  __shared__ int64_t classes[kNmsChunk];
  const int64_t begin = (chunk + 2) * kNmsChunk, last = (chunk + 1) * kNmsChunk - 1;
  // Ranks ascend by class: where the first differs from the chunk's last, so do all later ones.
  const int64_t first = begin + block * kLaterBoxes;
  if (first >= work.n || (work.classes && work.classes[first] != work.classes[last])) return;
  int count = 0, place = 0;  // of all survivors, and of those before this thread's
  const int offset = threadIdx.x;
  const uint32_t* bits = work.survivors + chunk * kNmsChunkWords;
  for (int w = 0; w < kNmsChunkWords; ++w) {
    if (w == offset / 32) place = count + __popc(bits[w] & ((1u << offset % 32) - 1));
    count += __popc(bits[w]);
  }
  if (bits[offset / 32] >> offset % 32 & 1) {
    boxes[place] = work.ranked[chunk * kNmsChunk + offset];
    classes[place] = work.classes ? work.classes[chunk * kNmsChunk + offset] : 0;
  }
  __syncthreads();  // the list is whole before it is read
  // Lanes of a warp: 8 boxes, 4 shares of the list.
  const int lane = offset % 32, box = lane % (32 / kShares), share = lane / (32 / kShares);
  const int64_t inside = offset / 32 * (32 / kShares) + box;
  for (int64_t start = first; start < work.n; start += blocks * kLaterBoxes) {
    const int64_t rank = start + inside;
    bool hit = false;
    if (rank < work.n && !work.removed[rank]) {
      const Box<T> own = work.ranked[rank];
      const int64_t own_class = work.classes ? work.classes[rank] : 0;
      for (int k = share; k < count && !hit; k += kShares) {
        hit = classes[k] == own_class && suppresses(boxes[k], own, work.threshold);
      }
    }
    const uint32_t hits = __ballot_sync(kFullWarp, hit);
    const uint32_t all = hits | hits >> 8 | hits >> 16 | hits >> 24;
    if (share == 0 && rank < work.n && (all >> box & 1)) work.removed[rank] = 1;
  }
}

template <class T>
__global__ void __launch_bounds__(kNmsChunk)
    settle_kernel(const NmsWork<T> work, int64_t chunk, const int64_t* __restrict__ by_class,
                  bool* __restrict__ keep) {
  if (blockIdx.x == 0) {
    settle_chunk(work, chunk, by_class, keep);
  } else {
    suppress_later(work, chunk - 1, blockIdx.x - 1, gridDim.x - 1);
  }
}

__global__ void pack_kernel(const bool* __restrict__ keep, const int64_t* __restrict__ places,
                            const int64_t* __restrict__ order, int64_t n, int64_t limit,
                            int64_t* __restrict__ kept, int64_t* __restrict__ count) {
  const int64_t all = n > 0 ? places[n - 1] : 0, total = all < limit ? all : limit;
  DETKIT_GRID_STRIDE(i, n > limit ? n : limit + 1) {
    if (i < n && keep[i] && places[i] <= limit) kept[places[i] - 1] = order[i];
    if (i >= total && i < limit) kept[i] = -1;
    if (i == 0) *count = total;
  }
}

}  // namespace

template <class T>
void nms_rank(const NmsWork<T>& work, const T* boxes, const int64_t* order, const int64_t* by_class,
              const int64_t* classes, cudaStream_t stream) {
  if (work.n == 0) return;
  rank_kernel<T>
      <<<blocks_for(work.n), kThreads, 0, stream>>>(work, boxes, order, by_class, classes);
}

template <class T>
void nms_settle(const NmsWork<T>& work, const int64_t* by_class, bool* keep, cudaStream_t stream) {
  const int64_t chunks = nms_chunks(work.n);
  if (chunks == 0) return;
  overlap_kernel<T><<<blocks_for(chunks * kNmsWords * kNmsChunk), kThreads, 0, stream>>>(work);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t later = chunk > 0 ? work.n - (chunk + 1) * kNmsChunk : 0;
    const unsigned others = later > 0 ? blocks_for(later, kLaterBoxes) : 0;
    settle_kernel<T><<<1 + others, kNmsChunk, 0, stream>>>(work, chunk, by_class, keep);
  }
}

void nms_pack(const bool* keep, const int64_t* places, const int64_t* order, int64_t n,
              int64_t limit, int64_t* kept, int64_t* count, cudaStream_t stream) {
  pack_kernel<<<blocks_for(n > limit ? n : limit + 1), kThreads, 0, stream>>>(
      keep, places, order, n, limit, kept, count);
}

#define DETKIT_INSTANTIATE(T)                                                         \
  template void nms_rank(const NmsWork<T>&, const T*, const int64_t*, const int64_t*, \
                         const int64_t*, cudaStream_t);                               \
  template void nms_settle(const NmsWork<T>&, const int64_t*, bool*, cudaStream_t);
DETKIT_INSTANTIATE(float)
DETKIT_INSTANTIATE(double)
#undef DETKIT_INSTANTIATE

}  // namespace detkit::cuda
