// What a row is made of before it is transformed, in plain C++.
#pragma once

#include "floats.hpp"

namespace qpass {

template <class T>
static inline T rounded(Float type, T v) {
  if (type == Float::bf16) {
    return static_cast<T>(float_of(static_cast<uint32_t>(to_bfloat(static_cast<float>(v))) << 16));
  }
  return type == Float::f16 ? static_cast<T>(from_half(to_half(static_cast<float>(v)))) : v;
}

// sums in 16 parts, which compilers vectorise
template <class T, class F>
static inline T sum_of(int64_t count, const F& term) {
  constexpr int kParts = 16;
  T parts[kParts] = {};
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts) {
    for (int p = 0; p < kParts; ++p) parts[p] += term(i + p);
  }
  T total = 0;
  for (; i < count; ++i) total += term(i);
  for (int p = 0; p < kParts; ++p) total += parts[p];
  return total;
}

static inline float root(float v) { return __builtin_sqrtf(v); }
static inline double root(double v) { return __builtin_sqrt(v); }
static inline float exponential(float v) { return __builtin_expf(v); }
static inline double exponential(double v) { return __builtin_exp(v); }
static inline float upper(float v) { return __builtin_erfcf(v); }
static inline double upper(double v) { return __builtin_erfc(v); }

template <class T>
static inline T gate_of(Gate gate, T v) {
  switch (gate) {
    case Gate::silu:
      return v / (1 + exponential(-v));
    case Gate::gelu:
      return v * T(0.5) * upper(v * T(-0.70710678118654752));
    case Gate::gelu_tanh:
      // 1 + tanh(u) is 2 / (1 + exp(-2 u))
      return v / (1 + exponential(T(-1.5957691216057308) * (v + T(0.044715) * v * v * v)));
    default:
      // a NaN stays one
      return v < 0 ? T(0) : v;
  }
}

// `row` as its front makes it, computed in v of a row
template <class T, class Out>
static void front(const Rows& c, int64_t row, T* v, Out* out) {
  const int64_t n = c.n;
  for (int64_t i = 0; i < n; ++i) v[i] = load<T>(c.type, c.x, row * c.x_row + i);
  const auto other = [&](int64_t i) { return load<T>(c.type, c.other, row * c.other_row + i); };
  if (c.front == Front::gated) {
    for (int64_t i = 0; i < n; ++i) {
      T g = rounded(c.type, gate_of(c.gate, v[i]));
      if (c.other) g = rounded(c.type, g * other(i));
      out[i] = static_cast<Out>(g);
    }
    return;
  }
  if (c.other) {
    for (int64_t i = 0; i < n; ++i) v[i] = rounded(c.type, v[i] + other(i));
    for (int64_t i = 0; i < n; ++i) store<T>(c.type, c.sum, row * n + i, v[i]);
  }
  const T count = static_cast<T>(n);
  const T mean = c.centred ? sum_of<T>(n, [&](int64_t i) { return v[i]; }) / count : T(0);
  const T squares = sum_of<T>(n, [&](int64_t i) { return (v[i] - mean) * (v[i] - mean); });
  const T norm = 1 / root(squares / count + static_cast<T>(c.eps));
  for (int64_t i = 0; i < n; ++i) {
    T y = (v[i] - mean) * norm;
    if (c.norm_scale) y *= load<T>(c.type, c.norm_scale, i);
    if (c.norm_shift) y += load<T>(c.type, c.norm_shift, i);
    out[i] = static_cast<Out>(rounded(c.type, y));
  }
}

}  // namespace qpass
