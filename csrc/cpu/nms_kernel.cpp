// Boxes are visited best score first; each is compared with the boxes kept so far, a block at a
// time, and the first hit ends it. That reads the kept boxes only, in order, where the classical
// mask reads all pairs.
#include "cpu/nms_kernel.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/box.h"
#include "common/macros.h"
#include "common/radix_sort.h"

namespace detkit::cpu {
namespace {

constexpr int64_t kBlock = 32;

// The kept boxes, one array per coordinate, filled up to a whole block with boxes that no test
// hits.
template <class T>
struct Kept {
  std::vector<T> x1, y1, x2, y2, area;
  int64_t count = 0;

  explicit Kept(int64_t capacity) {
    const auto size = static_cast<size_t>((capacity + kBlock - 1) / kBlock * kBlock);
    for (auto* column : {&x1, &y1, &x2, &y2}) column->resize(size, T(0));
    area.resize(size, std::numeric_limits<T>::quiet_NaN());
  }

  void clear() {
    std::fill_n(area.begin(), count, std::numeric_limits<T>::quiet_NaN());
    count = 0;
  }

  void push(const Box<T>& box, T box_area) {
    x1[count] = box.x1;
    y1[count] = box.y1;
    x2[count] = box.x2;
    y2[count] = box.y2;
    area[count++] = box_area;
  }
};

// What a comparison with the kept boxes needs besides them.
template <class T>
struct Threshold {
  T exact;  // round_down of the caller's threshold
  T loose;  // a little below: a product beside it decides all but the close calls, which then
            // divide

  explicit Threshold(double t)
      : exact(round_down<T>(t)),
        loose(static_cast<T>(t * (1 - 8 * double(std::numeric_limits<T>::epsilon())))) {}
};

// The first block from `block` on with a box that may suppress `box`; the end where there is none.
#define DETKIT_FIRST_CLOSE_BLOCK(T)                                                              \
  DETKIT_CLONES int64_t first_close_block(const Kept<T>& kept, int64_t block, const Box<T>& box, \
                                          T box_area, T loose) {                                 \
    for (; block < kept.count; block += kBlock) {                                                \
      const T* DETKIT_RESTRICT x1 = kept.x1.data() + block;                                      \
      const T* DETKIT_RESTRICT y1 = kept.y1.data() + block;                                      \
      const T* DETKIT_RESTRICT x2 = kept.x2.data() + block;                                      \
      const T* DETKIT_RESTRICT y2 = kept.y2.data() + block;                                      \
      const T* DETKIT_RESTRICT area = kept.area.data() + block;                                  \
      int hits = 0;                                                                              \
      for (int64_t k = 0; k < kBlock; ++k) {                                                     \
        const T inter = box_intersection(Box<T>{x1[k], y1[k], x2[k], y2[k]}, box);               \
        hits |= (inter > 0) & (inter >= loose * box_union(area[k], box_area, inter));            \
      }                                                                                          \
      if (hits) break;                                                                           \
    }                                                                                            \
    return block;                                                                                \
  }
DETKIT_FIRST_CLOSE_BLOCK(float)
DETKIT_FIRST_CLOSE_BLOCK(double)
#undef DETKIT_FIRST_CLOSE_BLOCK

template <class T>
bool is_suppressed(const Kept<T>& kept, const Box<T>& box, T area, const Threshold<T>& threshold) {
  int64_t block = first_close_block(kept, 0, box, area, threshold.loose);
  while (block < kept.count) {
    for (int64_t k = block; k < std::min(block + kBlock, kept.count); ++k) {
      const Box<T> other{kept.x1[k], kept.y1[k], kept.x2[k], kept.y2[k]};
      if (iou_exceeds(other, kept.area[k], box, area, threshold.exact)) return true;
    }
    block = first_close_block(kept, block + kBlock, box, area, threshold.loose);
  }
  return false;
}

// Ranks of the boxes by class and, within a class, by rank; [0, n) already is by score.
std::vector<int32_t> ranks_by_class(const std::vector<int32_t>& order, const int64_t* classes) {
  std::vector<int32_t> ranks(order.size());
  std::iota(ranks.begin(), ranks.end(), 0);
  if (classes == nullptr) return ranks;
  std::vector<uint64_t> keys(order.size());
  for (size_t r = 0; r < order.size(); ++r) keys[r] = static_cast<uint64_t>(classes[order[r]]);
  sort_by_key(keys, ranks);
  return ranks;
}

template <class Score>
std::vector<int32_t> order_by_score(const Score* scores, int64_t n) {
  std::vector<decltype(descending_key(*scores))> keys(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = descending_key(scores[i]);
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  sort_by_key(keys, order);
  return order;
}

}  // namespace

template <class T, class Score>
int64_t nms(const T* boxes, const Score* scores, const int64_t* classes, int64_t n,
            double threshold, int64_t* keep) {
  const std::vector<int32_t> order = order_by_score(scores, n);
  const std::vector<int32_t> ranks = ranks_by_class(order, classes);
  const Threshold<T> limit(threshold);
  Kept<T> kept(n);
  std::vector<char> survives(n, 0);  // by rank
  for (int64_t i = 0; i < n; ++i) {
    const int32_t rank = ranks[i];
    const int32_t index = order[rank];
    if (classes != nullptr && i > 0 && classes[index] != classes[order[ranks[i - 1]]]) kept.clear();
    const T* row = boxes + int64_t(4) * index;
    const Box<T> box{row[0], row[1], row[2], row[3]};
    const T area = box_area(box);
    if (is_suppressed(kept, box, area, limit)) continue;
    survives[rank] = 1;
    kept.push(box, area);
  }
  int64_t count = 0;
  for (int64_t rank = 0; rank < n; ++rank) {
    if (survives[rank]) keep[count++] = order[rank];
  }
  return count;
}

template int64_t nms(const float*, const float*, const int64_t*, int64_t, double, int64_t*);
template int64_t nms(const float*, const double*, const int64_t*, int64_t, double, int64_t*);
template int64_t nms(const double*, const float*, const int64_t*, int64_t, double, int64_t*);
template int64_t nms(const double*, const double*, const int64_t*, int64_t, double, int64_t*);

}  // namespace detkit::cpu
