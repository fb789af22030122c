// Integer activations on AMX tiles: 32 rows by 32 outputs at a time, signed codes times stored
// (unsigned) weights.
#include "amx.hpp"
#include "codes_avx512.hpp"

namespace qpass {
namespace {

constexpr int64_t kRowsAtOnce = 2 * kTileRows;
constexpr int64_t kBlocksAtOnce = 2;
// below this, tiles are mostly empty and streaming the weights decides
constexpr int64_t kFewestRows = 16;

// A group in tiles: `count` tiles of `lines` 8-bit lines, the last filled up with zero lines. Codes
// read past the end of a group meet those zeros.
struct Shape {
  int64_t used, lines, count;
  explicit Shape(const Weight& w) {
    used = w.group_lines * (w.bits == 4 ? 2 : 1);
    lines = used < kTileRows ? used : kTileRows;
    count = (used + lines - 1) / lines;
  }
  int64_t bytes() const { return count * lines * kLine; }
  bool exact() const { return count * lines == used; }
};

const char* refuse(const LinearCodes& c) {
  if (c.out_type == Float::f64) return "it does not write float64";
  if (c.weight.bias && c.weight.bias_type == Float::f64) return "the bias is float64";
  if (c.m < kFewestRows) return "fewer rows than a tile has";
  return nullptr;
}

bool in_place(const LinearCodes& c) {
  return c.weight.padded_k() == c.weight.k && Shape(c.weight).exact();
}

// two blocks of lines for the tiles, the tiles' sums, and the sums over groups
constexpr int64_t kSums = 4 * kTileRows * kTileRows * 4;

size_t scratch(const LinearCodes& c) {
  const int64_t panel = kBlocksAtOnce * c.weight.groups * Shape(c.weight).bytes();
  return static_cast<size_t>(panel + 2 * kSums);
}

// one block as 8-bit lines, each group filled up to whole tiles
void fill_panel(const Weight& w, const Shape& shape, int64_t block, uint8_t* to) {
  const uint8_t* from = w.lines + block * w.lines_per_block() * kLine;
  for (int64_t g = 0; g < w.groups; ++g, to += shape.bytes(), from += w.group_lines * kLine) {
    if (w.bits == 4) {
      unpack_lines(from, to, w.group_lines);
    } else {
      __builtin_memcpy(to, from, static_cast<size_t>(w.group_lines * kLine));
    }
    const int64_t rest = shape.bytes() - shape.used * kLine;
    if (rest) __builtin_memset(to + shape.used * kLine, 0, static_cast<size_t>(rest));
  }
}

// the sums of products of one group for 32 rows and 2 blocks
void group_sums(const Shape& shape, const int8_t* x, int64_t row_bytes, const uint8_t* w0,
                const uint8_t* w1, int32_t* sums) {
  zero_2x2();
  for (int64_t t = 0; t < shape.count; ++t) {
    tile_load<kB0>(w0, kLine);
    tile_load<kA0>(x, row_bytes);
    tile_dot_su8<kC0, kA0, kB0>();
    tile_load<kB1>(w1, kLine);
    tile_dot_su8<kC1, kA0, kB1>();
    tile_load<kA1>(x + kTileRows * row_bytes, row_bytes);
    tile_dot_su8<kC2, kA1, kB0>();
    tile_dot_su8<kC3, kA1, kB1>();
    x += 4 * shape.lines;
    w0 += shape.lines * kLine;
    w1 += shape.lines * kLine;
  }
  store_2x2(sums);
}

// what the sums of group g add to 32 rows by 2 blocks, or the finished outputs without groups
void fold(const LinearCodes& c, int64_t row, int64_t rows, int64_t block, int64_t blocks, int64_t g,
          const int32_t* sums, float* total) {
  const Weight& w = c.weight;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (row + r) * w.groups + g;
    const __m512i start = _mm512_set1_epi32(c.starts[at]);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t tile = r / kTileRows * 2 + b;
      const int64_t place = (tile * kTileRows + r % kTileRows) * kTileRows;
      const __m512i products = _mm512_add_epi32(_mm512_load_si512(sums + place), start);
      if (!w.scales) {
        finish16(w, block + b, _mm512_cvtepi32_ps(products), _mm512_set1_ps(c.scales[row + r]),
                 c.out_type, c.out, row + r);
        continue;
      }
      const __m512 before = g ? _mm512_load_ps(total + place) : _mm512_setzero_ps();
      const int64_t scale = ((block + b) * w.groups + g) * kRows;
      const __m512 after = add_group(w, scale, before, products, c.sums[at]);
      if (g + 1 < w.groups) {
        _mm512_store_ps(total + place, after);
      } else {
        finish16(w, block + b, after, _mm512_set1_ps(c.scales[row + r]), c.out_type, c.out,
                 row + r);
      }
    }
  }
}

void run(const LinearCodes& c, const Part& part, void* memory) {
  const Weight& w = c.weight;
  const Shape shape(w);
  const int64_t block_bytes = w.groups * shape.bytes();
  int32_t* sums = static_cast<int32_t*>(memory);
  float* total = reinterpret_cast<float*>(static_cast<char*>(memory) + kSums);
  uint8_t* panel = static_cast<uint8_t*>(memory) + 2 * kSums;
  const bool direct = w.bits == 8 && shape.exact();
  const int64_t padded_group = w.group_lines * w.columns_per_line();
  configure_2x2(shape.lines);
  for (int64_t block = part.block_begin; block < part.block_end; block += kBlocksAtOnce) {
    // a last block alone is computed twice over, and written once
    const int64_t blocks = part.block_end - block < 2 ? 1 : 2;
    const uint8_t* first = direct ? w.lines + block * block_bytes : panel;
    for (int64_t b = 0; b < blocks && !direct; ++b) {
      fill_panel(w, shape, block + b, panel + b * block_bytes);
    }
    for (int64_t row = part.row_begin; row < part.row_end; row += kRowsAtOnce) {
      const int64_t left = part.row_end - row;
      const int64_t rows = left < kRowsAtOnce ? left : kRowsAtOnce;
      for (int64_t g = 0; g < w.groups; ++g) {
        const uint8_t* w0 = first + g * shape.bytes();
        const int8_t* x = c.padded + row * w.padded_k() + g * padded_group;
        group_sums(shape, x, w.padded_k(), w0, w0 + (blocks - 1) * block_bytes, sums);
        fold(c, row, rows, block, blocks, g, sums, total);
      }
    }
  }
  tile_release();
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(LinearCodes, linear_codes) = {
    QPASS_NAME(linear_codes), qpass::refuse,  qpass::prepare_codes, qpass::scratch, qpass::run,
    qpass::kRowsAtOnce,       qpass::in_place};
