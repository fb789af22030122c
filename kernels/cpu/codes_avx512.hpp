// What the AVX-512 and AMX kernels for integer activations share.
#pragma once

#include "avx512.hpp"

namespace qpass {

// sums + four products of unsigned and signed bytes a lane. Assembly, because around the intrinsic
// GCC 12 copies and spills its accumulators at every use.
static inline __m512i dot4(__m512i sums, __m512i stored, __m512i codes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(stored), "v"(codes));
  return sums;
}

// fills padded, sums and starts for some rows
static void prepare_codes(const LinearCodes& c, int64_t row_begin, int64_t row_end) {
  const Weight& w = c.weight;
  const int64_t padded_width = w.group_lines * w.columns_per_line();
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t row = row_begin; row < row_end; ++row) {
    const int8_t* from = c.codes + row * w.k;
    int8_t* to = c.padded + row * w.padded_k();
    const bool copies = to != from;
    for (int64_t g = 0; g < w.groups; ++g, from += w.width, to += padded_width) {
      __m512i sum = _mm512_setzero_si512();
      for (int64_t k = 0; k < padded_width; k += 64) {
        const int64_t left = w.width - k, room = padded_width - k;
        const __mmask64 read = left >= 64 ? ~0ull : left <= 0 ? 0ull : (1ull << left) - 1;
        const __m512i x = _mm512_maskz_loadu_epi8(read, from + k);
        sum = _mm512_dpbusd_epi32(sum, ones, x);
        if (copies) _mm512_mask_storeu_epi8(to + k, room >= 64 ? ~0ull : (1ull << room) - 1, x);
      }
      const int32_t total = _mm512_reduce_add_epi32(sum);
      c.sums[row * w.groups + g] = static_cast<float>(total);
      c.starts[row * w.groups + g] = -w.zero * total;
    }
  }
}

// 4-bit lines become 8-bit lines, two for one, values as stored
static void unpack_lines(const uint8_t* from, uint8_t* to, int64_t lines) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t l = 0; l < lines; ++l, from += kLine, to += 2 * kLine) {
    const __m512i v = _mm512_loadu_si512(from);
    _mm512_storeu_si512(to, _mm512_and_si512(v, low));
    _mm512_storeu_si512(to + kLine, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
  }
}

// what a group adds to a sum of floats: scale * (sum of products) + offset * (sum of codes)
static inline __m512 add_group(const Weight& w, int64_t at, __m512 total, __m512i products,
                               float codes_sum) {
  total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), half16(w.scales + at), total);
  if (!w.offsets) return total;
  return _mm512_fmadd_ps(_mm512_set1_ps(codes_sum), half16(w.offsets + at), total);
}

}  // namespace qpass
