// Boxes and their IoU on host and device, each step rounded once, so that both give the same bits.
#pragma once

#include <cmath>
#include <limits>

#include "common/macros.h"
#include "common/rounded.h"

namespace detkit {

template <class T>
struct Box {
  T x1, y1, x2, y2;
};

// A NaN coordinate makes the area NaN, and with it every IoU: all comparisons below are then false.
template <class T>
DETKIT_HD T box_area(const Box<T>& b) {
  return rounded_mul(b.x2 - b.x1, b.y2 - b.y1);
}

template <class T>
DETKIT_HD T box_intersection(const Box<T>& a, const Box<T>& b) {
  const T left = a.x1 < b.x1 ? b.x1 : a.x1;
  const T top = a.y1 < b.y1 ? b.y1 : a.y1;
  const T right = b.x2 < a.x2 ? b.x2 : a.x2;
  const T bottom = b.y2 < a.y2 ? b.y2 : a.y2;
  const T width = right - left;
  const T height = bottom - top;
  return rounded_mul(width > 0 ? width : T(0), height > 0 ? height : T(0));
}

template <class T>
DETKIT_HD T box_union(T area_a, T area_b, T intersection) {
  return rounded_add(rounded_add(area_a, area_b), -intersection);
}

// Whether the IoU exceeds the threshold. `threshold` is round_down<T>(t), which decides as t itself
// does: no T lies between the two.
template <class T>
DETKIT_HD bool iou_exceeds(const Box<T>& a, T area_a, const Box<T>& b, T area_b, T threshold) {
  const T inter = box_intersection(a, b);
  return inter / box_union(area_a, area_b, inter) > threshold;
}

// The largest T that is not above `value`.
template <class T>
T round_down(double value) {
  const T nearest = static_cast<T>(value);
  if (static_cast<double>(nearest) <= value) return nearest;
  return std::nextafter(nearest, -std::numeric_limits<T>::infinity());
}

}  // namespace detkit
