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

// reads the lines of a part, or multiplies as many steps of bytes or of floats
template <uint32_t (*Read)(const uint8_t*, int64_t), uint32_t (*Bytes)(int64_t),
          uint32_t (*Floats)(int64_t)>
static inline void run_limits(const Limits& c, const Part& part, void*) {
  const int64_t count = part.row_end - part.row_begin;
  if (c.lines) {
    leave(c, Read(c.lines + part.row_begin * kLine, count));
    return;
  }
  leave(c, c.number == Number::int8 ? Bytes(count) : Floats(count));
}

}  // namespace qpass
