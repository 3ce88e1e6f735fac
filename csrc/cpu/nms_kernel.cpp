// Boxes are visited best score first; each is compared with the boxes kept so far, and the first
// hit ends it. While few are kept they are a list, read from its beginning; a longer one becomes an
// index.
#include "cpu/nms_kernel.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "common/box.h"
#include "common/macros.h"
#include "common/radix_sort.h"
#include "cpu/kept_block.h"
#include "cpu/kept_index.h"
#include "cpu/kept_list.h"

namespace detkit::cpu {
namespace {

constexpr int64_t kListed = 512;  // as many tests of a list cost what an index does
constexpr int64_t kAhead = 8;     // rows fetched before their turn: their order is random

// Boxes of one class: `rows` are their indices, best score first; `survives` has a value for each.
template <class T>
struct Group {
  const T* boxes;
  const int32_t* rows;
  int64_t size;
  double threshold;
  char* survives;

  const T* box(int64_t i) const { return boxes + int64_t(4) * rows[i]; }
};

template <class T>
std::optional<KeptIndex<T>> index_of(const KeptList<T>& list, const Group<T>& group,
                                     const Threshold<T>& threshold) {
  if (group.threshold < KeptIndex<T>::kLeastThreshold) return std::nullopt;
  BoxStatistics<T> statistics;
  for (int64_t i = 0; i < group.size; ++i) statistics.add(Candidate<T>(group.box(i)));
  if (!KeptIndex<T>::covers(statistics, group.threshold)) return std::nullopt;
  KeptIndex<T> index(statistics, group.size, group.threshold);
  for (int64_t k = 0; k < list.size(); ++k) {
    index.push(list.box(k), threshold.share(box_area(list.box(k))));
  }
  return index;
}

template <class T, int kBytes>
DETKIT_INLINE void keep_greedily(const Group<T>& group, KeptList<T>& list) {
  const Threshold<T> threshold(group.threshold);
  std::optional<KeptIndex<T>> index;
  list.clear();
  for (int64_t i = 0; i < group.size; ++i) {
    if (i + kAhead < group.size) __builtin_prefetch(group.box(i + kAhead));
    const Candidate<T> candidate(group.box(i));
    group.survives[i] = 1;
    if (!candidate.has_extent()) continue;
    const Comparison<T, kBytes> comparison(candidate, threshold);
    if (index ? index->suppresses(candidate.box, comparison) : list.suppresses(comparison)) {
      group.survives[i] = 0;
      continue;
    }
    const T share = threshold.share(candidate.area);
    if (index) {
      index->push(candidate.box, share);
    } else {
      list.push(candidate.box, share);
      if (list.size() == kListed) index = index_of(list, group, threshold);
    }
  }
}

// Where even boxes apart exceed the threshold.
template <class T>
void keep_below_zero(const Group<T>& group) {
  std::vector<Candidate<T>> kept;
  for (int64_t i = 0; i < group.size; ++i) {
    const Candidate<T> candidate(group.box(i));
    group.survives[i] = std::none_of(kept.begin(), kept.end(), [&](const Candidate<T>& other) {
      return iou_exceeds(other.box, other.area, candidate.box, candidate.area,
                         round_down<T>(group.threshold));
    });
    if (group.survives[i]) kept.push_back(candidate);
  }
}

// One function per instruction set, each with vectors as wide as its registers.
template <class T>
void keep_by_16_bytes(const Group<T>& group, KeptList<T>& list) {
  keep_greedily<T, 16>(group, list);
}
#if DETKIT_HAS_CLONES
template <class T>
__attribute__((target("arch=x86-64-v3"))) void keep_by_32_bytes(const Group<T>& group,
                                                                KeptList<T>& list) {
  keep_greedily<T, 32>(group, list);
}
template <class T>
__attribute__((target("arch=x86-64-v4"))) void keep_by_64_bytes(const Group<T>& group,
                                                                KeptList<T>& list) {
  keep_greedily<T, 64>(group, list);
}
#endif

template <class T>
void keep(const Group<T>& group, KeptList<T>& list) {
  if (group.threshold < 0) return keep_below_zero(group);
#if DETKIT_HAS_CLONES
  static const auto widest = __builtin_cpu_supports("x86-64-v4")   ? keep_by_64_bytes<T>
                             : __builtin_cpu_supports("x86-64-v3") ? keep_by_32_bytes<T>
                                                                   : keep_by_16_bytes<T>;
  widest(group, list);
#else
  keep_by_16_bytes(group, list);
#endif
}

template <class Score>
std::vector<int32_t> order_by_score(const Score* scores, int64_t n) {
  std::vector<Keyed<decltype(descending_key(*scores))>> items(n);
  for (int64_t i = 0; i < n; ++i) items[i] = {descending_key(scores[i]), static_cast<int32_t>(i)};
  sort_by_key(items);
  std::vector<int32_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = items[i].index;
  return order;
}

// Ranks in `order`, those of a class side by side.
std::vector<Keyed<uint64_t>> ranks_by_class(const std::vector<int32_t>& order,
                                            const int64_t* classes) {
  std::vector<Keyed<uint64_t>> ranks(order.size());
  for (size_t r = 0; r < order.size(); ++r) {
    // the sign bit turned over, so that negative classes lie next to 0
    const uint64_t key = static_cast<uint64_t>(classes[order[r]]) ^ (uint64_t(1) << 63);
    ranks[r] = {key, static_cast<int32_t>(r)};
  }
  sort_by_key(ranks);
  return ranks;
}

// As `keep`, for each class by itself; `survives` has a value for each rank.
template <class T>
void keep_within_classes(const Group<T>& all, const std::vector<int32_t>& order,
                         const int64_t* classes, KeptList<T>& list) {
  const std::vector<Keyed<uint64_t>> ranks = ranks_by_class(order, classes);
  std::vector<int32_t> rows(order.size());
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = order[ranks[i].index];
  std::vector<char> survives(order.size());
  for (size_t first = 0, last = 0; first < ranks.size(); first = last) {
    while (last < ranks.size() && ranks[last].key == ranks[first].key) ++last;
    keep(Group<T>{all.boxes, rows.data() + first, int64_t(last - first), all.threshold,
                  survives.data() + first},
         list);
  }
  for (size_t i = 0; i < ranks.size(); ++i) all.survives[ranks[i].index] = survives[i];
}

}  // namespace

template <class T, class Score>
std::vector<int64_t> nms(const T* boxes, const Score* scores, const int64_t* classes, int64_t n,
                         double threshold) {
  if (n == 0) return {};
  const std::vector<int32_t> order = order_by_score(scores, n);
  std::vector<char> survives(n);  // by rank
  const Group<T> all{boxes, order.data(), n, threshold, survives.data()};
  KeptList<T> list;
  if (classes == nullptr) {
    keep(all, list);
  } else {
    keep_within_classes(all, order, classes, list);
  }
  std::vector<int64_t> kept(n);
  int64_t count = 0;
  for (int64_t rank = 0; rank < n; ++rank) {  // no branch: it would be a coin's toss
    kept[count] = order[rank];
    count += survives[rank];
  }
  kept.resize(count);
  return kept;
}

using Indices = std::vector<int64_t>;
template Indices nms(const float*, const float*, const int64_t*, int64_t, double);
template Indices nms(const float*, const double*, const int64_t*, int64_t, double);
template Indices nms(const double*, const float*, const int64_t*, int64_t, double);
template Indices nms(const double*, const double*, const int64_t*, int64_t, double);

}  // namespace detkit::cpu
