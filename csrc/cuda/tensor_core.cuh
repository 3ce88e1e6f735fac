// Copies into shared memory that do not pass registers, and products of 16-row and 8-column
// matrices of halves, 16 deep, or of floats as TF32, 8 deep, with float sums (sm_80 and later). The
// C++ tests have their own of each, which follow the PTX manual's tables.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(DETKIT_EMULATED_CUDA)
#include "tensor_core.h"
#else

namespace detkit::cuda {

// What older devices lack compiles to a trap there; the operators refuse before.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define DETKIT_AMPERE(...) __VA_ARGS__
#else
#define DETKIT_AMPERE(...) __trap()
#endif

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts to copy 16 bytes; writes zeros where `inside` is false, and `from` is then not read.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool inside) {
  DETKIT_AMPERE(
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                   "l"(from), "r"(inside ? 16 : 0) : "memory"));
}

// Closes a group of the copies this thread has started.
__device__ __forceinline__ void copies_commit() {
  DETKIT_AMPERE(asm volatile("cp.async.commit_group;" :: : "memory"));
}

// Waits until all of this thread's groups but the last N have arrived.
template <int N>
__device__ __forceinline__ void copies_wait() {
  DETKIT_AMPERE(asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"));
}

// To the nearest number of 10 bits of mantissa; the product would cut the other 13 off.
__device__ __forceinline__ uint32_t round_to_tf32(uint32_t bits) {
  uint32_t rounded = 0;
  DETKIT_AMPERE(asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(bits))));
  return rounded;
}

// Four matrices of 8 rows of 16 bytes, as operands; every lane gives the address of one row.
template <class T>
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const void* row) {
  DETKIT_AMPERE(
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]),
                   "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(row)) : "memory"));
  if constexpr (sizeof(T) == sizeof(float)) {
    for (uint32_t& bits : to) bits = round_to_tf32(bits);
  }
}

// sums (16x8) += a (16 rows) * b (8 columns)
template <class T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void multiply_add<float>(float (&sums)[4], const uint32_t (&a)[4],
                                                    const uint32_t (&b)[2]) {
  DETKIT_AMPERE(asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};" : "+f"(sums[0]),
      "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
      "r"(b[0]), "r"(b[1])));
}
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&sums)[4], const uint32_t (&a)[4],
                                                     const uint32_t (&b)[2]) {
  DETKIT_AMPERE(asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};" : "+f"(sums[0]),
      "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
      "r"(b[0]), "r"(b[1])));
}
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&sums)[4],
                                                            const uint32_t (&a)[4],
                                                            const uint32_t (&b)[2]) {
  DETKIT_AMPERE(asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};" : "+f"(sums[0]),
      "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
      "r"(b[0]), "r"(b[1])));
}

#undef DETKIT_AMPERE

}  // namespace detkit::cuda

#endif
