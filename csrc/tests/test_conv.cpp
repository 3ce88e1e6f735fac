// The tap table, the row routines of the CPU convolutions, and the element functions that the CUDA
// kernels consist of, all against plain loops.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "common/bfloat16.h"
#include "common/scaled_taps.h"
#include "common/tap_elements.h"
#include "cpu/offset_gemm_kernel.h"
#include "cpu/tap_conv_kernel.h"
#include "tests/check.h"

using detkit::scaled_tap;
using detkit::Tap;
using detkit::TapPlan;

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<double> random_values(int64_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::vector<double> values(size);
  for (double& v : values) v = normal(random);
  return values;
}

struct Geometry {
  int64_t height, width, stride_h, stride_w, kernel_h, kernel_w;
  double scale_h, scale_w;
};

// Odd and even sides, one row and one pixel, strides, and scales that are whole, zero, negative,
// and beyond the map.
const std::vector<Geometry> kGeometries = {
    {7, 9, 1, 1, 3, 3, 1.3, 2.6}, {6, 5, 2, 1, 3, 3, 1.0, 0.4},   {9, 8, 3, 2, 5, 3, 0.7, -1.25},
    {1, 8, 1, 1, 3, 5, 0.5, 2.0}, {1, 1, 1, 1, 3, 3, 0.25, 1.75}, {5, 40, 1, 2, 3, 3, 7.5, 38.5},
    {8, 9, 2, 3, 1, 1, 1.5, 1.5}, {6, 7, 1, 1, 3, 3, 0.0, -6.0},  {4, 4, 1, 1, 3, 3, 1e30, -1e18},
};

struct Taps {
  std::vector<Tap<double>> rows, cols;

  explicit Taps(const Geometry& g) {
    for (int64_t i = 0; i < g.kernel_h; ++i) {
      rows.push_back(scaled_tap<double>(i - g.kernel_h / 2, g.scale_h, g.height));
    }
    for (int64_t j = 0; j < g.kernel_w; ++j) {
      cols.push_back(scaled_tap<double>(j - g.kernel_w / 2, g.scale_w, g.width));
    }
  }
};

template <class T>
detkit::cpu::TapGrid<T> grid_of(const Geometry& g, const std::vector<Tap<T>>& rows,
                                const std::vector<Tap<T>>& cols) {
  return {g.height,
          g.width,
          detkit::centred_size(g.height, g.stride_h),
          detkit::centred_size(g.width, g.stride_w),
          g.stride_h,
          g.stride_w,
          g.kernel_h,
          g.kernel_w,
          rows.data(),
          cols.data()};
}

double pixel(const Geometry& g, const std::vector<double>& plane, double h, double w) {
  if (!(h >= 0 && h < double(g.height) && w >= 0 && w < double(g.width))) return 0;
  return plane[int64_t(h) * g.width + int64_t(w)];
}

// Bilinear value at a real position, by the definition: every corner outside counts 0.
double bilinear(const Geometry& g, const std::vector<double>& plane, double h, double w) {
  const double y = std::floor(h), x = std::floor(w), fy = h - y, fx = w - x;
  return (1 - fy) * ((1 - fx) * pixel(g, plane, y, x) + fx * pixel(g, plane, y, x + 1)) +
         fy * ((1 - fx) * pixel(g, plane, y + 1, x) + fx * pixel(g, plane, y + 1, x + 1));
}

TapPlan<double> plan_of(const Geometry& g, const double* scales) {
  TapPlan<double> plan{};
  plan.channels = plan.group_in = plan.groups = 1;
  plan.height = g.height;
  plan.width = g.width;
  plan.out_height = detkit::centred_size(g.height, g.stride_h);
  plan.out_width = detkit::centred_size(g.width, g.stride_w);
  plan.stride_h = g.stride_h;
  plan.stride_w = g.stride_w;
  plan.kernel_h = g.kernel_h;
  plan.kernel_w = g.kernel_w;
  plan.scales = scales;
  return plan;
}

std::vector<double> columns_of(const detkit::cpu::TapGrid<double>& grid,
                               const std::vector<double>& plane, int64_t first, int64_t last) {
  const int64_t size = last - first;
  std::vector<double> columns(grid.kernel_h * grid.kernel_w * size, -1e9);
  std::vector<double> line(detkit::cpu::border(grid).width(grid.width), -1e9);
  detkit::cpu::sample_plane(grid, plane.data(), first, last, columns.data(), size, line.data());
  return columns;
}

}  // namespace

TEST(tap_splits_the_distance) {
  const Tap<double> right = scaled_tap(2, 1.3, int64_t(100));
  CHECK(right.near == 2 && right.far == 3);
  CHECK_NEAR(right.near_weight, 0.4, 1e-12);
  CHECK_NEAR(right.far_weight, 0.6, 1e-12);
  CHECK(right.slope == 2);
  const Tap<double> left = scaled_tap(-2, 1.3, int64_t(100));  // mirrored, not floored
  CHECK(left.near == -2 && left.far == -3);
  CHECK(left.far_weight == right.far_weight && left.slope == 2);
  const Tap<double> whole = scaled_tap(-1, 2.0, int64_t(100));  // looks outwards at an integer
  CHECK(whole.near == -2 && whole.far == -3 && whole.near_weight == 1 && whole.far_weight == 0);
  const Tap<double> negative = scaled_tap(1, -0.25, int64_t(100));
  CHECK(negative.near == -1 && negative.far == 0);
  CHECK_NEAR(negative.far_weight, 0.75, 1e-12);
  const Tap<double> centre = scaled_tap(0, 7.7, int64_t(100));
  CHECK(centre.near == 0 && centre.near_weight == 1 && centre.slope == 0);
}

TEST(tap_of_a_huge_scale_stays_in_range_and_outside_the_map) {
  for (const float scale : {40.f, 1e9f, 3e38f, -41.f, -1e9f, -3e38f}) {
    for (const int64_t i : {-3, -1, 1, 3}) {
      const Tap<float> tap = scaled_tap(i, scale, int64_t(40));
      CHECK(std::abs(tap.near) <= 41 && std::abs(tap.far) <= 41);
      for (int64_t p = 0; p < 40; ++p) {
        CHECK(p + tap.near < 0 || p + tap.near >= 40);
        CHECK(p + tap.far < 0 || p + tap.far >= 40);
      }
    }
  }
}

TEST(tap_of_a_non_finite_scale_is_nan_at_every_tap) {
  for (const float scale : {kNan, kInf, -kInf}) {
    for (const int64_t i : {-1, 0, 1}) {
      const Tap<float> tap = scaled_tap(i, scale, int64_t(40));
      CHECK(std::isnan(tap.near_weight) && std::isnan(tap.far_weight));
      CHECK(std::isnan(blend(tap, 0.f, 0.f)));
      CHECK(std::abs(tap.near) <= 41);
    }
  }
}

TEST(blend_leaves_a_pixel_without_weight_alone) {
  CHECK(blend(scaled_tap(1, 2.f, int64_t(9)), 5.f, kNan) == 5.f);
  CHECK(std::isnan(blend(scaled_tap(1, 2.5f, int64_t(9)), 5.f, kNan)));
}

TEST(reading_output_inverts_the_offset) {
  for (const int64_t stride : {1, 2, 3}) {
    for (int64_t offset = -7; offset <= 7; ++offset) {
      for (int64_t r = 0; r < 12; ++r) {
        int64_t expected = -1;
        for (int64_t p = 0; p < 4; ++p) {
          if (p * stride + offset == r) expected = p;
        }
        CHECK(detkit::reading_output(r, offset, stride, 4) == expected);
      }
    }
  }
}

TEST(sampled_columns_are_bilinear) {
  for (const Geometry& g : kGeometries) {
    const Taps taps(g);
    const auto grid = grid_of(g, taps.rows, taps.cols);
    const auto plane = random_values(g.height * g.width, 1);
    const int64_t pixels = grid.out_height * grid.out_width;
    const auto columns = columns_of(grid, plane, 0, pixels);
    for (int64_t k = 0; k < g.kernel_h * g.kernel_w; ++k) {
      for (int64_t t = 0; t < pixels; ++t) {
        const double h = double(t / grid.out_width * g.stride_h) +
                         double(k / g.kernel_w - g.kernel_h / 2) * g.scale_h;
        const double w = double(t % grid.out_width * g.stride_w) +
                         double(k % g.kernel_w - g.kernel_w / 2) * g.scale_w;
        CHECK_NEAR(columns[k * pixels + t], bilinear(g, plane, h, w), 1e-12);
      }
    }
  }
}

TEST(a_part_of_the_outputs_is_that_part_of_the_columns) {
  for (const Geometry& g : kGeometries) {
    const Taps taps(g);
    const auto grid = grid_of(g, taps.rows, taps.cols);
    const auto plane = random_values(g.height * g.width, 2);
    const int64_t pixels = grid.out_height * grid.out_width;
    const auto whole = columns_of(grid, plane, 0, pixels);
    for (int64_t first = 0; first < pixels; first += 3) {
      const int64_t last = std::min(first + 5, pixels);
      const auto part = columns_of(grid, plane, first, last);
      for (int64_t k = 0; k < g.kernel_h * g.kernel_w; ++k) {
        for (int64_t t = first; t < last; ++t) {
          CHECK(part[k * (last - first) + t - first] == whole[k * pixels + t]);
        }
      }
    }
  }
}

// <columns(x), g> = <x, adjoint(g)>, in parts and as a whole, and the scale gradients against
// differences of the scale: columns are linear in it between whole distances.
TEST(gather_is_the_adjoint_and_gives_the_scale_gradients) {
  for (const Geometry& g : kGeometries) {
    const Taps taps(g);
    const auto grid = grid_of(g, taps.rows, taps.cols);
    const auto plane = random_values(g.height * g.width, 3);
    const int64_t pixels = grid.out_height * grid.out_width, kernel = g.kernel_h * g.kernel_w;
    const auto weights = random_values(kernel * pixels, 4);
    std::vector<double> lines(2 * detkit::cpu::border(grid).width(g.width), -1e9);
    std::vector<double> adjoint(plane.size(), 0.0);
    detkit::cpu::ScaleGrad slope;
    for (int64_t first = 0; first < pixels; first += 7) {
      const int64_t last = std::min(first + 7, pixels);
      const auto part = detkit::cpu::gather_plane(grid, weights.data() + first, pixels, first, last,
                                                  plane.data(), adjoint.data(), lines.data());
      slope.h += part.h;
      slope.w += part.w;
    }
    const auto product = [&](const Geometry& at) {
      const Taps moved(at);
      const auto columns = columns_of(grid_of(at, moved.rows, moved.cols), plane, 0, pixels);
      double sum = 0;
      for (size_t i = 0; i < columns.size(); ++i) sum += columns[i] * weights[i];
      return sum;
    };
    double dot = 0;
    for (size_t i = 0; i < plane.size(); ++i) dot += plane[i] * adjoint[i];
    CHECK_NEAR(dot, product(g), 1e-10);
    if (std::abs(g.scale_h) > 1e9) continue;
    constexpr double kStep = 1.0 / 1024;  // to the right, so that whole scales have a derivative
    Geometry higher = g, wider = g;
    higher.scale_h += kStep;
    wider.scale_w += kStep;
    CHECK_NEAR(slope.h, (product(higher) - product(g)) / kStep, 1e-8);
    CHECK_NEAR(slope.w, (product(wider) - product(g)) / kStep, 1e-8);
  }
}

TEST(cuda_elements_equal_the_cpu_rows) {
  for (const Geometry& g : kGeometries) {
    const Taps taps(g);
    const auto grid = grid_of(g, taps.rows, taps.cols);
    const auto plane = random_values(g.height * g.width, 5);
    const int64_t pixels = grid.out_height * grid.out_width, kernel = g.kernel_h * g.kernel_w;
    const double scales[2] = {g.scale_h, g.scale_w};
    const TapPlan<double> plan = plan_of(g, scales);
    const auto columns = columns_of(grid, plane, 0, pixels);
    const auto weights = random_values(kernel * pixels, 6);  // one channel: (output, tap)
    std::vector<double> by_tap(kernel * pixels), adjoint(plane.size(), 0.0);
    double slope_h = 0, slope_w = 0;
    for (int64_t t = 0; t < pixels; ++t) {
      for (int64_t k = 0; k < kernel; ++k) {
        const auto row = plan.row(0, k / g.kernel_w), col = plan.col(0, k % g.kernel_w);
        detkit::Corners<double> corners[1];
        detkit::load_corners<double, 1>(plan, plane.data(), row, col, t / grid.out_width,
                                        t % grid.out_width, false, corners);
        CHECK_NEAR(sampled(row, col, corners[0]), columns[k * pixels + t], 1e-12);
        detkit::load_corners<double, 1>(plan, plane.data(), row, col, t / grid.out_width,
                                        t % grid.out_width, true, corners);
        const auto terms = scale_terms(row, col, corners[0], weights[t * kernel + k]);
        slope_h += terms.h;
        slope_w += terms.w;
        by_tap[k * pixels + t] = weights[t * kernel + k];
      }
    }
    std::vector<double> lines(2 * detkit::cpu::border(grid).width(g.width));
    const auto slope = detkit::cpu::gather_plane(grid, by_tap.data(), pixels, 0, pixels,
                                                 plane.data(), adjoint.data(), lines.data());
    CHECK_NEAR(slope_h, slope.h, 1e-10);
    CHECK_NEAR(slope_w, slope.w, 1e-10);
    for (int64_t r = 0; r < g.height; ++r) {
      for (int64_t t = 0; t < g.width; ++t) {
        double sum[1] = {0};
        for (int64_t first = 0; first < pixels; first += 5) {  // chunk by chunk
          detkit::gather_input<double, 1>(plan, 0, r, t, first, std::min(first + 5, pixels),
                                          weights.data() + first * kernel, kernel, 1, sum);
        }
        CHECK_NEAR(sum[0], adjoint[r * g.width + t], 1e-10);
      }
    }
  }
}

TEST(whole_taps_of_a_plan_are_those_of_a_padded_dilation) {
  TapPlan<float> plan = {};
  plan.whole = {3, 2, 4, 1};
  for (int64_t i = 0; i < 3; ++i) {
    CHECK(plan.row(5, i).near == 3 * i - 4 && plan.row(5, i).far_weight == 0);
    CHECK(plan.col(5, i).near == 2 * i - 1 && plan.col(5, i).near_weight == 1);
  }
}

TEST(small_products_equal_loops) {
  const int64_t M = 3, N = 37, K = 5;
  const auto a = random_values(M * K, 7), b = random_values(K * (N + 2), 8),
             bias = random_values(M, 9);
  std::vector<double> out(M * N, -1), transposed(M * N, -1), line(N);
  detkit::cpu::small_gemm(M, N, K, a.data(), b.data(), N + 2, bias.data(), out.data(), N,
                          int64_t(1), line.data());
  detkit::cpu::small_gemm<double>(M, N, K, a.data(), b.data(), N + 2, nullptr, transposed.data(), 1,
                                  M, line.data());
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += a[m * K + k] * b[k * (N + 2) + n];
      CHECK_NEAR(out[m * N + n], sum + bias[m], 1e-12);
      CHECK_NEAR(transposed[n * M + m], sum, 1e-12);
    }
  }
  const int64_t long_k = 5000;  // more than a block
  const auto x = random_values(2 * long_k, 10), y = random_values(3 * long_k, 11);
  std::vector<double> dots(6, 1.0);
  detkit::cpu::small_gemm_transposed(int64_t(2), int64_t(3), long_k, x.data(), y.data(), long_k,
                                     dots.data());
  for (int64_t m = 0; m < 2; ++m) {
    for (int64_t n = 0; n < 3; ++n) {
      double sum = 1;
      for (int64_t k = 0; k < long_k; ++k) sum += x[m * long_k + k] * y[n * long_k + k];
      CHECK_NEAR(dots[m * 3 + n], sum, 1e-10);
    }
  }
}

// Every number of rows and columns that a kernel treats apart, whole products and sums that go on;
// operands end with their memory, so that a sanitizer sees reads beyond.
TEST(offset_products_equal_loops) {
  for (const detkit::cpu::OffsetGemm* gemm = detkit::cpu::offset_gemms(); gemm->cols > 0; ++gemm) {
    for (int64_t M = 1; M <= 19; ++M) {
      for (const int64_t N : {int64_t(1), int64_t(8), int64_t(15), int64_t(16), int64_t(23),
                              int64_t(37), gemm->cols, gemm->cols + 5}) {
        for (const int64_t K : {0, 1, 6}) {
          const auto a_values = random_values(M * 7, 1), b_values = random_values(20 + N, 2),
                     bias_values = random_values(M, 3), old_values = random_values(M * (N + 3), 4);
          const std::vector<float> a(a_values.begin(), a_values.end()),
              b(b_values.begin(), b_values.end()), bias(bias_values.begin(), bias_values.end()),
              old(old_values.begin(), old_values.end());
          const std::vector<int64_t> a_at = {6, 0, 3, 1, 5, 2}, b_at = {0, 20, 7, 7, 19, 1};
          for (const int start : {0, 1, 2}) {  // nothing, the bias, or what is there
            std::vector<float> out = old;
            gemm->multiply({M, N, K, a.data(), 7, a_at.data(), b.data(), b_at.data(), out.data(),
                            N + 3, start == 1 ? bias.data() : nullptr, start == 2});
            for (int64_t m = 0; m < M; ++m) {
              for (int64_t n = 0; n < N + 3; ++n) {
                const float before = old[m * (N + 3) + n];
                double sum = start == 0 ? 0 : start == 1 ? bias[m] : before;
                for (int64_t k = 0; k < K && n < N; ++k) {
                  sum += double(a[m * 7 + a_at[k]]) * b[b_at[k] + n];
                }
                CHECK_NEAR(out[m * (N + 3) + n], n < N ? sum : before, 1e-5);
              }
            }
          }
        }
      }
    }
  }
}

TEST(blends_equal_loops) {
  for (const detkit::cpu::OffsetGemm* gemm = detkit::cpu::offset_gemms(); gemm->cols > 0; ++gemm) {
    for (int64_t size = 1; size < 40; ++size) {
      const auto a_values = random_values(size, 1), b_values = random_values(size, 2);
      const std::vector<float> a(a_values.begin(), a_values.end()),
          b(b_values.begin(), b_values.end());
      std::vector<float> both(size + 1, 7.0f), one(size + 1, 7.0f);
      gemm->blend(a.data(), 0.25f, b.data(), 0.75f, size, both.data());
      gemm->blend(a.data(), 0.25f, nullptr, 0, size, one.data());
      for (int64_t t = 0; t < size; ++t) {
        CHECK_NEAR(both[t], 0.25 * a[t] + 0.75 * b[t], 1e-6);
        CHECK(one[t] == 0.25f * a[t]);
      }
      CHECK(both[size] == 7.0f && one[size] == 7.0f);
    }
  }
}

TEST(bfloat16_rounds_to_nearest_even) {
  using detkit::BFloat16;
  const auto round_trip = [](float v) { return load(detkit::store<BFloat16>(v)); };
  CHECK(round_trip(1.f) == 1.f && round_trip(-2.5f) == -2.5f && round_trip(0.f) == 0.f);
  CHECK(round_trip(1.f + 1.f / 256) == 1.f);             // a tie, down to even
  CHECK(round_trip(1.f + 3.f / 256) == 1.f + 1.f / 64);  // a tie, up to even
  CHECK(round_trip(1.f + 1.1f / 256) == 1.f + 1.f / 128);
  CHECK(round_trip(kInf) == kInf && round_trip(3.4e38f) == kInf);
  CHECK(std::isnan(round_trip(kNan)) && std::isnan(round_trip(-kNan)));
}
