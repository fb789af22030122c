// Float activations, any machine: 16 float lanes per block, which compilers vectorise.
#include "floats.hpp"

namespace qpass {
namespace {

const char* refuse(const LinearReal&) { return nullptr; }

size_t scratch(const LinearReal&) { return 0; }

float code(const Weight& w, const uint8_t* line, int n, int64_t k) {
  const uint8_t byte = line[4 * n + k % 4];
  if (w.bits == 8) return static_cast<float>(byte - w.zero);
  return static_cast<float>((k < 4 ? byte & 15 : byte >> 4) - w.zero);
}

template <class T>
void one(const LinearReal& c, int64_t row, int64_t block) {
  const Weight& w = c.weight;
  const uint8_t* line = w.lines + block * w.lines_per_block() * kLine;
  T total[kRows] = {};
  for (int64_t g = 0; g < w.groups; ++g) {
    T acc[kRows] = {};
    T sum = 0;
    for (int64_t l = 0; l < w.group_lines; ++l, line += kLine) {
      const int64_t first = l * w.columns_per_line();
      for (int64_t j = 0; j < w.columns_per_line() && first + j < w.width; ++j) {
        const T x = load<T>(c.type, c.x, row * w.k + g * w.width + first + j);
        sum += x;
        for (int n = 0; n < kRows; ++n) acc[n] += x * static_cast<T>(code(w, line, n, j));
      }
    }
    const int64_t at = (block * w.groups + g) * kRows;
    for (int n = 0; n < kRows; ++n) {
      const T s = w.scales ? static_cast<T>(from_half(w.scales[at + n])) : T{1};
      total[n] += s * acc[n];
      if (w.offsets) total[n] += static_cast<T>(from_half(w.offsets[at + n])) * sum;
    }
  }
  for (int n = 0; n < kRows && block * kRows + n < w.n; ++n) {
    const int64_t channel = block * kRows + n;
    T y = total[n] * static_cast<T>(w.row_scales[channel]);
    if (w.bias) y += load<T>(w.bias_type, w.bias, channel);
    store<T>(c.type, c.out, row * w.n + channel, y);
  }
}

void run(const LinearReal& c, const Part& part, void*) {
  for (int64_t block = part.block_begin; block < part.block_end; ++block) {
    for (int64_t row = part.row_begin; row < part.row_end; ++row) {
      if (c.type == Float::f64) {
        one<double>(c, row, block);
      } else {
        one<float>(c, row, block);
      }
    }
  }
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(LinearReal, linear_real) = {
    QPASS_NAME(linear_real), qpass::refuse, nullptr, qpass::scratch, qpass::run, 1, nullptr};
