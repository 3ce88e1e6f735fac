#include "cpu/offset_gemm_kernel.h"

// Kernels for the two instruction sets are compiled whatever the compiler's flags say, and chosen
// when they are first asked for.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DETKIT_HAS_OFFSET_GEMM 1
#include <immintrin.h>
#else
#define DETKIT_HAS_OFFSET_GEMM 0
#endif

namespace detkit::cpu {

#if DETKIT_HAS_OFFSET_GEMM

#pragma GCC push_options
#pragma GCC target("avx512f")
namespace avx512 {

// 8 x 3 sums, 3 loads and a weight: 28 of 32 registers.
struct Isa {
  using Vec = __m512;
  using Mask = __mmask16;
  static constexpr int kLanes = 16, kRows = 8;
  static Vec zero() { return _mm512_setzero_ps(); }
  static Vec all(float value) { return _mm512_set1_ps(value); }
  static Vec load(const float* from) { return _mm512_loadu_ps(from); }
  static Vec load(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
  static void store(float* to, Vec value) { _mm512_storeu_ps(to, value); }
  static void store(float* to, Vec value, Mask mask) { _mm512_mask_storeu_ps(to, mask, value); }
  static Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static Vec times(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Mask first(int64_t count) { return static_cast<Mask>((1u << count) - 1); }
};

#include "cpu/offset_gemm_tile.h"

}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {

// 4 x 3 sums, 3 loads and a weight: all 16 registers.
struct Isa {
  using Vec = __m256;
  using Mask = __m256i;
  static constexpr int kLanes = 8, kRows = 4;
  static Vec zero() { return _mm256_setzero_ps(); }
  static Vec all(float value) { return _mm256_set1_ps(value); }
  static Vec load(const float* from) { return _mm256_loadu_ps(from); }
  static Vec load(const float* from, Mask mask) { return _mm256_maskload_ps(from, mask); }
  static void store(float* to, Vec value) { _mm256_storeu_ps(to, value); }
  static void store(float* to, Vec value, Mask mask) { _mm256_maskstore_ps(to, mask, value); }
  static Vec plus(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static Vec times(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Mask first(int64_t count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
  }
};

#include "cpu/offset_gemm_tile.h"

}  // namespace avx2
#pragma GCC pop_options

const OffsetGemm* offset_gemms() {
  static const bool wide = __builtin_cpu_supports("avx512f");
  static const bool narrow = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  static const OffsetGemm both[] = {
      {avx512::Isa::kRows, 3 * avx512::Isa::kLanes, 288, avx512::multiply, avx512::blend},
      {avx2::Isa::kRows, 3 * avx2::Isa::kLanes, 72, avx2::multiply, avx2::blend},
      {0, 0, 0, nullptr, nullptr}};
  return both + (wide ? 0 : narrow ? 1 : 2);
}

#else

const OffsetGemm* offset_gemms() {
  static const OffsetGemm none = {0, 0, 0, nullptr, nullptr};
  return &none;
}

#endif

}  // namespace detkit::cpu
