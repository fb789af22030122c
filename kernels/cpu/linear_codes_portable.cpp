// Integer activations, any machine: sixteen 32-bit lanes, one byte of a line after another.
#include "vectors.hpp"

namespace qpass {
namespace {

const char* refuse(const LinearCodes&) { return nullptr; }

size_t scratch(const LinearCodes&) { return 0; }

void prepare(const LinearCodes& c, int64_t row_begin, int64_t row_end) {
  const Weight& w = c.weight;
  const int64_t padded_width = w.group_lines * w.columns_per_line();
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int64_t g = 0; g < w.groups; ++g) {
      const int8_t* from = c.codes + row * w.k + g * w.width;
      int32_t sum = 0;
      for (int64_t k = 0; k < w.width; ++k) sum += from[k];
      c.sums[row * w.groups + g] = static_cast<float>(sum);
      c.starts[row * w.groups + g] = -w.zero * sum;
      int8_t* to = c.padded + row * w.padded_k() + g * padded_width;
      if (to == from) continue;
      for (int64_t k = 0; k < padded_width; ++k) to[k] = k < w.width ? from[k] : int8_t{0};
    }
  }
}

// sums += stored values of one line times the codes of R rows; unsigned, because a sum may wrap
// before its start has been taken off
template <int R, int Bits>
QPASS_LANES void add_line(const uint8_t* line, const int8_t* x, int64_t row_bytes,
                          Lanes<uint32_t> (&sums)[R]) {
  const Lanes<uint32_t> words = load_lanes<uint32_t>(line);
  repeat<Bits == 4 ? 8 : 4>(QPASS_STEP(auto j) {
    constexpr int shift = 8 * (j.value % 4) + (j.value < 4 ? 0 : 4);
    const Lanes<uint32_t> values = bits_from(words, shift, Bits == 4 ? 15u : 255u);
    repeat<R>(QPASS_STEP(auto r) {
      add_product(sums[r], values, static_cast<uint32_t>(int32_t{x[r * row_bytes + j]}));
    });
  });
}

// total + a * b, rounded once, as the instructions of other sets round it. The product of a float
// and a half is exact in double. Their sum is rounded to odd there: so much longer than a float, it
// then rounds to the float that the exact sum rounds to.
QPASS_LANES float fused(float a, float b, float total) {
#if defined(__FP_FAST_FMAF)
  return __builtin_fmaf(a, b, total);
#else
  const double product = static_cast<double>(a) * b, sum = total + product;
  const double back = sum - total, lost = (total - (sum - back)) + (product - back);
  int64_t bits;
  __builtin_memcpy(&bits, &sum, sizeof(bits));
  // no comparison holds where the sum is not finite
  const int64_t even = (lost > 0 || lost < 0) ? ~bits & 1 : 0;
  bits += (lost > 0) == (sum > 0) ? even : -even;
  double odd;
  __builtin_memcpy(&odd, &bits, sizeof(odd));
  return static_cast<float>(odd);
#endif
}

template <int R, int Bits>
void tile(const LinearCodes& c, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const uint8_t* line = w.lines + block * w.lines_per_block() * kLine;
  const int8_t* x = c.padded + row * w.padded_k();
  float total[R][kRows] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    Lanes<uint32_t> sums[R];
    repeat<R>(QPASS_STEP(auto r) {
      sums[r] = splat(static_cast<uint32_t>(c.starts[(row + r) * w.groups + g]));
    });
    for (int64_t l = 0; l < w.group_lines; ++l, line += kLine, x += w.columns_per_line()) {
      add_line<R, Bits>(line, x, w.padded_k(), sums);
    }
    const int64_t at = (block * w.groups + g) * kRows;
    float s[kRows], m[kRows];
    store_lanes(s, w.scales ? load_halves(w.scales + at) : splat(1.0f));
    store_lanes(m, w.offsets ? load_halves(w.offsets + at) : splat(0.0f));
    for (int r = 0; r < R; ++r) {
      float y[kRows];
      store_lanes(y, to_floats(sums[r]));
      for (int n = 0; n < kRows; ++n) total[r][n] = fused(y[n], s[n], total[r][n]);
      if (!w.offsets) continue;
      const float sum = c.sums[(row + r) * w.groups + g];
      for (int n = 0; n < kRows; ++n) total[r][n] = fused(sum, m[n], total[r][n]);
    }
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
