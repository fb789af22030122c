// Sixteen floats at a time: reading, writing and rounding with AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "kernel.hpp"

namespace qpass {

static inline __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16(0xffff) : __mmask16((1u << count) - 1);
}

// bfloat16 arithmetic is a later extension: the conversions are written with integers
static inline __m512 widen_bfloat(__m256i h) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static inline __m512i bfloat_bits(__m512 v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
}

static inline __m256i narrow_bfloat(__m512 v) { return _mm512_cvtepi32_epi16(bfloat_bits(v)); }

// sixteen numbers from index i, zeros where the mask is off; any type but f64
static inline __m512 load16(Float type, const void* p, int64_t i, __mmask16 mask) {
  if (type == Float::f32) return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(p) + i);
  const __m256i h = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(p) + i);
  return type == Float::bf16 ? widen_bfloat(h) : _mm512_cvtph_ps(h);
}

static inline void store16(Float type, void* p, int64_t i, __mmask16 mask, __m512 v) {
  if (type == Float::f32) {
    _mm512_mask_storeu_ps(static_cast<float*>(p) + i, mask, v);
    return;
  }
  const __m256i h = type == Float::bf16
                        ? narrow_bfloat(v)
                        : _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p) + i, mask, h);
}

// sixteen group scales or offsets
static inline __m512 half16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// y * row_scales (* scale) + bias, for the outputs of one block
// (a call, so that unrolled callers stay small)
static __attribute__((noinline, unused)) void finish16(const Weight& w, int64_t block, __m512 y,
                                                       __m512 scale, Float type, void* out,
                                                       int64_t row) {
  const int64_t channel = block * kRows;
  const __mmask16 mask = first_lanes(w.n - channel);
  y = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, w.row_scales + channel)), scale);
  if (w.bias) {
    // two roundings, as everywhere
    y = _mm512_add_ps(y, load16(w.bias_type, w.bias, channel, mask));
  }
  store16(type, out, row * w.n + channel, mask, y);
}

}  // namespace qpass
