#include "fresh_memory.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace dpo_fast {
namespace {

// The whole huge pages in it.
[[maybe_unused]] MemoryRange huge_pages(char* x, int64_t bytes) {
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(x) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(x) + bytes) / kHugePage * kHugePage;
  return {reinterpret_cast<char*>(start), reinterpret_cast<char*>(std::max(start, end))};
}

#if defined(__linux__)

bool any_resident(MemoryRange range) {
  const int64_t page = sysconf(_SC_PAGESIZE);
  unsigned char resident[4096];
  for (char* x = range.start; x < range.end; x += sizeof resident * page) {
    const int64_t bytes = std::min<int64_t>(range.end - x, sizeof resident * page);
    if (mincore(x, bytes, resident) != 0) return true;
    for (int64_t i = 0; i < bytes / page; ++i)
      if (resident[i] & 1) return true;
  }
  return false;
}

#endif

}  // namespace

void advise_huge_pages([[maybe_unused]] char* x, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__)
  const MemoryRange range = huge_pages(x, bytes);
  if (bytes > kStreamBytes) madvise(range.start, range.end - range.start, MADV_HUGEPAGE);  // a wish: may fail
#endif
}

MemoryRange untouched([[maybe_unused]] char* x, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_FREE)
  const MemoryRange range = huge_pages(x, bytes);
  const int64_t size = range.end - range.start;
  if (bytes > kStreamBytes && size > 0 && !any_resident(range)) {
    // MADV_FREE is refused for any but private anonymous memory. Of that, MADV_DONTNEED drops what may be swapped out:
    // it reads as zeros from then on, surely.
    if (madvise(range.start, size, MADV_FREE) == 0 && madvise(range.start, size, MADV_DONTNEED) == 0) return range;
  }
#endif
  return {x, x};
}

}  // namespace dpo_fast
