// Integer activations with AVX2: 4-bit values times codes fit 16-bit sums of two, 8-bit values are
// widened first, since a product of unsigned and signed bytes would saturate.
#include <immintrin.h>

#include "vectors.hpp"

namespace qpass {
namespace {

const char* refuse(const LinearCodes&) { return nullptr; }

size_t scratch(const LinearCodes&) { return 0; }

// a block is two registers of eight rows
constexpr int kHalves = 2;

int32_t sum_codes(const int8_t* x, int64_t count) {
  const __m256i ones8 = _mm256_set1_epi8(1), ones16 = _mm256_set1_epi16(1);
  __m256i sums = _mm256_setzero_si256();
  int64_t k = 0;
  for (; k + 32 <= count; k += 32) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(ones8, v), ones16));
  }
  int32_t lanes[8], total = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums);
  for (const int32_t lane : lanes) total += lane;
  for (; k < count; ++k) total += x[k];
  return total;
}

void prepare(const LinearCodes& c, int64_t row_begin, int64_t row_end) {
  const Weight& w = c.weight;
  const int64_t padded_width = w.group_lines * w.columns_per_line();
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int8_t* from = c.codes + row * w.k + g * w.width;
      const int32_t sum = sum_codes(from, w.width);
      c.sums[row * w.groups + g] = static_cast<float>(sum);
      c.starts[row * w.groups + g] = -w.zero * sum;
      int8_t* to = c.padded + row * w.padded_k() + g * padded_width;
      if (to == from) continue;
      __builtin_memcpy(to, from, static_cast<size_t>(w.width));
      __builtin_memset(to + w.width, 0, static_cast<size_t>(padded_width - w.width));
    }
  }
}

__m256i codes4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// sums += stored values of one line times the codes of R rows
template <int R, int Bits>
inline __attribute__((always_inline)) void add_line(const uint8_t* line, const int8_t* x,
                                                    int64_t row_bytes,
                                                    __m256i (&sums)[R][kHalves]) {
  const __m256i low4 = _mm256_set1_epi8(15), low8 = _mm256_set1_epi16(255);
  const __m256i ones = _mm256_set1_epi16(1);
  // 4 bit: columns 0-3 and 4-7; 8 bit: columns 0, 2 and columns 1, 3, widened
  __m256i first[kHalves], second[kHalves];
  repeat<kHalves>(QPASS_STEP(auto h) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32 * h));
    first[h] = _mm256_and_si256(v, Bits == 4 ? low4 : low8);
    second[h] =
        Bits == 4 ? _mm256_and_si256(_mm256_srli_epi16(v, 4), low4) : _mm256_srli_epi16(v, 8);
  });
  repeat<R>(QPASS_STEP(auto r) {
    const __m256i a = codes4(x + r * row_bytes);
    if constexpr (Bits == 4) {
      const __m256i b = codes4(x + r * row_bytes + 4);
      repeat<kHalves>(QPASS_STEP(auto h) {
        const __m256i pairs =
            _mm256_add_epi16(_mm256_maddubs_epi16(first[h], a), _mm256_maddubs_epi16(second[h], b));
        sums[r][h] = _mm256_add_epi32(sums[r][h], _mm256_madd_epi16(pairs, ones));
      });
    } else {
      const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8);
      const __m256i odd = _mm256_srai_epi16(a, 8);
      repeat<kHalves>(QPASS_STEP(auto h) {
        const __m256i both =
            _mm256_add_epi32(_mm256_madd_epi16(first[h], even), _mm256_madd_epi16(second[h], odd));
        sums[r][h] = _mm256_add_epi32(sums[r][h], both);
      });
    }
  });
}

__m256 halves8(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

template <int R, int Bits>
void tile(const LinearCodes& c, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const uint8_t* line = w.lines + block * w.lines_per_block() * kLine;
  const int8_t* x = c.padded + row * w.padded_k();
  alignas(32) float total[R][kRows] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    __m256i sums[R][kHalves];
    repeat<R>(QPASS_STEP(auto r) {
      const __m256i start = _mm256_set1_epi32(c.starts[(row + r) * w.groups + g]);
      repeat<kHalves>(QPASS_STEP(auto h) { sums[r][h] = start; });
    });
    for (int64_t l = 0; l < w.group_lines; ++l, line += kLine, x += w.columns_per_line()) {
      add_line<R, Bits>(line, x, w.padded_k(), sums);
    }
    repeat<kHalves>(QPASS_STEP(auto h) {
      const int64_t at = (block * w.groups + g) * kRows + 8 * h;
      const __m256 s = w.scales ? halves8(w.scales + at) : _mm256_set1_ps(1.0f);
      const __m256 m = w.offsets ? halves8(w.offsets + at) : _mm256_setzero_ps();
      repeat<R>(QPASS_STEP(auto r) {
        __m256 t = _mm256_load_ps(total[r] + 8 * h);
        t = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[r][h]), s, t);
        if (w.offsets) t = _mm256_fmadd_ps(_mm256_set1_ps(c.sums[(row + r) * w.groups + g]), m, t);
        _mm256_store_ps(total[r] + 8 * h, t);
      });
    });
  }
  for (int r = 0; r < R; ++r) {
    finish<float>(w, block, total[r], c.scales[row + r], c.out_type, c.out, row + r);
  }
}

template <int Bits>
void rows(const LinearCodes& c, const Part& part, int64_t block) {
  int64_t row = part.row_begin;
  for (; row + 4 <= part.row_end; row += 4) tile<4, Bits>(c, row, block);
  for (; row < part.row_end; ++row) tile<1, Bits>(c, row, block);
}

void run(const LinearCodes& c, const Part& part, void*) {
  for (int64_t block = part.block_begin; block < part.block_end; ++block) {
    c.weight.bits == 4 ? rows<4>(c, part, block) : rows<8>(c, part, block);
  }
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(LinearCodes, linear_codes) = {QPASS_NAME(linear_codes),
                                           qpass::refuse,
                                           qpass::prepare,
                                           qpass::scratch,
                                           qpass::run,
                                           1,
                                           nullptr};
