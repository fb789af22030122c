// Rotating and quantizing a row, any machine.
#include "fronts.hpp"
#include "vectors.hpp"

namespace qpass {
namespace {

// adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even
constexpr float kRounder = 12582912.0f;
// the same bound as SMALLEST_ROW in qpass/ops/quantize.py: 2**-100
constexpr uint32_t kSmallestRow = 27u << 23;

const char* refuse(const Rows&) { return nullptr; }

// a row in double, one block of it, and the row as its front makes it
size_t scratch(const Rows& c) { return static_cast<size_t>(3 * c.n) * sizeof(double); }

// v with each lane and the one `Half` lanes away exchanged
template <int Half, class T>
QPASS_LANES Register<T> exchanged(Register<T> v) {
  constexpr int lanes = kRegisterBytes / sizeof(T);
  if constexpr (lanes == 8) {
    return __builtin_shufflevector(v, v, 0 ^ Half, 1 ^ Half, 2 ^ Half, 3 ^ Half, 4 ^ Half, 5 ^ Half,
                                   6 ^ Half, 7 ^ Half);
  } else if constexpr (lanes == 4) {
    return __builtin_shufflevector(v, v, 0 ^ Half, 1 ^ Half, 2 ^ Half, 3 ^ Half);
  } else {
    return __builtin_shufflevector(v, v, 0 ^ Half, 1 ^ Half);
  }
}

// all butterflies inside one register
template <class T>
QPASS_LANES void inside(T* x) {
  constexpr int lanes = kRegisterBytes / sizeof(T);
  Register<T> v;
  __builtin_memcpy(&v, x, sizeof(v));
  repeat<3>(QPASS_STEP(auto stage) {
    constexpr int half = 1 << stage.value;
    if constexpr (half < lanes) {
      // the upper of each pair counts negatively
      T signs[lanes];
      for (int n = 0; n < lanes; ++n) signs[n] = n & half ? T{-1} : T{1};
      Register<T> sign;
      __builtin_memcpy(&sign, signs, sizeof(sign));
      v = v * sign + exchanged<half, T>(v);
    }
  });
  __builtin_memcpy(x, &v, sizeof(v));
}

template <class T>
void butterflies(T* x, int64_t power) {
  constexpr int64_t lanes = kRegisterBytes / sizeof(T);
  const bool wide = power >= lanes;
  for (int64_t i = 0; wide && i < power; i += lanes) inside(x + i);
  for (int64_t half = wide ? lanes : 1; half < power; half *= 2) {
    for (int64_t first = 0; first < power; first += 2 * half) {
      T *lows = x + first, *highs = lows + half;
      for (int64_t i = 0; i < half; ++i) {
        const T low = lows[i], high = highs[i];
        lows[i] = low + high;
        highs[i] = low - high;
      }
    }
  }
}

// rows to .. to + R of mixed = norm * factor.T @ x, 16 columns from j
template <class T, int R>
void mix_tile(const Rows& c, const T* x, T* mixed, int64_t to, int64_t j, T norm) {
  Lanes<T> sums[R];
  repeat<R>(QPASS_STEP(auto r) { sums[r] = splat(T{0}); });
  for (int64_t from = 0; from < c.order; ++from) {
    const Lanes<T> v = load_lanes<T>(x + from * c.power + j);
    repeat<R>(QPASS_STEP(auto r) {
      add_product(sums[r], v, load<T>(c.part_type, c.factor, from * c.order + to + r));
    });
  }
  repeat<R>(QPASS_STEP(auto r) {
    Lanes<T> scaled = splat(T{0});
    add_product(scaled, sums[r], norm);
    store_lanes(mixed + (to + r) * c.power + j, scaled);
  });
}

template <class T>
void mix(const Rows& c, const T* x, T* mixed, T norm) {
  for (int64_t j = 0; c.power % 16 == 0 && j < c.power; j += 16) {
    int64_t to = 0;
    for (; to + 4 <= c.order; to += 4) mix_tile<T, 4>(c, x, mixed, to, j, norm);
    for (; to < c.order; ++to) mix_tile<T, 1>(c, x, mixed, to, j, norm);
  }
  if (c.power % 16 == 0) return;
  for (int64_t to = 0; to < c.order; ++to) {
    T* y = mixed + to * c.power;
    for (int64_t j = 0; j < c.power; ++j) y[j] = 0;
    for (int64_t from = 0; from < c.order; ++from) {
      const T f = load<T>(c.part_type, c.factor, from * c.order + to) * norm;
      for (int64_t j = 0; j < c.power; ++j) y[j] += f * x[from * c.power + j];
    }
  }
}

// one loop for each type, so that each is vectorised
template <class T>
void read(Float type, const void* from, int64_t first, int64_t count, T* to) {
  const auto all = [=](Float known) {
    for (int64_t i = 0; i < count; ++i) to[i] = load<T>(known, from, first + i);
  };
  switch (type) {
    case Float::f32:
      return all(Float::f32);
    case Float::f64:
      return all(Float::f64);
    case Float::bf16:
      return all(Float::bf16);
    default:
      return all(Float::f16);
  }
}

// the row, transformed: in x; `memory` is that of a row in double
template <class T>
void load_row(const Rows& c, int64_t row, T* x, T* mixed, void* memory) {
  if (c.front == Front::plain) {
    read<T>(c.type, c.x, row * c.x_row, c.n, x);
  } else if (c.type == Float::f64) {
    front(c, row, static_cast<double*>(memory), x);
  } else {
    front(c, row, static_cast<float*>(memory), x);
  }
  if (!c.signs) return;
  read<T>(c.part_type, c.signs, 0, c.n, mixed);
  for (int64_t i = 0; i < c.n; ++i) x[i] *= mixed[i];
  const T norm = static_cast<T>(1.0 / __builtin_sqrt(static_cast<double>(c.power)));
  const int64_t block = c.order * c.power;
  for (int64_t i = 0; i < c.n; i += c.power) butterflies(x + i, c.power);
  for (int64_t i = 0; i < c.n; i += block) {
    mix<T>(c, x + i, mixed, norm);
    __builtin_memcpy(x + i, mixed, static_cast<size_t>(block) * sizeof(T));
  }
}

void quantize(const Rows& c, int64_t row, const float* x) {
  uint32_t largest = 0;
  // magnitudes of floats order like their bits, with infinities and NaNs on top
  for (int64_t i = 0; i < c.n; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffffu;
    largest = largest > magnitude ? largest : magnitude;
  }
  int8_t* codes = c.codes + row * c.n;
  if (largest < kSmallestRow || largest >= 0x7f800000u) {
    for (int64_t i = 0; i < c.n; ++i) codes[i] = 0;
    c.scales[row] = largest < kSmallestRow ? 0.0f : float_of(0x7fc00000u);
    return;
  }
  const float low = static_cast<float>(c.low), high = static_cast<float>(c.high);
  const float reach = float_of(largest) * c.clip;
  const float to_codes = high / reach;
  c.scales[row] = reach / high;
  const int64_t count = c.n;
  for (int64_t i = 0; i < count; ++i) {
    float code = x[i] * to_codes;
    code = code < low ? low : code;
    code = code > high ? high : code;
    const float rounded = (code + kRounder) - kRounder;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>(rounded));
  }
}

template <class T>
void rotate(const Rows& c, int64_t row, void* memory) {
  T* x = static_cast<T*>(memory);
  load_row<T>(c, row, x, x + c.n, static_cast<double*>(memory) + 2 * c.n);
  for (int64_t i = 0; i < c.n; ++i) store<T>(c.type, c.out, row * c.n + i, x[i]);
}

void run(const Rows& c, const Part& part, void* memory) {
  for (int64_t row = part.row_begin; row < part.row_end; ++row) {
    if (c.out && c.type == Float::f64) {
      rotate<double>(c, row, memory);
    } else if (c.out) {
      rotate<float>(c, row, memory);
    } else {
      float* x = static_cast<float*>(memory);
      load_row<float>(c, row, x, x + c.n, static_cast<double*>(memory) + 2 * c.n);
      quantize(c, row, x);
    }
  }
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Rows, rows) = {QPASS_NAME(rows), qpass::refuse, nullptr, qpass::scratch, qpass::run, 1,
                            nullptr};
