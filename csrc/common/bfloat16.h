// bfloat16 for kernels that know no torch; same bits as torch's. Plain shifts, so loops vectorise.
#pragma once

#include <cstdint>
#include <cstring>

namespace detkit {

struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct Compute {  // what a kernel computes T in
  using type = T;
};
template <>
struct Compute<BFloat16> {
  using type = float;
};
template <typename T>
using compute_t = typename Compute<T>::type;

inline float load(BFloat16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof(result));
  return result;
}
inline float load(float value) { return value; }
inline double load(double value) { return value; }

template <typename T, typename A>
inline T store(A value) {
  return static_cast<T>(value);
}

// Rounds to nearest, ties to even; NaN stays NaN.
template <>
inline BFloat16 store<BFloat16, float>(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof(wide));
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}

}  // namespace detkit
