// Products of unsigned 4-bit values and signed bytes, as the linear kernel forms them: two pairs of
// sums of two fit 16 bits. 8-bit values, which must be widened first, take twice as long.
#include <immintrin.h>

#include "limits.hpp"

namespace qpass {
namespace {

// chains of sums that do not wait for each other
constexpr int kChains = 6;

uint32_t multiply(int64_t steps) {
  constexpr int64_t kOnce = 64 * kChains;
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5), x = _mm256_set1_epi8(-7);
  __m256i sums[kChains];
  repeat<kChains>(QPASS_STEP(auto i) { sums[i] = _mm256_setzero_si256(); });
  for (int64_t s = 0; s < steps * kStepProducts / kOnce; ++s) {
    repeat<kChains>(QPASS_STEP(auto i) {
      // opaque, or one product serves all of them
      __asm__ volatile("" : "+x"(a), "+x"(b), "+x"(x));
      const __m256i pairs =
          _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, x));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(pairs, ones));
    });
  }
  __m256i total = sums[0];
  repeat<kChains - 1>(QPASS_STEP(auto i) { total = _mm256_add_epi32(total, sums[i + 1]); });
  return static_cast<uint32_t>(_mm256_extract_epi32(total, 0));
}

uint32_t multiply_floats(int64_t steps) {
  constexpr int kSums = 10;
  const __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(-0.5f);
  __m256 sums[kSums];
  repeat<kSums>(QPASS_STEP(auto i) { sums[i] = _mm256_setzero_ps(); });
  for (int64_t s = 0; s < steps * kStepProducts / (8 * kSums); ++s) {
    repeat<kSums>(QPASS_STEP(auto i) { sums[i] = _mm256_fmadd_ps(a, b, sums[i]); });
  }
  repeat<kSums - 1>(QPASS_STEP(auto i) { sums[0] = _mm256_add_ps(sums[0], sums[i + 1]); });
  return static_cast<uint32_t>(_mm256_extract_epi32(_mm256_castps_si256(sums[0]), 0));
}

uint32_t read(const uint8_t* line, int64_t count) {
  __m256i seen[2];
  repeat<2>(QPASS_STEP(auto i) { seen[i] = _mm256_setzero_si256(); });
  for (int64_t l = 0; l < count; ++l, line += kLine) {
    _mm_prefetch(reinterpret_cast<const char*>(line + kReadAhead), _MM_HINT_T0);
    repeat<2>(QPASS_STEP(auto i) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * i));
      seen[i] = _mm256_xor_si256(seen[i], v);
    });
  }
  return static_cast<uint32_t>(_mm256_extract_epi32(_mm256_xor_si256(seen[0], seen[1]), 0));
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
