// Float activations with AVX-512: codes become floats in registers for few rows, in a panel of 32
// outputs for many.
#include "real_avx512.hpp"

namespace qpass {
namespace {

// rows from which writing a panel beats decoding for every tile of rows
constexpr int64_t kPanelRows = 25;
// one row has fewer sums than products take cycles, unless it meets more blocks
constexpr int kSingleBlocks = 4;
constexpr int kPanelBlocks = 2;
constexpr int64_t kPanelWidth = kPanelBlocks * kRows;

const char* refuse(const LinearReal& c) {
  if (c.type == Float::f64) return "it does not compute in float64";
  if (c.weight.bias && c.weight.bias_type == Float::f64) return "the bias is float64";
  return nullptr;
}

size_t scratch(const LinearReal& c) {
  if (c.m < kPanelRows) return 0;
  return static_cast<size_t>(c.weight.padded_k() * kPanelWidth) * sizeof(float);
}

// fills padded and sums for some rows
void prepare(const LinearReal& c, int64_t row_begin, int64_t row_end) {
  const Weight& w = c.weight;
  const int64_t padded_width = w.group_lines * w.columns_per_line();
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < w.groups; ++g) {
      float* to = c.padded + row * w.padded_k() + g * padded_width;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t k = 0; k < padded_width; k += 16) {
        const int64_t left = w.width - k;
        const __mmask16 read = left > 0 ? first_lanes(left) : __mmask16(0);
        const __m512 v = load16(c.type, c.x, row * w.k + g * w.width + k, read);
        sum = _mm512_add_ps(sum, v);
        _mm512_mask_storeu_ps(to + k, first_lanes(padded_width - k), v);
      }
      c.sums[row * w.groups + g] = _mm512_reduce_add_ps(sum);
    }
  }
}

// R rows by B blocks straight from the packed lines
template <int R, int B, int Bits>
void direct(const LinearReal& c, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const int64_t block_bytes = w.lines_per_block() * kLine;
  const uint8_t* line = w.lines + block * block_bytes;
  const float* x = c.padded + row * w.padded_k();
  const __m512 values = decoded(w.zero);
  __m512 total[R][B];
  repeat<R>(
      QPASS_STEP(auto r) { repeat<B>(QPASS_STEP(auto b) { total[r][b] = _mm512_setzero_ps(); }); });
  for (int64_t g = 0; g < w.groups; ++g) {
    __m512 acc[R][B];
    repeat<R>(
        QPASS_STEP(auto r) { repeat<B>(QPASS_STEP(auto b) { acc[r][b] = _mm512_setzero_ps(); }); });
    for (int64_t l = 0; l < w.group_lines; ++l, line += kLine, x += w.columns_per_line()) {
      __m512i v[B];
      repeat<B>(QPASS_STEP(auto b) {
        const uint8_t* from = line + b * block_bytes;
        v[b] = load_line(from, Bits);
        _mm_prefetch(reinterpret_cast<const char*>(from + B * block_bytes), _MM_HINT_T1);
      });
      each_column<Bits>(QPASS_STEP(auto j) {
        repeat<B>(QPASS_STEP(auto b) {
          const __m512 q = column<Bits, j.value>(v[b], values);
          repeat<R>(QPASS_STEP(auto r) {
            const __m512 at = _mm512_set1_ps(x[r * w.padded_k() + j.value]);
            acc[r][b] = _mm512_fmadd_ps(q, at, acc[r][b]);
          });
        });
      });
    }
    repeat<B>(QPASS_STEP(auto b) {
      const int64_t at = ((block + b) * w.groups + g) * kRows;
      const __m512 s = w.scales ? half16(w.scales + at) : _mm512_set1_ps(1.0f);
      const __m512 m = w.offsets ? half16(w.offsets + at) : _mm512_setzero_ps();
      repeat<R>(QPASS_STEP(auto r) {
        total[r][b] = _mm512_fmadd_ps(acc[r][b], s, total[r][b]);
        if (!w.offsets) return;
        const __m512 sum = _mm512_set1_ps(c.sums[(row + r) * w.groups + g]);
        total[r][b] = _mm512_fmadd_ps(sum, m, total[r][b]);
      });
    });
  }
  repeat<R>(QPASS_STEP(auto r) {
    repeat<B>(QPASS_STEP(auto b) {
      finish16(w, block + b, total[r][b], _mm512_set1_ps(1.0f), c.type, c.out, row + r);
    });
  });
}

// one block of weights without its row scales, into one column of the panel
template <int Bits>
void decode(const Weight& w, int64_t block, float* panel) {
  decode_columns<Bits>(w, block, [&](int, __m512 v) {
    _mm512_store_ps(panel, v);
    panel += kPanelWidth;
  });
}

// R rows by B blocks from the panel
template <int R, int B>
void panel_tile(const LinearReal& c, const float* panel, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const int64_t k_end = w.padded_k();
  const float* x = c.padded + row * k_end;
  __m512 acc[R][B];
  repeat<R>(
      QPASS_STEP(auto r) { repeat<B>(QPASS_STEP(auto b) { acc[r][b] = _mm512_setzero_ps(); }); });
  for (int64_t k = 0; k < k_end; ++k, panel += kPanelWidth) {
    __m512 q[B];
    repeat<B>(QPASS_STEP(auto b) { q[b] = _mm512_load_ps(panel + b * kRows); });
    repeat<R>(QPASS_STEP(auto r) {
      const __m512 at = _mm512_set1_ps(x[r * k_end + k]);
      repeat<B>(QPASS_STEP(auto b) { acc[r][b] = _mm512_fmadd_ps(q[b], at, acc[r][b]); });
    });
  }
  repeat<R>(QPASS_STEP(auto r) {
    repeat<B>(QPASS_STEP(auto b) {
      finish16(w, block + b, acc[r][b], _mm512_set1_ps(1.0f), c.type, c.out, row + r);
    });
  });
}

template <int B, int Bits>
void direct_rows(const LinearReal& c, const Part& part, int64_t block) {
  int64_t row = part.row_begin;
  for (; row + 4 <= part.row_end; row += 4) direct<4, B, Bits>(c, row, block);
  for (; row + 2 <= part.row_end; row += 2) direct<2, B, Bits>(c, row, block);
  if (row < part.row_end) direct<1, B, Bits>(c, row, block);
}

template <int B>
void blocks(const LinearReal& c, const Part& part, int64_t block, float* panel) {
  const Weight& w = c.weight;
  int64_t row = part.row_begin;
  const int64_t end = part.row_end;
  if (c.m >= kPanelRows) {
    for (int b = 0; b < B; ++b) {
      w.bits == 4 ? decode<4>(w, block + b, panel + b * kRows)
                  : decode<8>(w, block + b, panel + b * kRows);
    }
    for (; row + 12 <= end; row += 12) panel_tile<12, B>(c, panel, row, block);
    for (; row + 6 <= end; row += 6) panel_tile<6, B>(c, panel, row, block);
    for (; row + 2 <= end; row += 2) panel_tile<2, B>(c, panel, row, block);
    for (; row < end; ++row) panel_tile<1, B>(c, panel, row, block);
    return;
  }
  w.bits == 4 ? direct_rows<B, 4>(c, part, block) : direct_rows<B, 8>(c, part, block);
}

void run(const LinearReal& c, const Part& part, void* memory) {
  float* panel = static_cast<float*>(memory);
  int64_t block = part.block_begin;
  if (c.m == 1) {
    for (; block + kSingleBlocks <= part.block_end; block += kSingleBlocks) {
      c.weight.bits == 4 ? direct<1, kSingleBlocks, 4>(c, part.row_begin, block)
                         : direct<1, kSingleBlocks, 8>(c, part.row_begin, block);
    }
  }
  for (; block + 2 <= part.block_end; block += 2) blocks<2>(c, part, block, panel);
  if (block < part.block_end) blocks<1>(c, part, block, panel);
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(LinearReal, linear_real) = {
    QPASS_NAME(linear_real), qpass::refuse, qpass::prepare, qpass::scratch, qpass::run, 1, nullptr};
