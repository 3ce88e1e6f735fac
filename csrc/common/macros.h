// Marks for functions that are shared by host and device, and for loops that are compiled once per
// instruction set.
#pragma once

#if defined(__CUDACC__)
#define DETKIT_HD __host__ __device__ __forceinline__
#else
#define DETKIT_HD inline
#endif

// Put DETKIT_CLONES on the function that holds the loop (not on a lambda): GCC compiles it for
// three levels and the loader picks one. Off where the resolver is missing (not glibc, not x86-64)
// or runs too early (sanitizers).
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__CUDACC__) && !defined(__SANITIZE_ADDRESS__) && !defined(DETKIT_SANITIZE)
#define DETKIT_HAS_CLONES 1
#define DETKIT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DETKIT_HAS_CLONES 0
#define DETKIT_CLONES
#endif

#define DETKIT_RESTRICT __restrict__

// For helpers that must be compiled with the instruction set of their caller.
#define DETKIT_INLINE inline __attribute__((always_inline))
