// Integer activations with AVX-512 VNNI: u8 weights times s8 codes, four products a lane.
//
// A tile of R rows by B blocks of 16 outputs lives in registers. Few rows read the packed lines one
// after another, as memory likes it best; many rows unpack 4-bit lines once into a panel that stays
// in cache.
#include "codes_avx512.hpp"
#include "unroll.hpp"

namespace qpass {
namespace {

// up to so many rows read packed lines one after another, 4-bit lines or 8-bit ones; for more,
// tiles of rows read 8-bit lines, into which 4-bit ones are unpacked first
constexpr int64_t kStreamRows4 = 16, kStreamRows8 = 8;
// how far ahead they ask for weights, and for their scales
constexpr int64_t kAhead = 4096, kScalesAhead = 1024;
constexpr int kPanelBlocks = 2;
// the most rows of a tile whose groups have scales
constexpr int kGroupedRows = 6;

// lines of B neighbouring blocks, in the packed weight or in a panel
struct Lines {
  const uint8_t* first;
  int64_t block_bytes;
  int64_t group_lines;
};

const char* refuse(const LinearCodes& c) {
  if (c.out_type == Float::f64) return "it does not write float64";
  if (c.weight.bias && c.weight.bias_type == Float::f64) return "the bias is float64";
  return nullptr;
}

bool streams(const LinearCodes& c) {
  return c.m <= (c.weight.bits == 4 ? kStreamRows4 : kStreamRows8);
}

size_t scratch(const LinearCodes& c) {
  if (c.weight.bits == 8 || streams(c)) return 0;
  return static_cast<size_t>(kPanelBlocks * c.weight.lines_per_block() * 2 * kLine);
}

__m512i codes4(const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// the sums of products of one group
template <int R, int B>
inline __attribute__((always_inline)) void group_sums(__m512i (&acc)[R][B], const uint8_t* line,
                                                      int64_t block_bytes, int64_t lines,
                                                      const int8_t* x, int64_t row_bytes) {
  for (int64_t l = 0; l < lines; ++l, line += kLine, x += 4) {
    __m512i v[B];
    repeat<B>(QPASS_STEP(auto b) {
      v[b] = _mm512_loadu_si512(line + b * block_bytes);
      _mm_prefetch(reinterpret_cast<const char*>(line + b * block_bytes + kAhead), _MM_HINT_T0);
    });
    repeat<R>(QPASS_STEP(auto r) {
      const __m512i at = codes4(x + r * row_bytes);
      repeat<B>(QPASS_STEP(auto b) { acc[r][b] = dot4(acc[r][b], v[b], at); });
    });
  }
}

// adds the products of one line to the sums of R rows
template <int R, int Bits>
inline __attribute__((always_inline)) void add_line(__m512i (&acc)[R], const uint8_t* line,
                                                    const int8_t* x, int64_t row_bytes) {
  const __m512i low = _mm512_set1_epi8(15);
  const __m512i w = _mm512_loadu_si512(line);
  _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
  const __m512i w0 = Bits == 4 ? _mm512_and_si512(w, low) : w;
  repeat<R>(QPASS_STEP(auto r) { acc[r] = dot4(acc[r], w0, codes4(x + r * row_bytes)); });
  if (Bits == 8) return;
  const __m512i w1 = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
  repeat<R>(QPASS_STEP(auto r) { acc[r] = dot4(acc[r], w1, codes4(x + r * row_bytes + 4)); });
}

// R rows by one block straight from the packed lines: some lines at once into sums of their own, so
// that no product waits for the one before
template <int R, int Bits>
void stream(const LinearCodes& c, int64_t row, int64_t block) {
  constexpr int kStep = Bits == 4 ? 8 : 4;
  constexpr int kSums = R > 4 ? 2 : 4;
  const Weight& w = c.weight;
  const int64_t row_bytes = w.padded_k();
  const uint8_t* line = w.lines + block * w.lines_per_block() * kLine;
  const int8_t* x = c.padded + row * row_bytes;
  __m512 total[R];
  repeat<R>(QPASS_STEP(auto r) { total[r] = _mm512_setzero_ps(); });
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512i acc[kSums][R];
    repeat<R>(QPASS_STEP(auto r) {
      acc[0][r] = _mm512_set1_epi32(c.starts[(row + r) * w.groups + g]);
      repeat<kSums - 1>(QPASS_STEP(auto s) { acc[s + 1][r] = _mm512_setzero_si512(); });
    });
    int64_t l = 0;
    for (; l + kSums <= w.group_lines; l += kSums, line += kSums * kLine, x += kSums * kStep) {
      repeat<kSums>(QPASS_STEP(auto s) {
        add_line<R, Bits>(acc[s], line + s * kLine, x + s * kStep, row_bytes);
      });
    }
    for (; l < w.group_lines; ++l, line += kLine, x += kStep) {
      add_line<R, Bits>(acc[0], line, x, row_bytes);
    }
    repeat<R>(QPASS_STEP(auto r) {
      repeat<kSums - 1>(
          QPASS_STEP(auto s) { acc[0][r] = _mm512_add_epi32(acc[0][r], acc[s + 1][r]); });
    });
    if (!w.scales) {
      repeat<R>(QPASS_STEP(auto r) { total[r] = _mm512_cvtepi32_ps(acc[0][r]); });
      continue;
    }
    const int64_t at = (block * w.groups + g) * kRows;
    _mm_prefetch(reinterpret_cast<const char*>(w.scales + at) + kScalesAhead, _MM_HINT_T0);
    if (w.offsets) {
      _mm_prefetch(reinterpret_cast<const char*>(w.offsets + at) + kScalesAhead, _MM_HINT_T0);
    }
    repeat<R>(QPASS_STEP(auto r) {
      total[r] = add_group(w, at, total[r], acc[0][r], c.sums[(row + r) * w.groups + g]);
    });
  }
  repeat<R>(QPASS_STEP(auto r) {
    const __m512 scale = _mm512_set1_ps(c.scales[row + r]);
    finish16(w, block, total[r], scale, c.out_type, c.out, row + r);
  });
}

template <int Bits>
void stream_rows(const LinearCodes& c, const Part& part, int64_t block) {
  int64_t row = part.row_begin;
  for (; row + 8 <= part.row_end; row += 8) stream<8, Bits>(c, row, block);
  for (; row + 4 <= part.row_end; row += 4) stream<4, Bits>(c, row, block);
  for (; row + 2 <= part.row_end; row += 2) stream<2, Bits>(c, row, block);
  if (row < part.row_end) stream<1, Bits>(c, row, block);
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

template <int R, int B>
void tile(const LinearCodes& c, const Lines& lines, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  __m512i acc[R][B];
  start(c, row, 0, acc);
  group_sums(acc, lines.first, lines.block_bytes, lines.group_lines, c.padded + row * w.padded_k(),
             w.padded_k());
  repeat<R>(QPASS_STEP(auto r) {
    const __m512 scale = _mm512_set1_ps(c.scales[row + r]);
    repeat<B>(QPASS_STEP(auto b) {
      finish16(w, block + b, _mm512_cvtepi32_ps(acc[r][b]), scale, c.out_type, c.out, row + r);
    });
  });
}

// R * B is at most 12, so that the sums over groups stay in registers beside those of a group
template <int R, int B>
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
    group_sums(acc, line, lines.block_bytes, lines.group_lines, x, w.padded_k());
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

// `height` rows over B blocks, of 1 to kGroupedRows
template <int B, int R = kGroupedRows>
void grouped_rows(const LinearCodes& c, const Lines& lines, int64_t row, int64_t height,
                  int64_t block) {
  if constexpr (R > 1) {
    if (height < R) return grouped_rows<B, R - 1>(c, lines, row, height, block);
  }
  grouped_tile<R, B>(c, lines, row, block);
}

// all rows of a part over B blocks, the most rows at once that fit the registers
template <int B>
void rows(const LinearCodes& c, const Lines& lines, const Part& part, int64_t block) {
  const int64_t end = part.row_end;
  int64_t row = part.row_begin;
  if (c.weight.scales) {
    // tiles as equal as can be: one of few rows waits for its own sums, line after line
    for (int64_t tiles = (end - row + kGroupedRows - 1) / kGroupedRows; tiles > 0; --tiles) {
      const int64_t height = (end - row + tiles - 1) / tiles;
      grouped_rows<B>(c, lines, row, height, block);
      row += height;
    }
    return;
  }
  for (; row + 12 <= end; row += 12) tile<12, B>(c, lines, row, block);
  for (; row + 8 <= end; row += 8) tile<8, B>(c, lines, row, block);
  for (; row + 4 <= end; row += 4) tile<4, B>(c, lines, row, block);
  for (; row + 2 <= end; row += 2) tile<2, B>(c, lines, row, block);
  for (; row < end; ++row) tile<1, B>(c, lines, row, block);
}

template <int B>
void blocks(const LinearCodes& c, const Part& part, int64_t block, uint8_t* panel) {
  const Weight& w = c.weight;
  const uint8_t* first = w.lines + block * w.lines_per_block() * kLine;
  if (w.bits == 8) {
    rows<B>(c, {first, w.lines_per_block() * kLine, w.group_lines}, part, block);
    return;
  }
  unpack_lines(first, panel, B * w.lines_per_block());
  rows<B>(c, {panel, w.lines_per_block() * 2 * kLine, w.group_lines * 2}, part, block);
}

void run(const LinearCodes& c, const Part& part, void* memory) {
  uint8_t* panel = static_cast<uint8_t*>(memory);
  int64_t block = part.block_begin;
  if (streams(c)) {
    for (; block < part.block_end; ++block) {
      c.weight.bits == 4 ? stream_rows<4>(c, part, block) : stream_rows<8>(c, part, block);
    }
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
