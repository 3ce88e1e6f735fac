// The kept boxes of one class in the order in which they were kept, for as long as they are few.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/kept_block.h"

namespace detkit::cpu {

template <class T>
class KeptList {
 public:
  void clear() { count_ = 0; }
  int64_t size() const { return count_; }
  Box<T> box(int64_t i) const { return blocks_[i / kBoxes].box(i % kBoxes); }

  DETKIT_INLINE void push(const Box<T>& box, T share) {
    if (count_ % (kStep * kBoxes) == 0) open_blocks();
    blocks_[count_ / kBoxes].set(count_ % kBoxes, box, share);
    ++count_;
  }

  template <int kBytes>
  DETKIT_INLINE bool suppresses(const Comparison<T, kBytes>& candidate) const {
    const KeptBlock<T>* end = blocks_.data() + (count_ + kBoxes - 1) / kBoxes;
    for (const KeptBlock<T>* block = blocks_.data(); block < end; block += kStep) {
      if (candidate.template is_suppressed_by<kStep>(block)) return true;
    }
    return false;
  }

 private:
  static constexpr int kBoxes = KeptBlock<T>::kBoxes;
  static constexpr int kStep = 2;  // blocks a test: the test ends in a branch, the boxes are cheap

  void open_blocks() {
    const size_t first = count_ / kBoxes;
    if (blocks_.size() < first + kStep) blocks_.resize(first + kStep);
    for (int i = 0; i < kStep; ++i) blocks_[first + i].clear();
  }

  std::vector<KeptBlock<T>> blocks_;  // a multiple of kStep
  int64_t count_ = 0;
};

}  // namespace detkit::cpu
