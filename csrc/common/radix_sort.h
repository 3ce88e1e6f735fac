// Stable radix sort of indices by unsigned keys; digits that are equal in all keys cost nothing but
// the count.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace detkit {

// A key that ascends where the score descends: NaN first, -0 equal to 0, as torch sorts.
template <class Score>
auto descending_key(Score score) {
  using Key = std::conditional_t<sizeof(Score) == 4, uint32_t, uint64_t>;
  constexpr Key sign = Key(1) << (8 * sizeof(Key) - 1);
  if (score != score) return Key(0);
  score += Score(0);  // -0 becomes 0
  Key bits;
  std::memcpy(&bits, &score, sizeof(bits));
  return static_cast<Key>(bits & sign ? bits : ~(bits | sign));
}

// Reorders `index` so that keys[index[i]] ascends; equal keys stay in their order.
template <class Key>
void sort_by_key(const std::vector<Key>& keys, std::vector<int32_t>& index) {
  constexpr int kDigits = sizeof(Key);
  std::vector<std::array<uint32_t, 256>> counts(kDigits, std::array<uint32_t, 256>{});
  for (const int32_t i : index) {
    for (int digit = 0; digit < kDigits; ++digit) ++counts[digit][keys[i] >> (8 * digit) & 255];
  }
  std::vector<int32_t> sorted(index.size());
  for (int digit = 0; digit < kDigits && !index.empty(); ++digit) {
    auto& count = counts[digit];
    if (count[keys[index[0]] >> (8 * digit) & 255] == index.size()) continue;
    uint32_t start = 0;
    for (uint32_t& c : count) start += std::exchange(c, start);
    for (const int32_t i : index) sorted[count[keys[i] >> (8 * digit) & 255]++] = i;
    index.swap(sorted);
  }
}

}  // namespace detkit
