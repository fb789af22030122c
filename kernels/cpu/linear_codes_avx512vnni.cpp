// Integer activations with AVX-512 VNNI: u8 weights times s8 codes, four products a lane.
//
// A tile of R rows by B blocks of 16 outputs lives in registers. Few rows read the packed lines
// directly; many rows unpack 4-bit lines once into a panel that stays in cache.
#include "codes_avx512.hpp"

namespace qpass {
namespace {

// rows from which unpacking a panel first beats unpacking in registers for every tile of rows
constexpr int64_t kPanelRows = 9;
constexpr int kPanelBlocks = 2;

// lines of B neighbouring blocks, in the packed weight or in a panel
struct Lines {
  const uint8_t* first;
  int64_t block_bytes;
  int64_t group_lines;
};

const char* refuse(const LinearCodes& c) {
  return c.out_type == Float::f64 ? "it does not write float64" : nullptr;
}

bool unpacks(const LinearCodes& c) { return c.weight.bits == 4 && c.m >= kPanelRows; }

size_t scratch(const LinearCodes& c) {
  if (!unpacks(c)) return 0;
  return static_cast<size_t>(kPanelBlocks * c.weight.lines_per_block() * 2 * kLine);
}

__m512i codes4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// the sums of products of one group
template <int R, int B, int Bits>
inline __attribute__((always_inline)) void group_sums(__m512i (&acc)[R][B], const uint8_t* line,
                                                      int64_t block_bytes, int64_t lines,
                                                      const int8_t* x, int64_t row_bytes) {
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t l = 0; l < lines; ++l, line += kLine, x += Bits == 4 ? 8 : 4) {
    __m512i w0[B], w1[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      w0[b] = _mm512_loadu_si512(line + b * block_bytes);
      // the same place in the next blocks: far enough ahead to come from memory in time
      if (R <= 4)
        _mm_prefetch(reinterpret_cast<const char*>(line + (b + B) * block_bytes), _MM_HINT_T1);
      if (Bits == 4) {
        w1[b] = _mm512_and_si512(_mm512_srli_epi16(w0[b], 4), low);
        w0[b] = _mm512_and_si512(w0[b], low);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i x0 = codes4(x + r * row_bytes);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], w0[b], x0);
      if (Bits == 4) {
        const __m512i x1 = codes4(x + r * row_bytes + 4);
#pragma GCC unroll 8
        for (int b = 0; b < B; ++b) acc[r][b] = _mm512_dpbusd_epi32(acc[r][b], w1[b], x1);
      }
    }
  }
}

template <int R, int B, int Bits, bool Grouped>
void tile(const LinearCodes& c, const Lines& lines, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const int64_t row_bytes = w.padded_k();
  const int64_t group_bytes = w.group_lines * w.columns_per_line();
  const int8_t* x = c.padded + row * row_bytes;
  alignas(64) float total[R][B][16];
  if (Grouped) {
    for (int r = 0; r < R; ++r) {
      for (int b = 0; b < B; ++b) _mm512_store_ps(total[r][b], _mm512_setzero_ps());
    }
  }
  const uint8_t* line = lines.first;
  for (int64_t g = 0; g < w.groups; ++g, line += lines.group_lines * kLine, x += group_bytes) {
    __m512i acc[R][B];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const __m512i start = _mm512_set1_epi32(c.starts[(row + r) * w.groups + g]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[r][b] = start;
    }
    group_sums<R, B, Bits>(acc, line, lines.block_bytes, lines.group_lines, x, row_bytes);
    if (!Grouped) {
      for (int r = 0; r < R; ++r) {
        const __m512 scale = _mm512_set1_ps(c.scales[row + r]);
        for (int b = 0; b < B; ++b) {
          finish16(w, block + b, _mm512_cvtepi32_ps(acc[r][b]), scale, c.out_type, c.out, row + r);
        }
      }
      return;
    }
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      const int64_t at = ((block + b) * w.groups + g) * kRows;
      const __m512 s = half16(w.scales + at);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 products = _mm512_cvtepi32_ps(acc[r][b]);
        _mm512_store_ps(total[r][b], _mm512_fmadd_ps(products, s, _mm512_load_ps(total[r][b])));
      }
      if (!w.offsets) continue;
      const __m512 m = half16(w.offsets + at);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const __m512 sum = _mm512_set1_ps(c.sums[(row + r) * w.groups + g]);
        _mm512_store_ps(total[r][b], _mm512_fmadd_ps(sum, m, _mm512_load_ps(total[r][b])));
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_set1_ps(c.scales[row + r]);
    for (int b = 0; b < B; ++b) {
      finish16(w, block + b, _mm512_load_ps(total[r][b]), scale, c.out_type, c.out, row + r);
    }
  }
}

// all rows of a part over B blocks, the most rows at once that fit the registers
template <int B, int Bits, bool Grouped>
void rows(const LinearCodes& c, const Lines& lines, const Part& part, int64_t block) {
  int64_t row = part.row_begin;
  for (int64_t left; (left = part.row_end - row) > 0;) {
    if (B <= 2 && left >= 12) {
      tile<12, B <= 2 ? B : 1, Bits, Grouped>(c, lines, row, block), row += 12;
    } else if (B <= 2 && left >= 8) {
      tile<8, B <= 2 ? B : 1, Bits, Grouped>(c, lines, row, block), row += 8;
    } else if (left >= 4) {
      tile<4, B, Bits, Grouped>(c, lines, row, block), row += 4;
    } else if (left >= 2) {
      tile<2, B, Bits, Grouped>(c, lines, row, block), row += 2;
    } else {
      tile<1, B, Bits, Grouped>(c, lines, row, block), row += 1;
    }
  }
}

template <int B>
void blocks(const LinearCodes& c, const Part& part, int64_t block, uint8_t* panel) {
  const Weight& w = c.weight;
  const uint8_t* first = w.lines + block * w.lines_per_block() * kLine;
  const bool grouped = w.scales != nullptr;
  if (unpacks(c)) {
    unpack_lines(first, panel, B * w.lines_per_block());
    const Lines lines{panel, w.lines_per_block() * 2 * kLine, w.group_lines * 2};
    grouped ? rows<B, 8, true>(c, lines, part, block) : rows<B, 8, false>(c, lines, part, block);
    return;
  }
  const Lines lines{first, w.lines_per_block() * kLine, w.group_lines};
  if (w.bits == 4) {
    grouped ? rows<B, 4, true>(c, lines, part, block) : rows<B, 4, false>(c, lines, part, block);
  } else {
    grouped ? rows<B, 8, true>(c, lines, part, block) : rows<B, 8, false>(c, lines, part, block);
  }
}

void run(const LinearCodes& c, const Part& part, void* memory) {
  uint8_t* panel = static_cast<uint8_t*>(memory);
  int64_t block = part.block_begin;
  if (c.m <= 4) {
    for (; block + 4 <= part.block_end; block += 4) blocks<4>(c, part, block, panel);
  }
  for (; block + 2 <= part.block_end; block += 2) blocks<2>(c, part, block, panel);
  if (block < part.block_end) blocks<1>(c, part, block, panel);
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(LinearCodes, linear_codes) = {QPASS_NAME(linear_codes),
                                           qpass::refuse,
                                           qpass::prepare_codes,
                                           qpass::scratch,
                                           qpass::run,
                                           1,
                                           nullptr};
