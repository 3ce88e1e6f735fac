// Greedy suppression on raw pointers; no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace detkit::cpu {

// The survivors' indices, best score first.
// boxes: n rows of x1 y1 x2 y2. Equal scores keep their order, NaN scores come first.
// classes: n values, or nullptr where all boxes are of one class.
template <class T, class Score>
std::vector<int64_t> nms(const T* boxes, const Score* scores, const int64_t* classes, int64_t n,
                         double threshold);

}  // namespace detkit::cpu
