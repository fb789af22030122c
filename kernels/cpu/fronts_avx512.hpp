// What a row is made of before it is transformed, with AVX-512.
#pragma once

#include "avx512.hpp"

namespace qpass {

static inline __m512 rounded16(Float type, __m512 v) {
  if (type == Float::f32) return v;
  if (type == Float::bf16) return widen_bfloat(narrow_bfloat(v));
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// exp within 2 units in the last place; infinite and zero where float32 is, NaN for NaN
static inline __m512 exp16(__m512 x) {
  // a NaN in the second place is what min and max return
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), x));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // ln 2 in two parts, the first of few bits
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 y = _mm512_set1_ps(1.0f / 5040);
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f / 720));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f / 120));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f / 24));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f / 6));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// the gates but for gelu
static inline __m512 gate16(Gate gate, __m512 v) {
  const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  if (gate == Gate::relu) return _mm512_max_ps(zero, v);
  __m512 u = _mm512_sub_ps(zero, v);
  if (gate == Gate::gelu_tanh) {
    const __m512 cube = _mm512_mul_ps(_mm512_mul_ps(v, v), v);
    u = _mm512_fmadd_ps(cube, _mm512_set1_ps(0.044715f), v);
    u = _mm512_mul_ps(u, _mm512_set1_ps(-1.59576912f));
  }
  return _mm512_div_ps(v, _mm512_add_ps(one, exp16(u)));
}

static inline void gated(const Rows& c, int64_t row, float* x) {
  for (int64_t i = 0; i < c.n; i += 16) {
    const __mmask16 mask = first_lanes(c.n - i);
    const __m512 v = load16(c.type, c.x, row * c.x_row + i, mask);
    __m512 g = rounded16(c.type, gate16(c.gate, v));
    if (c.other) {
      const __m512 by = load16(c.type, c.other, row * c.other_row + i, mask);
      g = rounded16(c.type, _mm512_mul_ps(g, by));
    }
    _mm512_store_ps(x + i, g);
  }
}

static inline void normed(const Rows& c, int64_t row, float* x) {
  __m512 sums = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < c.n; i += 16) {
    const __mmask16 mask = first_lanes(c.n - i);
    __m512 v = load16(c.type, c.x, row * c.x_row + i, mask);
    if (c.other) {
      v = _mm512_add_ps(v, load16(c.type, c.other, row * c.other_row + i, mask));
      v = rounded16(c.type, v);
      store16(c.type, c.sum, row * c.n + i, mask, v);
    }
    _mm512_store_ps(x + i, v);
    sums = _mm512_add_ps(sums, v);
    squares = _mm512_fmadd_ps(v, v, squares);
  }
  const float count = static_cast<float>(c.n);
  const float middle = c.centred ? _mm512_reduce_add_ps(sums) / count : 0.0f;
  const __m512 mean = _mm512_set1_ps(middle);
  if (c.centred) {
    // again, as the difference of two large sums would keep few digits
    squares = _mm512_setzero_ps();
    for (int64_t i = 0; i < c.n; i += 16) {
      const __m512 v = _mm512_maskz_sub_ps(first_lanes(c.n - i), _mm512_load_ps(x + i), mean);
      squares = _mm512_fmadd_ps(v, v, squares);
    }
  }
  const float variance = _mm512_reduce_add_ps(squares) / count;
  const __m512 norm = _mm512_set1_ps(1.0f / __builtin_sqrtf(variance + static_cast<float>(c.eps)));
  for (int64_t i = 0; i < c.n; i += 16) {
    const __mmask16 mask = first_lanes(c.n - i);
    __m512 v = _mm512_maskz_sub_ps(mask, _mm512_load_ps(x + i), mean);
    v = _mm512_mul_ps(v, norm);
    if (c.norm_scale) v = _mm512_mul_ps(v, load16(c.type, c.norm_scale, i, mask));
    if (c.norm_shift) v = _mm512_add_ps(v, load16(c.type, c.norm_shift, i, mask));
    _mm512_store_ps(x + i, rounded16(c.type, v));
  }
}

}  // namespace qpass
