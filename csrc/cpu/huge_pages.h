// Large pages for large memory. A fresh tensor of 50 MB is 12,000 page faults of 4 KiB, which cost
// as much as pooling a thousand boxes into it; of 2 MiB they are 25.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace detkit::cpu {

constexpr size_t kHugePage = size_t(1) << 21;

// Tells the kernel that [data, data + size) is to be filled; pages that exist already stay as they
// are, and where huge pages are switched off nothing happens.
inline void expect_huge([[maybe_unused]] void* data, [[maybe_unused]] size_t size) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + size) & ~(kHugePage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace detkit::cpu
