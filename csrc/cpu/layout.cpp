#include "cpu/layout.h"

#include <algorithm>
#include <cstdint>

#include "conv_shapes.h"
#include "cpu/channel_blocks.h"

namespace detkit::cpu {
namespace {

using torch::headeronly::MemoryFormat;

// Channels and pixels transposed at once: whole lines of a cache on both sides, and all of them in
// the nearest. Maps of other channels go by the smaller number.
constexpr int kLanes = 64, kFewLanes = 16;
constexpr int64_t kPixels = 64;
constexpr int64_t kTasks = 8;  // of so many pixels that a thread should do at least

// Whether every image of the map is planes behind each other.
bool has_planes(const Tensor& map) {
  return map.stride(3) == 1 && map.stride(2) == map.size(3) &&
         map.stride(1) == map.size(2) * map.size(3);
}

// Types that are moved as they are, by their size.
bool is_moved(const Tensor& map) {
  return map.scalar_type() == ScalarType::Float || map.scalar_type() == ScalarType::BFloat16;
}

// body(image, first pixel, pixels) over all pixels.
template <class F>
void for_pixels(const Tensor& map, const F& body) {
  const int64_t pixels = map.size(2) * map.size(3);
  const int64_t tasks = (pixels + kPixels - 1) / kPixels;
  torch::stable::parallel_for(0, map.size(0) * tasks, kTasks, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tasks * kPixels;
      body(task / tasks, first, std::min(kPixels, pixels - first));
    }
  });
}

template <class E>
void move_side_by_side(const Tensor& map, const Tensor& to) {
  const auto* source = static_cast<const E*>(map.data_ptr());
  auto* target = static_cast<E*>(to.data_ptr());
  const int64_t channels = map.size(1), pixels = map.size(2) * map.size(3);
  for_pixels(map, [&](int64_t n, int64_t first, int64_t count) {
    const E* from = source + n * map.stride(0) + first;
    E* into = target + (n * pixels + first) * channels;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) {
      to_lanes<E, E, kLanes>(from + c * pixels, pixels, kLanes, count, into + c, channels);
    }
    for (; c < channels; c += kFewLanes) {
      to_lanes<E, E, kFewLanes>(from + c * pixels, pixels, kFewLanes, count, into + c, channels);
    }
  });
}

template <class E>
void move_to_planes(const Tensor& map, const Tensor& to) {
  const auto* source = static_cast<const E*>(map.data_ptr());
  auto* target = static_cast<E*>(to.data_ptr());
  const int64_t channels = map.size(1), pixels = map.size(2) * map.size(3);
  for_pixels(map, [&](int64_t n, int64_t first, int64_t count) {
    const E* from = source + (n * pixels + first) * channels;
    E* into = target + n * to.stride(0) + first;
    for (int64_t c = 0; c < channels; c += kLanes) {
      to_planes<E, E>(from + c, channels, std::min<int64_t>(kLanes, channels - c), count,
                      into + c * pixels, pixels);
    }
  });
}

}  // namespace

Tensor side_by_side(const Tensor& map) {
  if (!is_moved(map) || !has_planes(map) || map.size(1) % kFewLanes != 0) {
    return torch::stable::contiguous(map, MemoryFormat::ChannelsLast);
  }
  const Tensor to = torch::stable::empty(map.sizes(), map.scalar_type(), std::nullopt, map.device(),
                                         std::nullopt, MemoryFormat::ChannelsLast);
  expect_huge(to.data_ptr(), to.numel() * to.element_size());
  if (map.scalar_type() == ScalarType::Float) {
    move_side_by_side<float>(map, to);
  } else {
    move_side_by_side<uint16_t>(map, to);
  }
  return to;
}

Tensor in_planes(const Tensor& map) {
  if (!is_channels_last(map)) return torch::stable::contiguous(map);
  const Tensor to = torch::stable::new_empty(map, map.sizes());
  expect_huge(to.data_ptr(), to.numel() * to.element_size());
  copy_to_planes(map, to);
  return to;
}

void copy_to_planes(const Tensor& map, Tensor to) {
  if (!is_moved(map) || !is_channels_last(map) || !has_planes(to) || map.size(1) % 8 != 0) {
    torch::stable::copy_(to, map);
  } else if (map.scalar_type() == ScalarType::Float) {
    move_to_planes<float>(map, to);
  } else {
    move_to_planes<uint16_t>(map, to);
  }
}

}  // namespace detkit::cpu
