// Float activations, any machine: a block of 16 outputs is decoded to floats once, then multiplied
// with all rows.
#include "vectors.hpp"

namespace qpass {
namespace {

const char* refuse(const LinearReal&) { return nullptr; }

size_t scratch(const LinearReal& c) {
  return static_cast<size_t>(c.weight.padded_k() * kRows) * sizeof(double);
}

// rows in the type of computing (double where x is), each group padded by zeros
template <class T>
void widen(const LinearReal& c, int64_t row_begin, int64_t row_end) {
  const Weight& w = c.weight;
  const int64_t padded_width = w.group_lines * w.columns_per_line();
  for (int64_t row = row_begin; row < row_end; ++row) {
    T* to = reinterpret_cast<T*>(c.padded) + row * w.padded_k();
    for (int64_t g = 0; g < w.groups; ++g, to += padded_width) {
      for (int64_t k = 0; k < padded_width; ++k) {
        to[k] = k < w.width ? load<T>(c.type, c.x, row * w.k + g * w.width + k) : T{0};
      }
    }
  }
}

void prepare(const LinearReal& c, int64_t row_begin, int64_t row_end) {
  c.type == Float::f64 ? widen<double>(c, row_begin, row_end) : widen<float>(c, row_begin, row_end);
}

template <class T>
QPASS_LANES Lanes<T> converted(const Lanes<float>& v) {
  float from[kRows];
  T to[kRows];
  store_lanes(from, v);
  for (int n = 0; n < kRows; ++n) to[n] = static_cast<T>(from[n]);
  return load_lanes<T>(to);
}

// scale * (stored - zero) + offset, for the 16 rows of each column
template <class T, int Bits>
void decode(const Weight& w, int64_t block, T* panel) {
  const uint8_t* line = w.lines + block * w.lines_per_block() * kLine;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t at = (block * w.groups + g) * kRows;
    const Lanes<T> scale = converted<T>(w.scales ? load_halves(w.scales + at) : splat(1.0f));
    const Lanes<T> offset = converted<T>(w.offsets ? load_halves(w.offsets + at) : splat(0.0f));
    for (int64_t l = 0; l < w.group_lines; ++l, line += kLine) {
      const Lanes<uint32_t> words = load_lanes<uint32_t>(line);
      repeat<Bits == 4 ? 8 : 4>(QPASS_STEP(auto j) {
        constexpr int shift = 8 * (j.value % 4) + (j.value < 4 ? 0 : 4);
        const Lanes<uint32_t> stored = bits_from(words, shift, Bits == 4 ? 15u : 255u);
        Lanes<float> q = to_floats(stored);
        repeat<Lanes<float>::kParts>(
            QPASS_STEP(auto i) { q.part[i] = q.part[i] - static_cast<float>(w.zero); });
        Lanes<T> value = offset;
        add_product(value, converted<T>(q), scale);
        store_lanes(panel, value);
        panel += kRows;
      });
    }
  }
}

template <class T, int R>
void tile(const LinearReal& c, const T* panel, int64_t row, int64_t block) {
  const int64_t k_end = c.weight.padded_k();
  const T* x = reinterpret_cast<const T*>(c.padded) + row * k_end;
  Lanes<T> total[R];
  repeat<R>(QPASS_STEP(auto r) { total[r] = splat(T{0}); });
  for (int64_t k = 0; k < k_end; ++k, panel += kRows) {
    const Lanes<T> q = load_lanes<T>(panel);
    repeat<R>(QPASS_STEP(auto r) { add_product(total[r], q, x[r * k_end + k]); });
  }
  repeat<R>(QPASS_STEP(auto r) {
    T y[kRows];
    store_lanes(y, total[r]);
    finish<T>(c.weight, block, y, T{1}, c.type, c.out, row + r);
  });
}

template <class T>
void blocks(const LinearReal& c, const Part& part, void* memory) {
  T* panel = static_cast<T*>(memory);
  for (int64_t block = part.block_begin; block < part.block_end; ++block) {
    c.weight.bits == 4 ? decode<T, 4>(c.weight, block, panel)
                       : decode<T, 8>(c.weight, block, panel);
    int64_t row = part.row_begin;
    for (; row + 4 <= part.row_end; row += 4) tile<T, 4>(c, panel, row, block);
    for (; row < part.row_end; ++row) tile<T, 1>(c, panel, row, block);
  }
}

void run(const LinearReal& c, const Part& part, void* memory) {
  c.type == Float::f64 ? blocks<double>(c, part, memory) : blocks<float>(c, part, memory);
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(LinearReal, linear_real) = {
    QPASS_NAME(linear_real), qpass::refuse, qpass::prepare, qpass::scratch, qpass::run, 1, nullptr};
