// Reading and writing one number of each float type with plain C++.
#pragma once

#include "kernel.hpp"

namespace qpass {

// a float type that a template can take
template <Float F>
struct Type {
  static constexpr Float value = F;
};

static inline uint32_t bits_of(float v) {
  uint32_t u;
  __builtin_memcpy(&u, &v, 4);
  return u;
}

static inline float float_of(uint32_t u) {
  float v;
  __builtin_memcpy(&v, &u, 4);
  return v;
}

static inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x400u) return float_of(sign | ((rest << 13) + 0x38000000u));
  // a subnormal is its integer times 2**-24
  const float v = static_cast<float>(rest) * float_of(0x33800000u);
  return sign ? -v : v;
}

static inline uint16_t to_half(float v) {
  const uint32_t u = bits_of(v);
  const uint32_t sign = u >> 16 & 0x8000u;
  const uint32_t rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  // 65520 and above round to infinity
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (rest < 0x38800000u) {
    // adding 0.5 leaves the subnormal's integer, rounded to even, in the low bits
    const float shifted = float_of(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_of(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13));
}

static inline uint16_t to_bfloat(float v) {
  const uint32_t u = bits_of(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return static_cast<uint16_t>((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

template <class T>
static inline T load(Float type, const void* p, int64_t i) {
  switch (type) {
    case Float::f32:
      return static_cast<T>(static_cast<const float*>(p)[i]);
    case Float::f64:
      return static_cast<T>(static_cast<const double*>(p)[i]);
    case Float::bf16:
      return static_cast<T>(
          float_of(static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16));
    default:
      return static_cast<T>(from_half(static_cast<const uint16_t*>(p)[i]));
  }
}

template <class T>
static inline void store(Float type, void* p, int64_t i, T v) {
  switch (type) {
    case Float::f32:
      static_cast<float*>(p)[i] = static_cast<float>(v);
      return;
    case Float::f64:
      static_cast<double*>(p)[i] = static_cast<double>(v);
      return;
    case Float::bf16:
      static_cast<uint16_t*>(p)[i] = to_bfloat(static_cast<float>(v));
      return;
    default:
      static_cast<uint16_t*>(p)[i] = to_half(static_cast<float>(v));
      return;
  }
}

}  // namespace qpass
