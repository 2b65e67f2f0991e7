// What the operating system says about large pieces of memory that are about to be written as a whole.
#pragma once

#include <stdint.h>

namespace dpo_fast {

// Logits larger than this are no longer in a cache when backward comes to them; memory of this size comes fresh from
// the system, since the C library keeps no piece so large for the next call.
constexpr int64_t kStreamBytes = int64_t{32} << 20;

// Before the first write to fresh memory, if it is large: its pages may come 2 MiB at a time (Linux).
void advise_huge_pages(char* x, int64_t bytes);

struct MemoryRange {
  char *start, *end;
};

// The part of these bytes, whose contents nobody needs, that reads as zeros because it has never been touched: empty if
// they are few, if any page is there already, or where the system cannot tell.
MemoryRange untouched(char* x, int64_t bytes);

}  // namespace dpo_fast
