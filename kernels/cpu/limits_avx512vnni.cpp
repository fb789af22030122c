// Products of 64 unsigned with 64 signed bytes an instruction, and lines read into one register.
#include <immintrin.h>

#include "limits.hpp"

namespace qpass {
namespace {

// chains of sums that do not wait for each other
constexpr int kChains = 16;

uint32_t multiply(int64_t steps) {
  const __m512i w = _mm512_set1_epi8(3), x = _mm512_set1_epi8(-5);
  __m512i sums[kChains];
  repeat<kChains>(QPASS_STEP(auto i) { sums[i] = _mm512_setzero_si512(); });
  for (int64_t s = 0; s < steps * kStepProducts / (64 * kChains); ++s) {
    // assembly, because around the intrinsic GCC 12 copies its accumulators
    repeat<kChains>(QPASS_STEP(auto i) {
      __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sums[i]) : "v"(w), "v"(x));
    });
  }
  repeat<kChains - 1>(QPASS_STEP(auto i) { sums[0] = _mm512_add_epi32(sums[0], sums[i + 1]); });
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(sums[0]));
}

uint32_t multiply_floats(int64_t steps) {
  const __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(-0.5f);
  __m512 sums[kChains];
  repeat<kChains>(QPASS_STEP(auto i) { sums[i] = _mm512_setzero_ps(); });
  for (int64_t s = 0; s < steps * kStepProducts / (16 * kChains); ++s) {
    repeat<kChains>(QPASS_STEP(auto i) { sums[i] = _mm512_fmadd_ps(a, b, sums[i]); });
  }
  repeat<kChains - 1>(QPASS_STEP(auto i) { sums[0] = _mm512_add_ps(sums[0], sums[i + 1]); });
  return static_cast<uint32_t>(_mm512_cvtsi512_si32(_mm512_castps_si512(sums[0])));
}

uint32_t read(const uint8_t* line, int64_t count) {
  constexpr int kLines = 8;
  __m512i seen[kLines];
  repeat<kLines>(QPASS_STEP(auto i) { seen[i] = _mm512_setzero_si512(); });
  int64_t l = 0;
  for (; l + kLines <= count; l += kLines, line += kLines * kLine) {
    repeat<kLines>(QPASS_STEP(auto i) {
      _mm_prefetch(reinterpret_cast<const char*>(line + i * kLine + kReadAhead), _MM_HINT_T0);
      seen[i] = _mm512_xor_si512(seen[i], _mm512_loadu_si512(line + i * kLine));
    });
  }
  for (; l < count; ++l, line += kLine) {
    seen[0] = _mm512_xor_si512(seen[0], _mm512_loadu_si512(line));
  }
  repeat<kLines - 1>(QPASS_STEP(auto i) { seen[0] = _mm512_xor_si512(seen[0], seen[i + 1]); });
  return static_cast<uint32_t>(_mm512_reduce_add_epi32(seen[0]));
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Limits, limits) = {
    QPASS_NAME(limits),
    qpass::refuse_no_limits,
    nullptr,
    qpass::no_limits_scratch,
    qpass::run_limits<qpass::read, qpass::multiply, qpass::multiply_floats>,
    1,
    nullptr};
