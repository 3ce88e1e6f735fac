#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/box.h"
#include "common/radix_sort.h"
#include "cpu/nms_kernel.h"
#include "tests/check.h"

using detkit::Box;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

template <class T>
std::vector<int64_t> nms(const std::vector<T>& boxes, const std::vector<T>& scores,
                         double threshold, const std::vector<int64_t>& classes = {}) {
  std::vector<int64_t> keep(scores.size());
  const int64_t* class_data = classes.empty() ? nullptr : classes.data();
  keep.resize(detkit::cpu::nms(boxes.data(), scores.data(), class_data, int64_t(scores.size()),
                               threshold, keep.data()));
  return keep;
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

}  // namespace

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
