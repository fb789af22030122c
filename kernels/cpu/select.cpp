// Which instruction sets this machine has.
#include "select.hpp"

#include <atomic>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace qpass {
namespace {

#if defined(__x86_64__)

// what the operating system saves for us: XCR0, read without compiler flags
uint64_t enabled_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives a process the tile registers only when it asks
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa detect() {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
  const bool saves_state = c >> 27 & 1, fma = c >> 12 & 1, f16c = c >> 29 & 1;
  if (!saves_state || !fma || !f16c) return Isa::portable;
  uint32_t b7, c7, d7;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return Isa::portable;
  const uint64_t state = enabled_state();
  const bool avx2 = b7 >> 5 & 1;
  if (!avx2 || (state & 0x6) != 0x6) return Isa::portable;
  // foundation, doubleword and quadword, byte and word, vector length, and the dot products
  const bool avx512 = b7 >> 16 & b7 >> 17 & b7 >> 30 & b7 >> 31 & c7 >> 11 & 1;
  if (!avx512 || (state & 0xe6) != 0xe6) return Isa::avx2;
  const bool tiles = d7 >> 24 & d7 >> 25 & d7 >> 22 & 1;
  if (!tiles || (state & 0x60000) != 0x60000 || !tiles_granted()) return Isa::avx512vnni;
  return Isa::amx;
}

#else

Isa detect() { return Isa::portable; }

#endif

std::atomic<int> g_cap{static_cast<int>(Isa::amx)};
// a thread's own limit, which goes before the one for all; below 0 where it has none
thread_local int t_limit = -1;

}  // namespace

Isa newest() {
  static const Isa found = detect();
  return found;
}

Isa capped_at() {
  const int own = t_limit;
  return static_cast<Isa>(own >= 0 ? own : g_cap.load(std::memory_order_relaxed));
}

bool usable(Isa isa, Isa cap) {
  // emulated tiles stand on the vector instructions that real ones come with
  if (isa == Isa::amx_emulated) return cap == isa && newest() >= Isa::avx512vnni;
  return isa <= newest() && isa <= cap;
}

Isa cap(Isa isa) { return static_cast<Isa>(g_cap.exchange(static_cast<int>(isa))); }

int limit_thread(int isa) {
  const int before = t_limit;
  t_limit = isa;
  return before;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable:
      return "portable";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512vnni:
      return "avx512vnni";
    case Isa::amx:
      return "amx";
    default:
      return "amx_emulated";
  }
}

}  // namespace qpass
