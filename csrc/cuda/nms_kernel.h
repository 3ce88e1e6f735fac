// Greedy suppression on raw device pointers; no torch. All is enqueued on the stream, nothing waits
// for the device; the caller checks cudaGetLastError.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/nms_chunks.h"

namespace detkit::cuda {

// n boxes in the order they are settled, and memory for it. Ranks ascend by class, then descend by
// score; without classes they descend by score.
template <class T>
struct NmsWork {
  int64_t n;
  T threshold;          // round_down<T>(iou_threshold)
  Box<T>* ranked;       // (n)
  int64_t* classes;     // (n) by rank, or null for one class
  uint32_t* overlaps;   // (nms_chunks(n) * kNmsWords * kNmsChunk)
  uint32_t* survivors;  // (nms_chunks(n) * kNmsChunkWords), a bit per rank
  uint8_t* removed;     // (n)
};

// Fills `ranked` and `classes`, clears `removed`. boxes: n rows of x1 y1 x2 y2; order: place by
// score -> row; by_class: rank -> place by score, null for one class.
template <class T>
void nms_rank(const NmsWork<T>& work, const T* boxes, const int64_t* order, const int64_t* by_class,
              const int64_t* classes, cudaStream_t stream);

// Sets keep[place by score] for every box.
template <class T>
void nms_settle(const NmsWork<T>& work, const int64_t* by_class, bool* keep, cudaStream_t stream);

// kept (limit) = the rows of the first `limit` survivors, then -1; count = how many those are.
// places: (n) the number of survivors up to and including each place by score.
void nms_pack(const bool* keep, const int64_t* places, const int64_t* order, int64_t n,
              int64_t limit, int64_t* kept, int64_t* count, cudaStream_t stream);

}  // namespace detkit::cuda
