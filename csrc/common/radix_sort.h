// Stable radix sort by unsigned keys.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
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

template <class Key>
struct Keyed {
  Key key;
  int32_t index;
};

// Sorts by ascending key; equal keys stay in their order. Only the bits in which the keys lie apart
// cost passes: classes, for one, take a single counting sort. Keys are lowered by the least one.
template <class Key>
void sort_by_key(std::vector<Keyed<Key>>& items) {
  if (items.empty()) return;
  Key least = items[0].key, most = least;
  for (const auto& item : items) {
    least = std::min(least, item.key);
    most = std::max(most, item.key);
  }
  const int bits = std::bit_width(static_cast<Key>(most - least));
  if (bits == 0) return;
  const int most_bits = items.size() < 4096 ? 9 : 11;  // counters are cleared and summed too
  const int passes = (bits + most_bits - 1) / most_bits;
  const int digit = (bits + passes - 1) / passes;
  const Key mask = (Key(1) << digit) - 1;
  std::vector<uint32_t> counts(static_cast<size_t>(passes) << digit);
  for (auto& item : items) {
    Key rest = item.key -= least;
    for (uint32_t* count = counts.data(); count != counts.data() + counts.size();
         count += mask + 1, rest >>= digit) {
      ++count[rest & mask];
    }
  }
  std::vector<Keyed<Key>> sorted(items.size());
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t* count = counts.data() + (static_cast<size_t>(pass) << digit);
    uint32_t start = 0;
    for (Key value = 0; value <= mask; ++value) start += std::exchange(count[value], start);
    for (const auto& item : items) sorted[count[item.key >> (pass * digit) & mask]++] = item;
    items.swap(sorted);
  }
}

}  // namespace detkit
