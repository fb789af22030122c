// Rotating and quantizing a row with AVX-512: butterflies in registers, one pass of products for
// the factor, then the largest magnitude and the codes while the row is in the nearest cache.
#include "fronts_avx512.hpp"
#include "unroll.hpp"

namespace qpass {
namespace {

// the same bound as SMALLEST_ROW in qpass/ops/quantize.py: 2**-100
constexpr int32_t kSmallestRow = 27 << 23;
constexpr int32_t kInfinity = 0x7f800000;

const char* refuse(const Rows& c) {
  if (c.type == Float::f64) return "it does not compute in float64";
  if (c.signs && c.part_type == Float::f64) return "signs and factor are float64";
  if (c.order > 1 && c.power % 16) return "the power of two beside the factor is less than 16";
  if (c.front == Front::gated && c.gate == Gate::gelu) return "it has no error function";
  return nullptr;
}

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

size_t scratch(const Rows& c) { return static_cast<size_t>(2 * padded(c.n)) * sizeof(float); }

// butterflies of 2, 4, 8 and 16 lanes, the first `stages` of them
inline __attribute__((always_inline)) __m512 lanes(__m512 v, int stages) {
  const __m512 one = _mm512_set1_ps(1.0f), minus = _mm512_set1_ps(-1.0f);
  const auto step = [&](__m512 partner, __mmask16 upper) {
    v = _mm512_fmadd_ps(v, _mm512_mask_mov_ps(one, upper, minus), partner);
  };
  if (stages > 0) step(_mm512_permute_ps(v, 0xb1), 0xaaaa);
  if (stages > 1) step(_mm512_permute_ps(v, 0x4e), 0xcccc);
  if (stages > 2) step(_mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
  if (stages > 3) step(_mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
  return v;
}

// butterflies among R vectors that lie `stride` vectors apart; Lanes also does those inside each
template <int R, bool Lanes>
inline __attribute__((always_inline)) void radix(float* x, int64_t vectors, int64_t stride) {
  for (int64_t base = 0; base < vectors; base += R * stride) {
    for (int64_t i = base; i < base + stride; ++i) {
      __m512 v[R];
      repeat<R>(QPASS_STEP(auto r) {
        v[r] = _mm512_load_ps(x + (i + r * stride) * 16);
        if (Lanes) v[r] = lanes(v[r], 4);
      });
      repeat<4>(QPASS_STEP(auto stage) {
        constexpr int half = 1 << stage.value;
        repeat<R>(QPASS_STEP(auto r) {
          constexpr int low = r.value, high = low | half;
          if constexpr (high < R && low != high) {
            const __m512 a = v[low], b = v[high];
            v[low] = _mm512_add_ps(a, b);
            v[high] = _mm512_sub_ps(a, b);
          }
        });
      });
      repeat<R>(QPASS_STEP(auto r) { _mm512_store_ps(x + (i + r * stride) * 16, v[r]); });
    }
  }
}

template <bool Lanes>
int64_t butterflies(float* x, int64_t vectors, int64_t stride) {
  const int64_t left = vectors / stride;
  if (left >= 16) return radix<16, Lanes>(x, vectors, stride), 16;
  if (left == 8) return radix<8, Lanes>(x, vectors, stride), 8;
  if (left == 4) return radix<4, Lanes>(x, vectors, stride), 4;
  if (left == 2) return radix<2, Lanes>(x, vectors, stride), 2;
  return radix<1, Lanes>(x, vectors, stride), 1;
}

// x[0 .. power) becomes x @ (unscaled Sylvester matrix), for a power of at least 16
void sylvester(float* x, int64_t power) {
  const int64_t vectors = power / 16;
  for (int64_t stride = butterflies<true>(x, vectors, 1); stride < vectors;) {
    stride *= butterflies<false>(x, vectors, stride);
  }
}

// rows to .. to + T of y = factor.T @ x, in columns j .. j + 16 S
template <int T, int S>
inline __attribute__((always_inline)) void mix_tile(const Rows& c, const float* x, float* y,
                                                    int64_t to, int64_t j) {
  const float* factor = static_cast<const float*>(c.factor) + to;
  __m512 acc[T][S];
  repeat<T>(
      QPASS_STEP(auto t) { repeat<S>(QPASS_STEP(auto s) { acc[t][s] = _mm512_setzero_ps(); }); });
  for (int64_t from = 0; from < c.order; ++from, factor += c.order) {
    __m512 v[S];
    repeat<S>(QPASS_STEP(auto s) { v[s] = _mm512_load_ps(x + from * c.power + j + 16 * s); });
    repeat<T>(QPASS_STEP(auto t) {
      repeat<S>(QPASS_STEP(auto s) {
        acc[t][s] = _mm512_fmadd_ps(v[s], _mm512_set1_ps(factor[t]), acc[t][s]);
      });
    });
  }
  repeat<T>(QPASS_STEP(auto t) {
    repeat<S>(
        QPASS_STEP(auto s) { _mm512_store_ps(y + (to + t) * c.power + j + 16 * s, acc[t][s]); });
  });
}

template <int S>
void mix_columns(const Rows& c, const float* x, float* y, int64_t j) {
  int64_t to = 0;
  for (; to + 12 <= c.order; to += 12) mix_tile<12, S>(c, x, y, to, j);
  for (; to + 4 <= c.order; to += 4) mix_tile<4, S>(c, x, y, to, j);
  for (; to < c.order; ++to) mix_tile<1, S>(c, x, y, to, j);
}

void mix(const Rows& c, const float* x, float* y) {
  int64_t j = 0;
  for (; j + 32 <= c.power; j += 32) mix_columns<2>(c, x, y, j);
  if (j < c.power) mix_columns<1>(c, x, y, j);
}

// the row in float32 with zeros behind it, transformed; in `x` or in `y`
const float* read(const Rows& c, int64_t row, float* x, float* y) {
  const float* signs = static_cast<const float*>(c.signs);
  const bool inside = c.signs && c.power < 16;
  int stages = 0;
  while (inside && (1 << stages) < c.power) ++stages;
  const float root = c.signs ? __builtin_sqrtf(static_cast<float>(c.power)) : 1.0f;
  const __m512 norm = _mm512_set1_ps(1.0f / root);
  if (c.front == Front::normed) normed(c, row, x);
  if (c.front == Front::gated) gated(c, row, x);
  for (int64_t i = 0; i < c.n; i += 16) {
    const __mmask16 mask = first_lanes(c.n - i);
    __m512 v = c.front == Front::plain ? load16(c.type, c.x, row * c.x_row + i, mask)
                                       : _mm512_load_ps(x + i);
    if (c.signs) {
      v = _mm512_mul_ps(_mm512_mul_ps(v, norm), _mm512_maskz_loadu_ps(mask, signs + i));
    }
    _mm512_store_ps(x + i, inside ? lanes(v, stages) : v);
  }
  if (!c.signs || (inside && c.order == 1)) {
    if (c.signs) {
      // an order of 1 is a sign, or rarely nothing at all
      const __m512 only = _mm512_set1_ps(*static_cast<const float*>(c.factor));
      for (int64_t i = 0; i < c.n; i += 16) {
        _mm512_store_ps(x + i, _mm512_mul_ps(_mm512_load_ps(x + i), only));
      }
    }
    return x;
  }
  const int64_t block = c.order * c.power;
  for (int64_t i = 0; i < c.n; i += c.power) sylvester(x + i, c.power);
  for (int64_t i = 0; i < c.n; i += block) mix(c, x + i, y + i);
  return y;
}

void quantize(const Rows& c, int64_t row, const float* x) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  // magnitudes of floats order like their bits, with infinities and NaNs on top
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < c.n; i += 16) {
    const __m512i bits = _mm512_castps_si512(_mm512_load_ps(x + i));
    most = _mm512_max_epi32(most, _mm512_and_si512(bits, magnitude));
  }
  const int32_t largest_bits = _mm512_reduce_max_epi32(most);
  const bool zero = largest_bits < kSmallestRow, finite = largest_bits < kInfinity;
  float largest;
  __builtin_memcpy(&largest, &largest_bits, 4);
  const float top = static_cast<float>(c.high), reach = largest * c.clip;
  c.scales[row] = zero ? 0.0f : finite ? reach / top : __builtin_nanf("");
  const __m512 to_codes = _mm512_set1_ps(top / reach), high = _mm512_set1_ps(top);
  const __m512 low = _mm512_set1_ps(static_cast<float>(c.low));
  const __mmask16 counts = zero || !finite ? 0 : 0xffff;
  for (int64_t i = 0; i < c.n; i += 16) {
    __m512 v = _mm512_maskz_mul_ps(counts, _mm512_load_ps(x + i), to_codes);
    v = _mm512_min_ps(_mm512_max_ps(v, low), high);
    // rounds to even
    _mm512_mask_cvtsepi32_storeu_epi8(c.codes + row * c.n + i, first_lanes(c.n - i),
                                      _mm512_cvtps_epi32(v));
  }
}

void run(const Rows& c, const Part& part, void* memory) {
  float* x = static_cast<float*>(memory);
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    const float* y = read(c, row, x, x + padded(c.n));
    if (!c.out) {
      quantize(c, row, y);
      continue;
    }
    for (int64_t i = 0; i < c.n; i += 16) {
      store16(c.type, c.out, row * c.n + i, first_lanes(c.n - i), _mm512_load_ps(y + i));
    }
  }
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Rows, rows) = {QPASS_NAME(rows), qpass::refuse, nullptr, qpass::scratch, qpass::run, 1,
                            nullptr};
