// Greedy suppression on raw device pointers; no torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace detkit::cuda {

constexpr int kNmsWord = 64;  // boxes per word of the mask

// Sets keep[rank] for the survivors among n boxes given by rank (best first).
// boxes: n rows of x1 y1 x2 y2; order: rank -> row; classes: by row, or nullptr for one class.
// mask: scratch of n * words, removed: scratch of words, where words = ceil(n / 64).
// Enqueued on the stream; the caller checks cudaGetLastError.
template <class T>
void nms(const T* boxes, const int64_t* order, const int64_t* classes, int64_t n, double threshold,
         unsigned long long* mask, unsigned long long* removed, bool* keep, cudaStream_t stream);

}  // namespace detkit::cuda
