// What the files that measure a set's limits share.
#pragma once

#include "kernel.hpp"
#include "unroll.hpp"

namespace qpass {

// how far ahead of a read its line is asked for
constexpr int64_t kReadAhead = 4096;

static inline const char* refuse_no_limits(const Limits&) { return nullptr; }

static inline size_t no_limits_scratch(const Limits&) { return 0; }

// threads leave something at the same place: what it is does not matter
static inline void leave(const Limits& c, uint32_t seen) {
  __atomic_fetch_xor(c.seen, seen, __ATOMIC_RELAXED);
}

}  // namespace qpass
