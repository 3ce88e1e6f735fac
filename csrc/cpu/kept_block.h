// Boxes that NMS has kept, in blocks that a few vector operations compare with a candidate.
//
// With areas a and b and an intersection i, the IoU i / (a + b - i) exceeds t only if i exceeds
// t / (1 + t) * (a + b). The vectors test the latter against a lower bound, so that no rounding
// hides a hit; what they find is settled by the definition.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/box.h"
#include "common/macros.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace detkit::cpu {

template <class T>
struct Candidate {
  Box<T> box;
  T area;

  DETKIT_INLINE explicit Candidate(const T* row)
      : box{row[0], row[1], row[2], row[3]}, area(box_area(box)) {}

  // Whether its IoU with some box may exceed a threshold of 0 or more; false for a box that is
  // empty, inverted or not finite, or whose area is 0 or infinite after rounding.
  DETKIT_INLINE bool has_extent() const {
    return box.x2 > box.x1 && box.y2 > box.y1 && area > 0 &&
           area < std::numeric_limits<T>::infinity();
  }
};

// One threshold in the forms that a comparison needs.
template <class T>
struct Threshold {
  T exact;       // round_down of the caller's
  T share_rate;  // t / (1 + t), less what rounding may add

  explicit Threshold(double t)
      : exact(round_down<T>(t)),
        share_rate(
            static_cast<T>(t / (1 + t) * (1 - 16 * double(std::numeric_limits<T>::epsilon())))) {}

  // The intersection must be at least the sum of both boxes' shares. Rounded down by more than a
  // product of tiny numbers can be rounded up.
  DETKIT_INLINE T share(T area) const {
    const T share = area * share_rate - 2 * std::numeric_limits<T>::denorm_min();
    return share > 0 ? share : T(0);
  }

  // The candidate's share is not 0, so that boxes apart never pass.
  DETKIT_INLINE T candidate_share(T area) const {
    constexpr T least = std::numeric_limits<T>::denorm_min();
    const T own = share(area);
    return own > least ? own : least;
  }
};

// As many boxes as fill a cache line with one coordinate.
template <class T>
struct alignas(64) KeptBlock {
  static constexpr int kBoxes = 64 / sizeof(T);
  T x1[kBoxes], y1[kBoxes], x2[kBoxes], y2[kBoxes], share[kBoxes];

  // Boxes that no candidate passes.
  DETKIT_INLINE void clear() {
    for (int k = 0; k < kBoxes; ++k) {
      x1[k] = y1[k] = x2[k] = y2[k] = 0;
      share[k] = std::numeric_limits<T>::infinity();
    }
  }

  DETKIT_INLINE void set(int k, const Box<T>& box, T box_share) {
    x1[k] = box.x1;
    y1[k] = box.y1;
    x2[k] = box.x2;
    y2[k] = box.y2;
    share[k] = box_share;
  }

  DETKIT_INLINE Box<T> box(int k) const { return {x1[k], y1[k], x2[k], y2[k]}; }
};

typedef int64_t Bits16 __attribute__((vector_size(16), may_alias));
typedef int64_t Bits32 __attribute__((vector_size(32), may_alias));
typedef int64_t Bits64 __attribute__((vector_size(64), may_alias));

// The bits that are set in every 16 bytes of a vector.
DETKIT_INLINE void fold(const Bits16& bits, Bits16& folded) { folded = bits; }
DETKIT_INLINE void fold(const Bits32& bits, Bits16& folded) {
  const Bits32 b = bits;
  folded = __builtin_shufflevector(b, b, 0, 1) & __builtin_shufflevector(b, b, 2, 3);
}
DETKIT_INLINE void fold(const Bits64& bits, Bits16& folded) {
  const Bits64 b = bits;
  const Bits32 half =
      __builtin_shufflevector(b, b, 0, 1, 2, 3) & __builtin_shufflevector(b, b, 4, 5, 6, 7);
  fold(half, folded);
}

// The lanes of 16 bytes whose sign is clear, as bits, the first lane lowest.
template <class T>
DETKIT_INLINE unsigned clear_signs(const Bits16& lanes) {
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 4) return _mm_movemask_ps(reinterpret_cast<__m128>(lanes)) ^ 15;
  if constexpr (sizeof(T) == 8) return _mm_movemask_pd(reinterpret_cast<__m128d>(lanes)) ^ 3;
#else
  T values[16 / sizeof(T)];
  std::memcpy(values, &lanes, 16);
  unsigned found = 0;
  for (unsigned k = 0; k < 16 / sizeof(T); ++k) found |= unsigned(!std::signbit(values[k])) << k;
  return found;
#endif
}

template <int kBytes>
struct BitsOf;
template <>
struct BitsOf<16> {
  typedef Bits16 type;
};
template <>
struct BitsOf<32> {
  typedef Bits32 type;
};
template <>
struct BitsOf<64> {
  typedef Bits64 type;
};

// A candidate with extent, spread over vectors of kBytes, against blocks.
template <class T, int kBytes>
class Comparison {
 public:
  DETKIT_INLINE Comparison(const Candidate<T>& candidate, const Threshold<T>& threshold)
      : candidate_(candidate),
        exact_(threshold.exact),
        x1_(Lanes{} + candidate.box.x1),
        y1_(Lanes{} + candidate.box.y1),
        x2_(Lanes{} + candidate.box.x2),
        y2_(Lanes{} + candidate.box.y2),
        share_(Lanes{} + threshold.candidate_share(candidate.area)) {}

  // Whether a box of these `count` adjacent blocks suppresses the candidate.
  template <int count>
  DETKIT_INLINE bool is_suppressed_by(const KeptBlock<T>* blocks) const {
    if (!any_passes<count>(blocks)) return false;
    for (int i = 0; i < count; ++i) {
      for (unsigned found = passing(blocks[i]); found != 0; found &= found - 1) {
        const Box<T> other = blocks[i].box(__builtin_ctz(found));
        if (iou_exceeds(other, box_area(other), candidate_.box, candidate_.area, exact_)) {
          return true;
        }
      }
    }
    return false;
  }

 private:
  typedef T Lanes __attribute__((vector_size(kBytes), may_alias));
  typedef typename BitsOf<kBytes>::type Bits;
  static constexpr int kParts = 64 / kBytes;

  // What the intersections have above the sum of shares; its sign is clear where a box passes. One
  // side is cut off at 0, which is enough for boxes apart to fall below.
  DETKIT_INLINE void excess(const KeptBlock<T>& block, int part, Lanes& result) const {
    const Lanes x1 = column(block.x1, part), y1 = column(block.y1, part);
    const Lanes x2 = column(block.x2, part), y2 = column(block.y2, part);
    const Lanes left = x1 > x1_ ? x1 : x1_;
    const Lanes top = y1 > y1_ ? y1 : y1_;
    const Lanes right = x2 < x2_ ? x2 : x2_;
    const Lanes bottom = y2 < y2_ ? y2 : y2_;
    Lanes width = right - left;
    width = width > 0 ? width : Lanes{};
    result = width * (bottom - top) - (column(block.share, part) + share_);
  }

  static DETKIT_INLINE const Lanes& column(const T* values, int part) {
    return reinterpret_cast<const Lanes*>(values)[part];
  }

  template <int count>
  DETKIT_INLINE bool any_passes(const KeptBlock<T>* blocks) const {
    Bits signs = ~Bits{};
    for (int i = 0; i < count * kParts; ++i) {
      Lanes lanes;
      excess(blocks[i / kParts], i % kParts, lanes);
      signs &= reinterpret_cast<Bits&>(lanes);
    }
    Bits16 folded;
    fold(signs, folded);
    return clear_signs<T>(folded) != 0;
  }

  // The block's boxes that pass, as bits.
  DETKIT_INLINE unsigned passing(const KeptBlock<T>& block) const {
    alignas(64) T values[KeptBlock<T>::kBoxes];
    for (int part = 0; part < kParts; ++part) {
      excess(block, part, reinterpret_cast<Lanes*>(values)[part]);
    }
    unsigned found = 0;
    constexpr int step = 16 / sizeof(T);
    for (int k = 0; k < KeptBlock<T>::kBoxes; k += step) {
      found |= clear_signs<T>(*reinterpret_cast<const Bits16*>(values + k)) << k;
    }
    return found;
  }

  const Candidate<T>& candidate_;
  T exact_;
  Lanes x1_, y1_, x2_, y2_, share_;
};

}  // namespace detkit::cpu
