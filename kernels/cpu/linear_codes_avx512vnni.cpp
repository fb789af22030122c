// Integer activations with AVX-512 VNNI: u8 weights times s8 codes, four products a lane.
//
// A tile of R rows by B blocks of 16 outputs lives in registers. Few rows read the packed lines
// directly; many rows unpack 4-bit lines once into a panel that stays in cache.
#include "codes_avx512.hpp"
#include "unroll.hpp"

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
    repeat<B>(QPASS_STEP(auto b) {
      w0[b] = _mm512_loadu_si512(line + b * block_bytes);
      // the same place in the next blocks: far enough ahead to come from memory in time
      if (R <= 4)
        _mm_prefetch(reinterpret_cast<const char*>(line + (b + B) * block_bytes), _MM_HINT_T1);
      if (Bits == 4) {
        w1[b] = _mm512_and_si512(_mm512_srli_epi16(w0[b], 4), low);
        w0[b] = _mm512_and_si512(w0[b], low);
      }
    });
    repeat<R>(QPASS_STEP(auto r) {
      const __m512i x0 = codes4(x + r * row_bytes);
      repeat<B>(QPASS_STEP(auto b) { acc[r][b] = dot4(acc[r][b], w0[b], x0); });
      if (Bits == 4) {
        const __m512i x1 = codes4(x + r * row_bytes + 4);
        repeat<B>(QPASS_STEP(auto b) { acc[r][b] = dot4(acc[r][b], w1[b], x1); });
      }
    });
  }
}

// the starts of one group: what takes the raise of the stored weights off again
template <int R, int B>
inline __attribute__((always_inline)) void start(const LinearCodes& c, int64_t row, int64_t g,
                                                 __m512i (&acc)[R][B]) {
  repeat<R>(QPASS_STEP(auto r) {
    const __m512i first = _mm512_set1_epi32(c.starts[(row + r) * c.weight.groups + g]);
    repeat<B>(QPASS_STEP(auto b) { acc[r][b] = first; });
  });
}

template <int R, int B, int Bits>
void tile(const LinearCodes& c, const Lines& lines, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  __m512i acc[R][B];
  start(c, row, 0, acc);
  group_sums<R, B, Bits>(acc, lines.first, lines.block_bytes, lines.group_lines,
                         c.padded + row * w.padded_k(), w.padded_k());
  repeat<R>(QPASS_STEP(auto r) {
    const __m512 scale = _mm512_set1_ps(c.scales[row + r]);
    repeat<B>(QPASS_STEP(auto b) {
      finish16(w, block + b, _mm512_cvtepi32_ps(acc[r][b]), scale, c.out_type, c.out, row + r);
    });
  });
}

// R * B is at most 12, so that the sums over groups stay in registers beside those of a group
template <int R, int B, int Bits>
void grouped_tile(const LinearCodes& c, const Lines& lines, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const int64_t group_bytes = w.group_lines * w.columns_per_line();
  const int8_t* x = c.padded + row * w.padded_k();
  const uint8_t* line = lines.first;
  __m512 total[R][B];
  repeat<R>(
      QPASS_STEP(auto r) { repeat<B>(QPASS_STEP(auto b) { total[r][b] = _mm512_setzero_ps(); }); });
  for (int64_t g = 0; g < w.groups; ++g, line += lines.group_lines * kLine, x += group_bytes) {
    __m512i acc[R][B];
    start(c, row, g, acc);
    group_sums<R, B, Bits>(acc, line, lines.block_bytes, lines.group_lines, x, w.padded_k());
    const float* sums = c.sums + row * w.groups + g;
    repeat<B>(QPASS_STEP(auto b) {
      const int64_t at = ((block + b) * w.groups + g) * kRows;
      const __m512 s = half16(w.scales + at);
      repeat<R>(QPASS_STEP(auto r) {
        total[r][b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][b]), s, total[r][b]);
      });
      if (!w.offsets) return;
      const __m512 m = half16(w.offsets + at);
      repeat<R>(QPASS_STEP(auto r) {
        total[r][b] = _mm512_fmadd_ps(_mm512_set1_ps(sums[r * w.groups]), m, total[r][b]);
      });
    });
  }
  repeat<R>(QPASS_STEP(auto r) {
    const __m512 scale = _mm512_set1_ps(c.scales[row + r]);
    repeat<B>(QPASS_STEP(auto b) {
      finish16(w, block + b, total[r][b], scale, c.out_type, c.out, row + r);
    });
  });
}

// all rows of a part over B blocks, the most rows at once that fit the registers
template <int B, int Bits>
void rows(const LinearCodes& c, const Lines& lines, const Part& part, int64_t block) {
  const int64_t end = part.row_end;
  int64_t row = part.row_begin;
  // four blocks at once are for one or two rows
  constexpr int kWide = B <= 2 ? B : 1;
  if (c.weight.scales) {
    for (; B <= 2 && row + 6 <= end; row += 6) grouped_tile<6, kWide, Bits>(c, lines, row, block);
    for (; B <= 2 && row + 4 <= end; row += 4) grouped_tile<4, kWide, Bits>(c, lines, row, block);
    for (; row + 2 <= end; row += 2) grouped_tile<2, B, Bits>(c, lines, row, block);
    for (; row < end; ++row) grouped_tile<1, B, Bits>(c, lines, row, block);
    return;
  }
  for (; B <= 2 && row + 12 <= end; row += 12) tile<12, kWide, Bits>(c, lines, row, block);
  for (; B <= 2 && row + 8 <= end; row += 8) tile<8, kWide, Bits>(c, lines, row, block);
  for (; B <= 2 && row + 4 <= end; row += 4) tile<4, kWide, Bits>(c, lines, row, block);
  for (; row + 2 <= end; row += 2) tile<2, B, Bits>(c, lines, row, block);
  for (; row < end; ++row) tile<1, B, Bits>(c, lines, row, block);
}

template <int B>
void blocks(const LinearCodes& c, const Part& part, int64_t block, uint8_t* panel) {
  const Weight& w = c.weight;
  const uint8_t* first = w.lines + block * w.lines_per_block() * kLine;
  if (unpacks(c)) {
    unpack_lines(first, panel, B * w.lines_per_block());
    rows<B, 8>(c, {panel, w.lines_per_block() * 2 * kLine, w.group_lines * 2}, part, block);
    return;
  }
  const Lines lines{first, w.lines_per_block() * kLine, w.group_lines};
  w.bits == 4 ? rows<B, 4>(c, lines, part, block) : rows<B, 8>(c, lines, part, block);
}

void run(const LinearCodes& c, const Part& part, void* memory) {
  uint8_t* panel = static_cast<uint8_t*>(memory);
  int64_t block = part.block_begin;
  if (c.m <= 2) {
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
