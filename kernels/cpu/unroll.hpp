// Loops that are gone before the compiler looks: every index is a constant, so that arrays of
// vector registers stay in registers. (Loops unrolled by a pragma come too late for that in GCC.)
#pragma once

namespace qpass {

// a number that a template can take; the standard library's stays out of these files
template <int J>
struct Constant {
  static constexpr int value = J;
  constexpr operator int() const { return J; }
};

// f(Constant<0>) .. f(Constant<N - 1>)
template <int N, int J = 0, class F>
static inline __attribute__((always_inline)) void repeat(const F& f) {
  if constexpr (J < N) {
    f(Constant<J>{});
    repeat<N, J + 1>(f);
  }
}

}  // namespace qpass

#define QPASS_INLINE static inline __attribute__((always_inline))

// the body of a repeated step
#define QPASS_STEP(...) [&](__VA_ARGS__) __attribute__((always_inline))
