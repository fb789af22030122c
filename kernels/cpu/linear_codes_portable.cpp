// Integer activations, any machine: 16 int32 lanes per block, which compilers vectorise.
#include "floats.hpp"

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

// lanes of four stored values, byte by byte, times four codes
void add_line8(uint32_t* acc, const uint8_t* line, const int8_t* x) {
  for (int n = 0; n < kRows; ++n) {
    uint32_t s = acc[n];
    for (int j = 0; j < 4; ++j) s += static_cast<uint32_t>(line[4 * n + j] * x[j]);
    acc[n] = s;
  }
}

void add_line4(uint32_t* acc, const uint8_t* line, const int8_t* x) {
  for (int n = 0; n < kRows; ++n) {
    uint32_t s = acc[n];
    for (int j = 0; j < 4; ++j) {
      s += static_cast<uint32_t>((line[4 * n + j] & 15) * x[j]);
      s += static_cast<uint32_t>((line[4 * n + j] >> 4) * x[4 + j]);
    }
    acc[n] = s;
  }
}

void one(const LinearCodes& c, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const uint8_t* line = w.lines + block * w.lines_per_block() * kLine;
  const int8_t* x = c.padded + row * w.padded_k();
  float total[kRows] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    // unsigned, because the sum may wrap before the start is taken off it
    uint32_t acc[kRows];
    for (uint32_t& a : acc) a = static_cast<uint32_t>(c.starts[row * w.groups + g]);
    for (int64_t l = 0; l < w.group_lines; ++l, line += kLine, x += w.columns_per_line()) {
      if (w.bits == 4) {
        add_line4(acc, line, x);
      } else {
        add_line8(acc, line, x);
      }
    }
    const int64_t at = (block * w.groups + g) * kRows;
    const float sum = c.sums[row * w.groups + g];
    for (int n = 0; n < kRows; ++n) {
      const float s = w.scales ? from_half(w.scales[at + n]) : 1.0f;
      total[n] += s * static_cast<float>(static_cast<int32_t>(acc[n]));
      if (w.offsets) total[n] += from_half(w.offsets[at + n]) * sum;
    }
  }
  for (int n = 0; n < kRows && block * kRows + n < w.n; ++n) {
    const int64_t channel = block * kRows + n;
    float y = total[n] * w.row_scales[channel] * c.scales[row];
    if (w.bias) y += load<float>(w.bias_type, w.bias, channel);
    store<float>(c.out_type, c.out, row * w.n + channel, y);
  }
}

void run(const LinearCodes& c, const Part& part, void*) {
  for (int64_t block = part.block_begin; block < part.block_end; ++block) {
    for (int64_t row = part.row_begin; row < part.row_end; ++row) one(c, row, block);
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
