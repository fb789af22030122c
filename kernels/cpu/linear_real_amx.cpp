// bfloat16 activations on AMX tiles: the weights of 32 outputs are decoded to bfloat16 once, then
// multiplied with 32 rows at a time.
#include "amx.hpp"
#include "real_avx512.hpp"

namespace qpass {
namespace {

constexpr int64_t kRowsAtOnce = 2 * kTileRows;
constexpr int64_t kBlocksAtOnce = 2;
constexpr int64_t kFewestRows = 16;
// columns of a tile: 16 lines of 2
constexpr int64_t kTileColumns = 32;
constexpr int64_t kSums = 4 * kTileRows * kTileRows * 4;

const char* refuse(const LinearReal& c) {
  if (c.type != Float::bf16) return "the input is not bfloat16";
  if (c.m < kFewestRows) return "fewer rows than a tile has";
  return nullptr;
}

int64_t tiles_across(const Weight& w) { return (w.padded_k() + kTileColumns - 1) / kTileColumns; }

int64_t row_width(const Weight& w) { return tiles_across(w) * kTileColumns; }

// bytes of one block of decoded weights: two numbers a lane
int64_t block_bytes(const Weight& w) { return row_width(w) / 2 * kLine; }

size_t scratch(const LinearReal& c) {
  return static_cast<size_t>(kSums + kBlocksAtOnce * block_bytes(c.weight));
}

// rows of bfloat16 in place of floats: groups padded with zeros, and zeros up to whole tiles, since
// a NaN read from elsewhere would survive a weight of zero
void prepare(const LinearReal& c, int64_t row_begin, int64_t row_end) {
  const Weight& w = c.weight;
  const int64_t padded_width = w.group_lines * w.columns_per_line();
  const uint16_t* x = static_cast<const uint16_t*>(c.x);
  uint16_t* padded = reinterpret_cast<uint16_t*>(c.padded);
  for (int64_t row = row_begin; row < row_end; ++row) {
    uint16_t* to = padded + row * row_width(w);
    __builtin_memset(to, 0, static_cast<size_t>(row_width(w)) * 2);
    for (int64_t g = 0; g < w.groups; ++g) {
      __builtin_memcpy(to + g * padded_width, x + row * w.k + g * w.width,
                       static_cast<size_t>(w.width) * 2);
    }
  }
}

template <int Bits>
void decode(const Weight& w, int64_t block, uint8_t* panel) {
  const uint8_t* end = panel + block_bytes(w);
  __m512 even;
  decode_columns<Bits>(w, block, [&](int j, __m512 v) {
    if (j % 2 == 0) {
      even = v;
      return;
    }
    const __m512i pair = _mm512_or_si512(bfloat_bits(even), _mm512_slli_epi32(bfloat_bits(v), 16));
    _mm512_store_si512(panel, pair);
    panel += kLine;
  });
  __builtin_memset(panel, 0, static_cast<size_t>(end - panel));
}

void run(const LinearReal& c, const Part& part, void* memory) {
  const Weight& w = c.weight;
  float* sums = static_cast<float*>(memory);
  uint8_t* panel = static_cast<uint8_t*>(memory) + kSums;
  const uint16_t* padded = reinterpret_cast<const uint16_t*>(c.padded);
  const int64_t row_bytes = row_width(w) * 2;
  configure_2x2(kTileRows);
  for (int64_t block = part.block_begin; block < part.block_end; block += kBlocksAtOnce) {
    const int64_t blocks = part.block_end - block < 2 ? 1 : 2;
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* to = panel + b * block_bytes(w);
      w.bits == 4 ? decode<4>(w, block + b, to) : decode<8>(w, block + b, to);
    }
    for (int64_t row = part.row_begin; row < part.row_end; row += kRowsAtOnce) {
      const char* x = reinterpret_cast<const char*>(padded + row * row_width(w));
      const uint8_t* w0 = panel;
      const uint8_t* w1 = panel + (blocks - 1) * block_bytes(w);
      zero_2x2();
      for (int64_t t = 0; t < tiles_across(w); ++t, x += 64, w0 += 1024, w1 += 1024) {
        tile_load<kB0>(w0, kLine);
        tile_load<kA0>(x, row_bytes);
        tile_dot_bf16<kC0, kA0, kB0>();
        tile_load<kB1>(w1, kLine);
        tile_dot_bf16<kC1, kA0, kB1>();
        tile_load<kA1>(x + kTileRows * row_bytes, row_bytes);
        tile_dot_bf16<kC2, kA1, kB0>();
        tile_dot_bf16<kC3, kA1, kB1>();
      }
      store_2x2(sums);
      for (int64_t r = 0; r < kRowsAtOnce && row + r < part.row_end; ++r) {
        for (int64_t b = 0; b < blocks; ++b) {
          const int64_t tile = r / kTileRows * 2 + b;
          const float* sum = sums + (tile * kTileRows + r % kTileRows) * kTileRows;
          finish16(w, block + b, _mm512_load_ps(sum), _mm512_set1_ps(1.0f), c.type, c.out, row + r);
        }
      }
    }
  }
  tile_release();
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(LinearReal, linear_real) = {
    QPASS_NAME(linear_real), qpass::refuse, qpass::prepare, qpass::scratch, qpass::run,
    qpass::kRowsAtOnce,      nullptr};
