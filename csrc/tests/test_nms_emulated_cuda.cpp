#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cpu/nms_kernel.h"
#include "cuda/nms_kernel.h"
#include "tests/check.h"

namespace {

template <class T>
std::vector<int64_t> cuda_nms(const std::vector<T>& boxes, const std::vector<T>& scores,
                              const int64_t* classes, double threshold) {
  const auto n = int64_t(scores.size());
  const int64_t words = (n + detkit::cuda::kNmsWord - 1) / detkit::cuda::kNmsWord;
  std::vector<int64_t> order(n), keep;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  std::vector<unsigned long long> mask(n * words, 0xA5A5A5A5A5A5A5A5), removed(words, ~0ULL);
  const std::unique_ptr<bool[]> survives(new bool[n]);
  detkit::cuda::nms<T>(boxes.data(), order.data(), classes, n, threshold, mask.data(),
                       removed.data(), survives.get(), nullptr);
  for (int64_t rank = 0; rank < n; ++rank) {
    if (survives[rank]) keep.push_back(order[rank]);
  }
  return keep;
}

template <class T>
void compare_with_cpu() {
  std::mt19937 random(1);
  for (const int n : {0, 1, 63, 64, 65, 130, 300}) {
    std::vector<T> boxes, scores;
    std::vector<int64_t> classes;
    for (int i = 0; i < n; ++i) {
      const T x = T(random() % 40), y = T(random() % 40);
      boxes.insert(boxes.end(), {x, y, x + T(random() % 16), y + T(random() % 16)});
      scores.push_back(T(random() % 50));
      classes.push_back(int64_t(random() % 3));
    }
    if (n > 60) boxes[4 * 7 + 1] = std::numeric_limits<T>::quiet_NaN();
    for (const double t : {0.0, 0.25, 0.5, 2.0 / 3, 1.0}) {
      for (const int64_t* class_data : {static_cast<int64_t*>(nullptr), classes.data()}) {
        std::vector<int64_t> expected(n);
        expected.resize(detkit::cpu::nms(boxes.data(), scores.data(), class_data, int64_t(n), t,
                                         expected.data()));
        CHECK(cuda_nms(boxes, scores, class_data, t) == expected);
      }
    }
  }
}

}  // namespace

TEST(cuda_keeps_what_the_cpu_keeps_in_float32) { compare_with_cpu<float>(); }
TEST(cuda_keeps_what_the_cpu_keeps_in_float64) { compare_with_cpu<double>(); }
