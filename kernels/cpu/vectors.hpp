// Sixteen lanes in plain C++: the vector types of GCC and Clang, which become whatever registers
// the machine has.
#pragma once

#include "floats.hpp"
#include "unroll.hpp"

namespace qpass {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

// 64 bytes from anywhere; a word holds the four bytes of one row, the first lowest
static inline Words load_words(const uint8_t* line) {
  Words w;
  __builtin_memcpy(&w, line, sizeof(w));
  return w;
}

static inline Floats to_floats(Words w) {
  typedef int32_t Integers __attribute__((vector_size(64)));
  return __builtin_convertvector(reinterpret_cast<Integers>(w), Floats);
}

static inline Floats load_halves(const uint16_t* p) {
  Floats v;
  for (int n = 0; n < kRows; ++n) v[n] = from_half(p[n]);
  return v;
}

// scale * row_scales * y + bias for the outputs of one block, 16 numbers of type T
template <class T>
static inline void finish(const Weight& w, int64_t block, const T* y, T scale, Float type,
                          void* out, int64_t row) {
  for (int64_t n = 0; n < kRows && block * kRows + n < w.n; ++n) {
    const int64_t channel = block * kRows + n;
    T v = y[n] * static_cast<T>(w.row_scales[channel]) * scale;
    if (w.bias) v += load<T>(w.bias_type, w.bias, channel);
    store<T>(type, out, row * w.n + channel, v);
  }
}

}  // namespace qpass
