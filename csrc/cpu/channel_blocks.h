// A block of channels side by side, (H, W, lanes), in place of planes, (C, H, W): what a bin needs
// of one pixel is then one short run of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "common/macros.h"
#include "common/simd.h"
#include "cpu/huge_pages.h"

namespace detkit::cpu {

// Elements from one image, channel, row, column to the next.
struct MapStrides {
  int64_t image, channel, row, column;
};

// Uninitialised memory, aligned for Vector, and in huge pages where it is large: boxes read all
// over a map.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t size) {
    const size_t bytes = sizeof(A) * std::max<int64_t>(size, 1);
    const std::align_val_t align{bytes < 2 * kHugePage ? 64 : kHugePage};
    data_ = {static_cast<A*>(::operator new(bytes, align)), Free{align}};
    expect_huge(data_.get(), bytes);
  }
  A* get() const { return data_.get(); }

 private:
  struct Free {
    std::align_val_t align{64};
    void operator()(A* data) const { ::operator delete(data, align); }
  };
  std::unique_ptr<A, Free> data_;
};

// Vectors of 8 lanes, whatever A: the tile that transposes go by.
template <class A>
struct Octet {
  typedef A type __attribute__((vector_size(8 * sizeof(A))));
};

// Transposes 8 x 8 in registers: three rounds of interleaving row i with row i + 4.
template <class A>
inline __attribute__((always_inline)) void transpose_octets(typename Octet<A>::type (&rows)[8]) {
  typename Octet<A>::type next[8];
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < 4; ++i) {
      next[2 * i] = __builtin_shufflevector(rows[i], rows[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
      next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
    }
    for (int i = 0; i < 8; ++i) rows[i] = next[i];
  }
}

// One octet by way of A.
template <class A, class From>
inline __attribute__((always_inline)) void load_octet(const From* from,
                                                      typename Octet<A>::type& octet) {
  for (int k = 0; k < 8; ++k) octet[k] = static_cast<A>(from[k]);
}

template <class A, class To>
inline __attribute__((always_inline)) void store_octet(const typename Octet<A>::type& octet,
                                                       To* to) {
  for (int k = 0; k < 8; ++k) to[k] = static_cast<To>(octet[k]);
}

// From planes, (lanes, length), to lanes side by side, (length, B) with pixels `step` apart; those
// not in use become 0. B is a multiple of 8.
template <class T, class A, int B>
DETKIT_CLONES void to_lanes(const T* source, int64_t stride, int64_t lanes, int64_t length,
                            A* target, int64_t step = B) {
  int64_t x = 0;
  for (; x + 8 <= length; x += 8) {
    for (int64_t c = 0; c < B; c += 8) {
      typename Octet<A>::type rows[8] = {};
      for (int r = 0; r < 8; ++r) {
        if (c + r < lanes) load_octet<A>(source + (c + r) * stride + x, rows[r]);
      }
      transpose_octets<A>(rows);
      for (int r = 0; r < 8; ++r) store_octet<A>(rows[r], target + (x + r) * step + c);
    }
  }
  for (; x < length; ++x) {
    for (int64_t c = 0; c < B; ++c) {
      target[x * step + c] = c < lanes ? static_cast<A>(source[c * stride + x]) : A(0);
    }
  }
}

// And back, without the lanes that are not in use; what is behind them up to a multiple of 8 must
// be there to be read.
template <class T, class A>
DETKIT_CLONES void to_planes(const A* source, int64_t step, int64_t lanes, int64_t length,
                             T* target, int64_t stride) {
  int64_t x = 0;
  for (; x + 8 <= length; x += 8) {
    for (int64_t c = 0; c < lanes; c += 8) {
      typename Octet<A>::type rows[8];
      for (int r = 0; r < 8; ++r) load_octet<A>(source + (x + r) * step + c, rows[r]);
      transpose_octets<A>(rows);
      for (int r = 0; r < 8; ++r) {
        if (c + r < lanes) store_octet<A>(rows[r], target + (c + r) * stride + x);
      }
    }
  }
  for (; x < length; ++x) {
    for (int64_t c = 0; c < lanes; ++c) {
      target[c * stride + x] = static_cast<T>(source[x * step + c]);
    }
  }
}

// Lanes that lie side by side already, as in a channels_last map, from one pixel to the next.
template <class T, class A>
DETKIT_CLONES void copy_lanes(const T* source, int64_t stride, int64_t lanes, int64_t length,
                              A* target, int64_t target_stride) {
  for (int64_t x = 0; x < length; ++x) {
    for (int64_t c = 0; c < lanes; ++c) {
      target[x * target_stride + c] = static_cast<A>(source[x * stride + c]);
    }
  }
}

// Pixels behind each other, such as a map row, of a block of channels to (width, B); lanes not in
// use become 0.
template <class T, class A, int B>
void pack_row(const T* source, const MapStrides& strides, int64_t lanes, int64_t width, A* target) {
  if (strides.column == 1) {
    to_lanes<T, A, B>(source, strides.channel, lanes, width, target);
    return;
  }
  if (lanes < B) std::fill_n(target, width * B, A(0));
  if (strides.channel == 1) {
    copy_lanes<T, A>(source, strides.column, lanes, width, target, B);
    return;
  }
  for (int64_t x = 0; x < width; ++x) {
    const T* pixel = source + x * strides.column;
    for (int64_t c = 0; c < lanes; ++c) {
      target[x * B + c] = static_cast<A>(pixel[c * strides.channel]);
    }
  }
}

}  // namespace detkit::cpu
