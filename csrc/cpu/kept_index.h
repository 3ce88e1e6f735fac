// The kept boxes of one class by place and size, so that a candidate meets only those that are near
// and of like size.
//
// If the IoU of two boxes exceeds t, so do the IoUs of their extents in x and in y. Their widths
// then differ by a factor below 1/t, and their centres in x by less than (1 - t) / (2 t) of the
// smaller width; the same holds in y. A level holds the boxes whose side begins with the same power
// of two; each pair of levels has a grid of cells in proportion. Heights are spread on insertion
// (a box enters the grids of all levels of height that a candidate might have), widths are
// searched by the candidate: half of the work on either side.
//
// The places are float32 in units of the extent of all boxes, with slack for what that rounds; a
// side below 2^kLowest is taken for one of that size. A cell's hash is its bucket: another cell in
// the same bucket costs a comparison and nothing else.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/kept_block.h"

namespace detkit::cpu {

// What all boxes of a class have in common; those without extent do not count.
template <class T>
struct BoxStatistics {
  static constexpr T kMost = std::numeric_limits<T>::max();
  T x1 = kMost, y1 = kMost, x2 = -kMost, y2 = -kMost;
  T least_width = kMost, most_width = 0, least_height = kMost, most_height = 0, least_area = kMost;

  void add(const Candidate<T>& c) {
    if (!c.has_extent()) return;
    const T width = c.box.x2 - c.box.x1, height = c.box.y2 - c.box.y1;
    x1 = std::min(x1, c.box.x1);
    y1 = std::min(y1, c.box.y1);
    x2 = std::max(x2, c.box.x2);
    y2 = std::max(y2, c.box.y2);
    least_width = std::min(least_width, width);
    most_width = std::max(most_width, width);
    least_height = std::min(least_height, height);
    most_height = std::max(most_height, height);
    least_area = std::min(least_area, c.area);
  }

  T extent() const { return std::max(x2 - x1, y2 - y1); }
};

template <class T>
class KeptIndex {
 public:
  static constexpr double kLeastThreshold = 0.2;  // below, cells and levels grow too large to help

  // Whether rounding leaves the geometry above intact: areas that are normal numbers by a margin,
  // and an extent that can be scaled to 1.
  static bool covers(const BoxStatistics<T>& boxes, double threshold) {
    const T margin = std::ldexp(T(1), 30);
    return threshold >= kLeastThreshold && boxes.extent() < BoxStatistics<T>::kMost / margin &&
           boxes.extent() > std::numeric_limits<T>::min() * margin &&
           boxes.least_area > std::numeric_limits<T>::min() * margin;
  }

  KeptIndex(const BoxStatistics<T>& boxes, int64_t candidates, double threshold)
      : origin_x_(boxes.x1),
        origin_y_(boxes.y1),
        scale_(std::ldexp(T(1), -std::ilogb(boxes.extent()) - 1)) {
    const double t = std::min(threshold, 1.0);
    constexpr double margin = 1 + 1e-5;
    smallest_ratio_ = static_cast<float>(t / margin);
    largest_ratio_ = static_cast<float>(margin / t);
    reach_ = static_cast<float>(margin * (1 - t) / (2 * t));
    // In powers of two of the side. Less costs more cells, more costs more boxes.
    const double cell = std::max(8.0 * reach_, 0.125);
    for (int level = 0; level < kLevels; ++level) {
      longest_[level] = std::ldexp(1.F, level + kLowest + 1);
      cells_[level] = static_cast<float>(std::ldexp(1 / cell, -(level + kLowest)));
    }
    width_levels_ = occurring(boxes.least_width, boxes.most_width);
    height_levels_ = occurring(boxes.least_height, boxes.most_height);
    const int bits = std::clamp<int>(std::bit_width(static_cast<uint64_t>(candidates) / 4), 8, 17);
    shift_ = 32 - bits;
    newest_.resize(size_t(1) << bits, 0);
  }

  void push(const Box<T>& box, T share) {
    const Place place = place_of(box);
    const int level_x = level_of(place.width);
    const auto heights = levels_near(place.height, height_levels_);
    for (int level_y = heights.first; level_y <= heights.last; ++level_y) {
      const int x = cell_of(place.x, level_x), y = cell_of(place.y, level_y);
      add(newest_[bucket(level_x, level_y, x, y)], box, share);
    }
  }

  template <int kBytes>
  DETKIT_INLINE bool suppresses(const Box<T>& box, const Comparison<T, kBytes>& candidate) const {
    const Place place = place_of(box);
    const int level_y = level_of(place.height);
    const Range rows = cells_near(place.y, place.height, level_y);
    const Range widths = levels_near(place.width, width_levels_);
    const int own_level = level_of(place.width), own_row = cell_of(place.y, level_y);
    for (int i = 0; i < widths.count(); ++i) {
      const int level_x = widths.turn(own_level, i);
      const float smaller = std::min(place.width, longest_[level_x]);
      const Range columns = cells_near(place.x, smaller, level_x);
      const int own_column = cell_of(place.x, level_x);
      for (int j = 0; j < rows.count(); ++j) {
        for (int k = 0; k < columns.count(); ++k) {
          const uint32_t cell =
              bucket(level_x, level_y, columns.turn(own_column, k), rows.turn(own_row, j));
          if (suppresses_in(newest_[cell], candidate)) return true;
        }
      }
    }
    return false;
  }

 private:
  static constexpr int kLowest = -16, kLevels = 18;  // powers of two, up to a side of 1
  static constexpr float kSlack = 0x1p-21F;          // over all roundings of a place or side
  static constexpr uint32_t kChunk = 64;             // blocks allocated at a time

  struct Place {
    float x, y, width, height;  // centre and sides
  };
  struct Range {
    int first, last;

    DETKIT_INLINE int count() const { return last - first + 1; }
    // Number i of the values from `start` on and round: a hit is likeliest at a candidate's own.
    DETKIT_INLINE int turn(int start, int i) const {
      return start + i <= last ? start + i : start + i - count();
    }
  };

  DETKIT_INLINE float scaled(T length) const { return static_cast<float>(length * scale_); }

  DETKIT_INLINE Place place_of(const Box<T>& box) const {
    const float x1 = scaled(box.x1 - origin_x_), x2 = scaled(box.x2 - origin_x_);
    const float y1 = scaled(box.y1 - origin_y_), y2 = scaled(box.y2 - origin_y_);
    return {(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1};
  }

  static DETKIT_INLINE int level_of(float side) {
    const int exponent = int(std::bit_cast<uint32_t>(std::max(side, 0.F)) >> 23) - 127;
    return std::max(exponent, kLowest) - kLowest;
  }

  // The levels of all sides; those of a Place are rounded otherwise than these.
  Range occurring(T least, T most) const {
    return {level_of(scaled(least) - kSlack), level_of(scaled(most) + kSlack)};
  }

  // The levels of sides that a box with this one may match, of those that occur.
  DETKIT_INLINE Range levels_near(float side, const Range& occurring) const {
    return {std::max(level_of((side - kSlack) * smallest_ratio_ - kSlack), occurring.first),
            std::min(level_of((side + kSlack) * largest_ratio_ + kSlack), occurring.last)};
  }

  DETKIT_INLINE int cell_of(float place, int level) const { return int(place * cells_[level]); }

  // The cells of centres that may match one at `place`, where the smaller side is at most this.
  DETKIT_INLINE Range cells_near(float place, float side, int level) const {
    const float distance = (side + kSlack) * reach_ + kSlack;
    return {cell_of(place - distance, level), cell_of(place + distance, level)};
  }

  DETKIT_INLINE uint32_t bucket(int level_x, int level_y, int x, int y) const {
    const uint32_t levels = level_x * kLevels + level_y;
    return (uint32_t(x) * 0x9E3779B1U + uint32_t(y) * 0x85EBCA77U + levels * 0xC2B2AE3DU) >> shift_;
  }

  DETKIT_INLINE KeptBlock<T>& block(uint32_t i) const { return chunks_[i / kChunk][i % kChunk]; }

  void add(uint32_t& newest, const Box<T>& box, T share) {
    if (newest == 0 || links_[newest].count == KeptBlock<T>::kBoxes) {
      const auto opened = static_cast<uint32_t>(links_.size());
      if (opened / kChunk == chunks_.size()) {
        chunks_.emplace_back(new KeptBlock<T>[kChunk]);
      }
      block(opened).clear();
      links_.push_back({newest, 0});
      newest = opened;
    }
    block(newest).set(links_[newest].count++, box, share);
  }

  template <int kBytes>
  DETKIT_INLINE bool suppresses_in(uint32_t i, const Comparison<T, kBytes>& candidate) const {
    for (; i != 0; i = links_[i].next) {
      if (candidate.template is_suppressed_by<1>(&block(i))) return true;
    }
    return false;
  }

  struct Link {
    uint32_t next, count;  // the bucket's block before this one, 0 where there is none; its boxes
  };

  T origin_x_, origin_y_, scale_;
  float smallest_ratio_, largest_ratio_, reach_;
  float longest_[kLevels], cells_[kLevels];  // of each level: bound of its sides, cells per unit
  Range width_levels_, height_levels_;
  int shift_;
  std::vector<uint32_t> newest_;            // of each bucket: its newest block, 0 where it is empty
  std::vector<Link> links_ = {Link{0, 0}};  // of each block; number 0 is none
  std::vector<std::unique_ptr<KeptBlock<T>[]>> chunks_;
};

}  // namespace detkit::cpu
