#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/box.h"
#include "common/radix_sort.h"
#include "cpu/kept_block.h"
#include "cpu/kept_index.h"
#include "cpu/nms_kernel.h"
#include "tests/check.h"

using detkit::Box;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
std::vector<int64_t> nms(const std::vector<T>& boxes, const std::vector<T>& scores,
                         double threshold, const std::vector<int64_t>& classes = {}) {
  const int64_t* class_data = classes.empty() ? nullptr : classes.data();
  return detkit::cpu::nms(boxes.data(), scores.data(), class_data, int64_t(scores.size()),
                          threshold);
}

// The definition: every pair, in order of score.
template <class T>
std::vector<int64_t> all_pairs(const std::vector<T>& boxes, const std::vector<T>& scores,
                               double threshold, const std::vector<int64_t>& classes) {
  std::vector<int64_t> order(scores.size()), keep;
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  const auto box = [&](int64_t i) {
    return Box<T>{boxes[4 * i], boxes[4 * i + 1], boxes[4 * i + 2], boxes[4 * i + 3]};
  };
  for (const int64_t i : order) {
    const bool survives = std::none_of(keep.begin(), keep.end(), [&](int64_t k) {
      const T inter = detkit::box_intersection(box(k), box(i));
      const T iou = inter / detkit::box_union(box_area(box(k)), box_area(box(i)), inter);
      return classes[k] == classes[i] && double(iou) > threshold;
    });
    if (survives) keep.push_back(i);
  }
  return keep;
}

template <class T>
void compare_with_all_pairs() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 60; ++trial) {
    const int n = trial * 5;
    std::vector<T> boxes, scores;
    std::vector<int64_t> classes;
    for (int i = 0; i < n; ++i) {
      const T x = T(random() % 40), y = T(random() % 40);  // integers: many IoUs exactly at t
      boxes.insert(boxes.end(), {x, y, x + T(random() % 16), y + T(random() % 16)});
      scores.push_back(T(random() % 20));
      classes.push_back(int64_t(random() % 3) - 1);
    }
    for (const double t : {0.0, 0.25, 0.5, 2.0 / 3, 1.0}) {
      CHECK(nms(boxes, scores, t, classes) == all_pairs(boxes, scores, t, classes));
      CHECK(nms(boxes, scores, t) == all_pairs(boxes, scores, t, std::vector<int64_t>(n, 7)));
    }
  }
}

// Boxes of one kind in several ways that an index by place and size could get wrong.
enum class Kind { kScattered, kIntegers, kPowers, kOneCentre, kFarOff, kSubnormal, kSpecial };

template <class T>
std::vector<T> boxes_of(Kind kind, int n, std::mt19937& random) {
  std::uniform_real_distribution<double> uniform;
  const double inf = std::numeric_limits<double>::infinity();
  std::vector<T> boxes;
  for (int i = 0; i < n; ++i) {
    double x = 1000 * uniform(random), y = 600 * uniform(random);
    double w = 8 * std::exp(4 * uniform(random)), h = 8 * std::exp(4 * uniform(random));
    if (kind == Kind::kIntegers) {  // many IoUs exactly at t
      x = random() % 300, y = random() % 300, w = 1 + random() % 40, h = 1 + random() % 40;
    }
    if (kind == Kind::kPowers) {  // sides of 8 that are a little more or less from where 0.3 is 0
      x = i == 0 ? 0.3 : 1 + random() % 200, y = i == 0 ? 0.3 : 1 + random() % 200;
      w = h = i == 0 ? 9 : 8;
    }
    if (kind == Kind::kOneCentre) x = -w / 2, y = -h / 2;
    if (kind == Kind::kFarOff) x += 1e7, y -= 1e7;  // float32 then holds whole numbers only
    std::vector<double> box{x, y, x + w, y + h};
    if (kind == Kind::kSubnormal) {  // products of sides are rounded to a few bits
      for (double& value : box) value *= std::sqrt(double(std::numeric_limits<T>::min())) / 100;
    }
    if (kind == Kind::kSpecial && i % 9 == 0) {
      const double values[] = {kNan, inf, -inf, 1e30, x + w, y};
      box[random() % 4] = values[random() % 6];
    }
    for (const double value : box) boxes.push_back(T(value));
  }
  return boxes;
}

template <class T>
void compare_many_with_all_pairs() {
  std::mt19937 random(2);
  const int n = 1500;
  for (const Kind kind : {Kind::kScattered, Kind::kIntegers, Kind::kPowers, Kind::kOneCentre,
                          Kind::kFarOff, Kind::kSubnormal, Kind::kSpecial}) {
    const std::vector<T> boxes = boxes_of<T>(kind, n, random);
    std::vector<T> scores;
    std::vector<int64_t> classes;
    for (int i = 0; i < n; ++i) scores.push_back(T(random() % 500));
    for (int i = 0; i < n; ++i) classes.push_back(random() % 8 == 0);
    const std::vector<int64_t> one_class(n, 0);
    for (const double t : {0.05, 0.2, 0.5, 0.7, 0.95, 1.0}) {
      const std::vector<int64_t> kept = all_pairs(boxes, scores, t, one_class);
      CHECK(nms(boxes, scores, t) == kept);
      CHECK(nms(boxes, scores, t, classes) == all_pairs(boxes, scores, t, classes));
      CHECK(t < 0.7 || kind == Kind::kOneCentre || kept.size() > 512);  // else no index is made
    }
  }
}

template <class T, int kBytes>
void compare_blocks() {
  std::mt19937 random(3);
  constexpr int n = detkit::cpu::KeptBlock<T>::kBoxes;
  for (int trial = 0; trial < 3000; ++trial) {
    std::vector<T> rows;
    for (int i = 0; i <= n; ++i) {
      const T x = T(random() % 60), y = T(random() % 60);
      rows.insert(rows.end(), {x, y, x + T(1 + random() % 30), y + T(1 + random() % 30)});
    }
    const detkit::cpu::Threshold<T> threshold(trial % 3 == 0 ? 0.0 : trial % 3 == 1 ? 0.25 : 0.5);
    const detkit::cpu::Candidate<T> candidate(rows.data() + 4 * n);
    detkit::cpu::KeptBlock<T> block;
    block.clear();
    bool expected = false;
    for (int k = 0; k < trial % (n + 1); ++k) {
      const detkit::cpu::Candidate<T> other(rows.data() + 4 * k);
      block.set(k, other.box, threshold.share(other.area));
      expected |= detkit::iou_exceeds(other.box, other.area, candidate.box, candidate.area,
                                      threshold.exact);
    }
    const detkit::cpu::Comparison<T, kBytes> comparison(candidate, threshold);
    CHECK(comparison.template is_suppressed_by<1>(&block) == expected);
  }
}

template <class Key>
void compare_sorts(Key least, Key most) {
  std::mt19937_64 random(4);
  for (const int n : {0, 1, 100, 5000}) {
    std::vector<detkit::Keyed<Key>> items;
    for (int i = 0; i < n; ++i) {
      const Key key = most - least == Key(-1) ? Key(random()) : Key(random() % (most - least + 1));
      items.push_back({Key(least + key), int32_t(i)});
    }
    auto expected = items;
    std::stable_sort(expected.begin(), expected.end(),
                     [](const auto& a, const auto& b) { return a.key < b.key; });
    detkit::sort_by_key(items);
    for (int i = 0; i < n; ++i) CHECK(items[i].index == expected[i].index);
  }
}

}  // namespace

TEST(many_equal_all_pairs_in_float32) { compare_many_with_all_pairs<float>(); }
TEST(many_equal_all_pairs_in_float64) { compare_many_with_all_pairs<double>(); }

TEST(blocks_compare_alike_on_every_vector_width) {
  compare_blocks<float, 16>();
  compare_blocks<float, 32>();
  compare_blocks<float, 64>();
  compare_blocks<double, 16>();
  compare_blocks<double, 32>();
  compare_blocks<double, 64>();
}

TEST(sorts_stably_by_any_keys) {
  compare_sorts<uint32_t>(0, UINT32_MAX);
  compare_sorts<uint32_t>(7, 7);
  compare_sorts<uint32_t>(UINT32_MAX - 3, UINT32_MAX);
  compare_sorts<uint64_t>(0, UINT64_MAX);
  compare_sorts<uint64_t>(uint64_t(1) << 63, (uint64_t(1) << 63) + 79);
}

TEST(an_index_leaves_out_what_rounding_would_blur) {
  detkit::cpu::BoxStatistics<float> boxes;
  const float rows[] = {0, 0, 100, 50, 0, 0, 0, 1e30F, 0, 0, float(kNan), 1};
  for (int i = 0; i < 3; ++i) boxes.add(detkit::cpu::Candidate<float>(rows + 4 * i));
  CHECK(boxes.extent() == 100 && boxes.least_area == 5000);  // neither the empty one nor the NaN
  CHECK(detkit::cpu::KeptIndex<float>::covers(boxes, 0.7));
  CHECK(!detkit::cpu::KeptIndex<float>::covers(boxes, 0.1));
  const float tiny[] = {0, 0, 1e-20F, 1e-20F};
  boxes.add(detkit::cpu::Candidate<float>(tiny));
  CHECK(!detkit::cpu::KeptIndex<float>::covers(boxes, 0.7));
}

TEST(below_zero_boxes_apart_exceed_the_threshold) {
  const std::vector<double> boxes{0, 0, 1, 1, 5, 5, 6, 6, kNan, 0, 1, 1};
  CHECK(nms(boxes, {3.0, 2.0, 1.0}, -0.5) == (std::vector<int64_t>{0, 2}));
  CHECK(nms(boxes, {3.0, 2.0, 1.0}, kNan) == (std::vector<int64_t>{0, 1, 2}));
}

TEST(equals_all_pairs_in_float32) { compare_with_all_pairs<float>(); }
TEST(equals_all_pairs_in_float64) { compare_with_all_pairs<double>(); }

TEST(no_boxes_keep_nothing) { CHECK(nms<float>({}, {}, 0.5).empty()); }

TEST(an_iou_at_the_threshold_survives) {
  // 50 of 150 pixels are shared.
  const std::vector<double> boxes{0, 0, 10, 10, 5, 0, 15, 10};
  CHECK(nms(boxes, {2.0, 1.0}, 1.0 / 3) == (std::vector<int64_t>{0, 1}));
  CHECK(nms(boxes, {2.0, 1.0}, 0.333) == (std::vector<int64_t>{0}));
}

TEST(a_nan_box_suppresses_nothing) {
  const std::vector<float> boxes{0, 0, 10, 10, 0, 0, float(kNan), 10, 0, 0, 10, 10};
  CHECK(nms(boxes, {1.F, 3.F, 2.F}, 0.5) == (std::vector<int64_t>{1, 2}));
}

TEST(keys_order_scores_as_torch_does) {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<float> ordered{float(kNan), inf, 2.F, 1.F, 1e-45F, 0.F, -1e-45F, -3.F, -inf};
  for (size_t i = 1; i < ordered.size(); ++i) {
    CHECK(detkit::descending_key(ordered[i - 1]) < detkit::descending_key(ordered[i]));
  }
  CHECK(detkit::descending_key(-0.F) == detkit::descending_key(0.F));
  CHECK(detkit::descending_key(-0.0) == detkit::descending_key(0.0));
  CHECK(detkit::descending_key(-float(kNan)) == detkit::descending_key(float(kNan)));
}

TEST(round_down_decides_as_the_double_does) {
  for (const double t : {0.1, 0.3, 0.5, 0.7, 1.0 / 3, 1.0}) {
    const float down = detkit::round_down<float>(t);
    CHECK(double(down) <= t);
    CHECK(double(std::nextafter(down, 2.F)) > t);
  }
}
