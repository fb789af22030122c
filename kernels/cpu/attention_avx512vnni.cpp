// Attention with AVX-512: six rows meet a block of 64 keys in 24 registers.
#include "attention.hpp"
#include "avx512.hpp"

namespace qpass {
namespace {

struct Wide {
  using T = float;
  using Vec = __m512;
  static constexpr Float kType = Float::f32;
  static constexpr int kRows = 6, kColumns = 4;
  // e**-104 rounds to 0; terms of the series until they are less than a rounding
  static constexpr double kLowest = -104;
  static constexpr int kTerms = 7;

  QPASS_INLINE Vec splat(float v) { return _mm512_set1_ps(v); }
  QPASS_INLINE Vec load(const float* p) { return _mm512_load_ps(p); }
  QPASS_INLINE void store(float* p, Vec v) { _mm512_store_ps(p, v); }
  QPASS_INLINE Vec plus(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  QPASS_INLINE Vec minus(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
  QPASS_INLINE Vec times(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  QPASS_INLINE Vec product(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  QPASS_INLINE Vec negative(Vec a) { return _mm512_xor_ps(a, _mm512_set1_ps(-0.0f)); }
  // the second where one is NaN
  QPASS_INLINE Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  QPASS_INLINE Vec rounded(Vec a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  QPASS_INLINE Vec times_power(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }
  QPASS_INLINE Vec choose(uint32_t bits, Vec a, Vec b) {
    return _mm512_mask_mov_ps(b, static_cast<__mmask16>(bits), a);
  }
  QPASS_INLINE float first(Vec a) { return _mm512_cvtss_f32(a); }
  QPASS_INLINE float largest_of(Vec a) { return _mm512_reduce_max_ps(a); }
  QPASS_INLINE float sum_of(Vec a) { return _mm512_reduce_add_ps(a); }

  // up to sixteen numbers, zeros behind them
  template <Float F>
  QPASS_INLINE Vec read(const void* p, int64_t i, int64_t count) {
    return load16(F, p, i, some_lanes(count));
  }
  QPASS_INLINE Vec read(Float type, const void* p, int64_t i, int64_t count) {
    return load16(type, p, i, some_lanes(count));
  }
  QPASS_INLINE void write(Float type, void* p, int64_t i, int64_t count, Vec v) {
    store16(type, p, i, first_lanes(count), v);
  }

  // the sums of four vectors
  QPASS_INLINE void store_sums(float* to, const Vec* v) {
    const Vec ab = plus(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
    const Vec cd = plus(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
    const __m512d x = _mm512_castps_pd(ab), y = _mm512_castps_pd(cd);
    const Vec all = plus(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_store_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  // to[i, k] = from[k, i] for up to 64 keys k; those behind the last one repeat it
  template <Float F>
  static void transpose(const void* from, int64_t at, int64_t stride, int64_t count, int64_t d,
                        float* to) {
    for (int64_t k = 0; k < count; k += 16) {
      for (int64_t i = 0; i < d; i += 16) {
        const __mmask16 mask = first_lanes(d - i);
        Vec v[16];
        repeat<16>(QPASS_STEP(auto r) {
          const int64_t key = k + r < count ? k + r : count - 1;
          v[r] = load16(F, from, at + key * stride + i, mask);
        });
        transpose16(v);
        const int64_t rows = d - i < 16 ? d - i : 16;
        repeat<16>(QPASS_STEP(auto r) {
          if (r < rows) store(to + (i + r) * kKeys + k, v[r]);
        });
      }
    }
  }

  // which of up to 64 keys a row of the mask shows
  static uint64_t seen(const Attention& c, int64_t at, int64_t count) {
    if (c.boolean) {
      const __mmask64 mask = first_bits(count);
      const uint8_t* p = static_cast<const uint8_t*>(c.mask.data) + at;
      const __m512i bytes = _mm512_maskz_loadu_epi8(mask, p);
      return _mm512_test_epi8_mask(bytes, bytes);
    }
    uint64_t word = 0;
    for (int64_t k = 0; k < count; k += 16) {
      const Vec v = read(c.mask_type, c.mask.data, at + k, count - k);
      const Vec hidden = splat(-__builtin_inff());
      word |= static_cast<uint64_t>(_mm512_cmp_ps_mask(v, hidden, _CMP_NEQ_UQ)) << k;
    }
    return word;
  }

 private:
  QPASS_INLINE __mmask16 some_lanes(int64_t count) {
    return count > 0 ? first_lanes(count) : __mmask16(0);
  }

  QPASS_INLINE void transpose16(Vec* v) {
    // pairs, then fours inside each quarter of a register, then quarters
    Vec a[16];
    repeat<8>(QPASS_STEP(auto r) {
      a[2 * r] = _mm512_unpacklo_ps(v[2 * r], v[2 * r + 1]);
      a[2 * r + 1] = _mm512_unpackhi_ps(v[2 * r], v[2 * r + 1]);
    });
    repeat<4>(QPASS_STEP(auto r) {
      const auto pd = [&](int i) { return _mm512_castps_pd(a[4 * r + i]); };
      v[4 * r] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(0), pd(2)));
      v[4 * r + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(0), pd(2)));
      v[4 * r + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(pd(1), pd(3)));
      v[4 * r + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(pd(1), pd(3)));
    });
    repeat<4>(QPASS_STEP(auto r) {
      a[r] = _mm512_shuffle_f32x4(v[r], v[4 + r], 0x88);
      a[4 + r] = _mm512_shuffle_f32x4(v[r], v[4 + r], 0xdd);
      a[8 + r] = _mm512_shuffle_f32x4(v[8 + r], v[12 + r], 0x88);
      a[12 + r] = _mm512_shuffle_f32x4(v[8 + r], v[12 + r], 0xdd);
    });
    repeat<4>(QPASS_STEP(auto r) {
      v[r] = _mm512_shuffle_f32x4(a[r], a[8 + r], 0x88);
      v[8 + r] = _mm512_shuffle_f32x4(a[r], a[8 + r], 0xdd);
      v[4 + r] = _mm512_shuffle_f32x4(a[4 + r], a[12 + r], 0x88);
      v[12 + r] = _mm512_shuffle_f32x4(a[4 + r], a[12 + r], 0xdd);
    });
  }
};

const char* refuse(const Attention& c) {
  if (c.type == Float::f64) return "it does not compute in float64";
  if (c.mask.data && !c.boolean && c.mask_type == Float::f64) return "the mask is float64";
  return nullptr;
}

size_t scratch(const Attention& c) { return memory_of<Wide>(c); }

void run(const Attention& c, const Part& part, void* memory) { attend<Wide>(c, part, memory); }

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Attention, attention) = {
    QPASS_NAME(attention), qpass::refuse, nullptr, qpass::scratch, qpass::run, 1, nullptr};
