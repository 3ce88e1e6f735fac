// What cuda/tensor_core.cuh gives, on the CPU: the fragments' layouts as the PTX manual tables them
// (ldmatrix .m8n8.x4 .b16; mma .m16n8k16 with 16-bit floats), written down apart from the kernels'
// own functions, so that the two check each other.
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

inline void load_matrices(uint32_t (&to)[4], const void* row) {
  struct Row {
    uint32_t pairs[4];
  } mine;
  std::memcpy(&mine, row, sizeof(mine));
  const auto rows = emulated::Block::exchange(mine);
  const size_t lane = emulated::Block::lane();
  for (size_t matrix = 0; matrix < 4; ++matrix) {
    to[matrix] = rows[8 * matrix + lane / 4].pairs[lane % 4];
  }
}

template <class T>
float half_of(uint32_t pair, int which) {
  const uint16_t bits = static_cast<uint16_t>(pair >> (16 * which));
  T value;
  std::memcpy(&value, &bits, sizeof(bits));
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
    for (int k = 0; k < 16; ++k) {
      // a: registers 0 and 2 hold row `group`, 1 and 3 row `group + 8`; 2 and 3 hold k of 8 to 15
      const uint32_t pair_a = lanes[(row & 7) * 4 + (k & 7) / 2].a[(row >> 3) + 2 * (k >> 3)];
      const uint32_t pair_b = lanes[column * 4 + (k & 7) / 2].b[k >> 3];
      sums[i] += half_of<T>(pair_a, k & 1) * half_of<T>(pair_b, k & 1);
    }
  }
}

}  // namespace detkit::cuda
