// How the CUDA operator cuts n ranked boxes for greedy suppression, as plain functions.
//
// Chunks of kNmsChunk ranks are settled one after another. Which boxes of the own and of the
// previous chunk suppress a box is found for all boxes beforehand, as kNmsWords words of bits;
// which earlier survivors do, is found while later chunks are settled.
#pragma once

#include <cstdint>

#include "common/box.h"
#include "common/macros.h"

namespace detkit {

constexpr int kNmsChunk = 512;                  // ranks of a chunk
constexpr int kNmsChunkWords = kNmsChunk / 32;  // words with a bit per rank
constexpr int kNmsWords = 2 * kNmsChunkWords;   // of the previous chunk, then of the own

DETKIT_HD int64_t nms_chunks(int64_t n) { return (n + kNmsChunk - 1) / kNmsChunk; }

// The first rank that bit 0 of a rank's word stands for; negative where there is none.
DETKIT_HD int64_t nms_word_rank(int64_t chunk, int word) {
  return (chunk - 1) * kNmsChunk + 32 * int64_t(word);
}

// Where word `word` of the rank at `offset` in its chunk lies: neighbours in rank side by side.
DETKIT_HD int64_t nms_word_index(int64_t chunk, int word, int offset) {
  return (chunk * kNmsWords + word) * kNmsChunk + offset;
}

// As iou_exceeds, without a division for boxes that do not meet.
template <class T>
DETKIT_HD bool suppresses(const Box<T>& a, const Box<T>& b, T threshold) {
  const T inter = box_intersection(a, b);
  if (inter == T(0) && threshold >= T(0)) return false;
  return inter / box_union(box_area(a), box_area(b), inter) > threshold;
}

}  // namespace detkit
