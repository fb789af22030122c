// Sixteen lanes in plain C++: the vector types of GCC and Clang, in pieces as wide as the machine's
// registers (wider ones are taken apart through memory by GCC).
#pragma once

#include "floats.hpp"
#include "unroll.hpp"

namespace qpass {

#if defined(__AVX2__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

template <class T>
using Register __attribute__((vector_size(kRegisterBytes))) = T;

#define QPASS_LANES static inline __attribute__((always_inline))

template <class T>
struct Lanes {
  static constexpr int kParts = 16 * static_cast<int>(sizeof(T)) / kRegisterBytes;
  Register<T> part[kParts];
};

template <class T>
QPASS_LANES Lanes<T> splat(T v) {
  Lanes<T> out;
  repeat<Lanes<T>::kParts>(QPASS_STEP(auto i) { out.part[i] = Register<T>{} + v; });
  return out;
}

// sixteen numbers from anywhere
template <class T>
QPASS_LANES Lanes<T> load_lanes(const void* from) {
  Lanes<T> out;
  repeat<Lanes<T>::kParts>(QPASS_STEP(auto i) {
    Register<T> v;
    __builtin_memcpy(&v, static_cast<const char*>(from) + i * kRegisterBytes, sizeof(v));
    out.part[i] = v;
  });
  return out;
}

template <class T>
QPASS_LANES void store_lanes(T* to, const Lanes<T>& v) {
  repeat<Lanes<T>::kParts>(QPASS_STEP(auto i) {
    const Register<T> part = v.part[i];
    __builtin_memcpy(reinterpret_cast<char*>(to) + i * kRegisterBytes, &part, sizeof(part));
  });
}

// sums += a * b
template <class T>
QPASS_LANES void add_product(Lanes<T>& sums, const Lanes<T>& a, T b) {
  repeat<Lanes<T>::kParts>(QPASS_STEP(auto i) { sums.part[i] += a.part[i] * b; });
}

template <class T>
QPASS_LANES void add_product(Lanes<T>& sums, const Lanes<T>& a, const Lanes<T>& b) {
  repeat<Lanes<T>::kParts>(QPASS_STEP(auto i) { sums.part[i] += a.part[i] * b.part[i]; });
}

// `mask` bits of every word from bit `shift`; a word of a line holds the bytes of one row, the
// first lowest
QPASS_LANES Lanes<uint32_t> bits_from(const Lanes<uint32_t>& words, int shift, uint32_t mask) {
  Lanes<uint32_t> out;
  repeat<Lanes<uint32_t>::kParts>(
      QPASS_STEP(auto i) { out.part[i] = words.part[i] >> shift & mask; });
  return out;
}

// words read as signed integers
QPASS_LANES Lanes<float> to_floats(const Lanes<uint32_t>& words) {
  Lanes<float> out;
  repeat<Lanes<float>::kParts>(QPASS_STEP(auto i) {
    const Register<int32_t> integers = reinterpret_cast<Register<int32_t>>(words.part[i]);
    out.part[i] = __builtin_convertvector(integers, Register<float>);
  });
  return out;
}

QPASS_LANES Lanes<float> load_halves(const uint16_t* p) {
  float v[kRows];
  for (int n = 0; n < kRows; ++n) v[n] = from_half(p[n]);
  return load_lanes<float>(v);
}

// scale * row_scales * y + bias for the outputs of one block
template <class T>
static __attribute__((noinline)) void finish(const Weight& w, int64_t block, const T* y, T scale,
                                             Float type, void* out, int64_t row) {
  for (int64_t n = 0; n < kRows && block * kRows + n < w.n; ++n) {
    const int64_t channel = block * kRows + n;
    T v = y[n] * static_cast<T>(w.row_scales[channel]) * scale;
    if (w.bias) v += load<T>(w.bias_type, w.bias, channel);
    store<T>(type, out, row * w.n + channel, v);
  }
}

}  // namespace qpass
