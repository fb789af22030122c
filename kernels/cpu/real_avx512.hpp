// From packed lines to floats: what the AVX-512 and AMX kernels for float activations share.
#pragma once

#include "avx512.hpp"
#include "unroll.hpp"

namespace qpass {

// codes of one column of a line as floats, zero taken off
template <int Bits, int J>
static inline __m512 column(__m512i line, __m512 values) {
  if (Bits == 4) {
    // the permutation looks at the lowest four bits of each lane alone
    return _mm512_permutexvar_ps(_mm512_srli_epi32(line, J < 4 ? 8 * J : 8 * (J - 4) + 4), values);
  }
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(line, 24 - 8 * (J & 3)), 24));
}

static inline __m512i load_line(const uint8_t* line, int bits) {
  const __m512i v = _mm512_loadu_si512(line);
  // stored 8-bit values are raised by 128: flipping the top bit makes them signed again
  return bits == 8 ? _mm512_xor_si512(v, _mm512_set1_epi8(-128)) : v;
}

static inline __m512 decoded(int zero) {
  const __m512 up = _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_sub_ps(up, _mm512_set1_ps(static_cast<float>(zero)));
}

template <int Bits, class F>
static inline __attribute__((always_inline)) void each_column(const F& f) {
  repeat<Bits == 4 ? 8 : 4>(f);
}

// hands every column of a block to f(place in its line, 16 weights without their row scales)
template <int Bits, class F>
static inline void decode_columns(const Weight& w, int64_t block, const F& f) {
  const uint8_t* line = w.lines + block * w.lines_per_block() * kLine;
  const __m512 values = decoded(w.zero);
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (block * w.groups + g) * kRows;
    const __m512 s = w.scales ? half16(w.scales + at) : _mm512_set1_ps(1.0f);
    const __m512 m = w.offsets ? half16(w.offsets + at) : _mm512_setzero_ps();
    for (int64_t l = 0; l < w.group_lines; ++l, line += kLine) {
      const __m512i v = load_line(line, Bits);
      each_column<Bits>(QPASS_STEP(auto j) {
        f(j.value, _mm512_fmadd_ps(column<Bits, j.value>(v, values), s, m));
      });
    }
  }
}

}  // namespace qpass
