// What cuda/tensor_core.cuh gives, on the CPU: the fragments' layouts as the PTX manual tables them
// (ldmatrix .m8n8.x4 .b16; mma .m16n8k16 with 16-bit floats and .m16n8k8 with TF32), written down
// apart from the kernels' own functions, so that the two check each other.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace detkit::cuda {

// A copy lands at once or only when it is waited for, by chance: both may happen.
inline void copy_async(void* to, const void* from, bool inside) {
  const auto copy = [=] {
    if (inside) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  };
  if (emulated::next_random() % 2) {
    copy();
  } else {
    emulated::Block::copies().open.push_back(copy);
  }
}

inline void copies_commit() {
  auto& copies = emulated::Block::copies();
  copies.groups.push_back(std::exchange(copies.open, {}));
}

template <int N>
void copies_wait() {
  auto& groups = emulated::Block::copies().groups;
  while (groups.size() > N) {
    for (const auto& copy : groups.front()) copy();
    groups.erase(groups.begin());
  }
}

// cvt.rna.tf32.f32: to nearest, ties away from zero.
inline uint32_t round_to_tf32(uint32_t bits) {
  const bool finite = (bits >> 23 & 0xff) != 0xff;
  return (finite ? bits + 0x1000 : bits) & ~0x1fffu;
}

template <class T>
void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Row {
    uint32_t pairs[4];
  } mine;
  std::memcpy(&mine, row, sizeof(mine));
  const auto rows = emulated::Block::exchange(mine);
  const size_t lane = emulated::Block::lane();
  for (size_t matrix = 0; matrix < 4; ++matrix) {
    to[matrix] = rows[8 * matrix + lane / 4].pairs[lane % 4];
    if constexpr (sizeof(T) == sizeof(float)) to[matrix] = round_to_tf32(to[matrix]);
  }
}

// Number `which` of a register: one of two halves, or the float, of which the product reads all
// but the last 13 bits.
template <class T>
float number_of(uint32_t held, int which) {
  T value;
  if constexpr (sizeof(T) == sizeof(float)) {
    held &= ~0x1fffu;
    std::memcpy(&value, &held, sizeof(held));
  } else {
    const uint16_t bits = static_cast<uint16_t>(held >> (16 * which));
    std::memcpy(&value, &bits, sizeof(bits));
  }
  return static_cast<float>(value);
}

template <class T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  } mine;
  std::memcpy(mine.a, a, sizeof(mine.a));
  std::memcpy(mine.b, b, sizeof(mine.b));
  const auto lanes = emulated::Block::exchange(mine);
  const int group = int(emulated::Block::lane()) >> 2, in_group = int(emulated::Block::lane()) & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = i < 2 ? group : group + 8, column = in_group * 2 + (i & 1);
    constexpr int held = sizeof(uint32_t) / sizeof(T), half = 4 * held;  // of a register, of k
    for (int k = 0; k < 2 * half; ++k) {
      // a: registers 0 and 2 hold row `group`, 1 and 3 row `group + 8`; 2 and 3 the deeper half
      const int holder = k % half / held, deeper = k / half, which = k % held;
      const uint32_t of_a = lanes[(row & 7) * 4 + holder].a[(row >> 3) + 2 * deeper];
      const uint32_t of_b = lanes[column * 4 + holder].b[deeper];
      sums[i] += number_of<T>(of_a, which) * number_of<T>(of_b, which);
    }
  }
}

}  // namespace detkit::cuda
