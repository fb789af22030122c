// Rotating and quantizing a row, any machine.
#include "floats.hpp"

namespace qpass {
namespace {

// adding and taking away 1.5 * 2**23 rounds to the nearest integer, ties to even
constexpr float kRounder = 12582912.0f;
// the same bound as SMALLEST_ROW in qpass/ops/quantize.py: 2**-100
constexpr uint32_t kSmallestRow = 27u << 23;

const char* refuse(const Rows&) { return nullptr; }

// a row in double, and one block of it
size_t scratch(const Rows& c) { return static_cast<size_t>(2 * c.n) * sizeof(double); }

template <class T>
void butterflies(T* x, int64_t power) {
  for (int64_t half = 1; half < power; half *= 2) {
    for (int64_t first = 0; first < power; first += 2 * half) {
      for (int64_t i = first; i < first + half; ++i) {
        const T low = x[i], high = x[i + half];
        x[i] = low + high;
        x[i + half] = low - high;
      }
    }
  }
}

// x, one block read as [order, power], becomes factor.T @ x @ H
template <class T>
void transform(const Rows& c, T* x, T* mixed, T norm) {
  for (int64_t i = 0; i < c.order; ++i) butterflies(x + i * c.power, c.power);
  for (int64_t to = 0; to < c.order; ++to) {
    T* y = mixed + to * c.power;
    for (int64_t j = 0; j < c.power; ++j) y[j] = 0;
    for (int64_t from = 0; from < c.order; ++from) {
      const T f = load<T>(c.part_type, c.factor, from * c.order + to) * norm;
      for (int64_t j = 0; j < c.power; ++j) y[j] += f * x[from * c.power + j];
    }
  }
  for (int64_t i = 0; i < c.order * c.power; ++i) x[i] = mixed[i];
}

template <class T>
void load_row(const Rows& c, int64_t row, T* x, T* mixed) {
  for (int64_t i = 0; i < c.n; ++i) x[i] = load<T>(c.type, c.x, row * c.n + i);
  if (!c.signs) return;
  for (int64_t i = 0; i < c.n; ++i) x[i] *= load<T>(c.part_type, c.signs, i);
  const T norm = static_cast<T>(1.0 / __builtin_sqrt(static_cast<double>(c.power)));
  for (int64_t i = 0; i < c.n; i += c.order * c.power) transform<T>(c, x + i, mixed, norm);
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
  const float top = static_cast<float>((1 << (c.bits - 1)) - 1);
  const float to_codes = top / float_of(largest);
  c.scales[row] = float_of(largest) / top;
  for (int64_t i = 0; i < c.n; ++i) {
    float v = x[i] * to_codes;
    v = (v + kRounder) - kRounder;
    v = v > top ? top : v < -top ? -top : v;
    codes[i] = static_cast<int8_t>(v);
  }
}

template <class T>
void rotate(const Rows& c, int64_t row, void* memory) {
  T* x = static_cast<T*>(memory);
  load_row<T>(c, row, x, x + c.n);
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
      load_row<float>(c, row, x, x + c.n);
      quantize(c, row, x);
    }
  }
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Rows, rows) = {QPASS_NAME(rows), qpass::refuse, nullptr, qpass::scratch, qpass::run, 1,
                            nullptr};
