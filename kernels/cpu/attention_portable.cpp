// Attention on any machine, in float32 or float64.
#include "attention.hpp"
#include "vectors.hpp"

namespace qpass {
namespace {

// the integer as wide as a number
template <int Bytes>
struct Bits {
  using Word = uint32_t;
};
template <>
struct Bits<8> {
  using Word = uint64_t;
};

template <class Number>
struct Plain {
  using T = Number;
  using Vec = Lanes<T>;
  static constexpr bool kDouble = sizeof(T) == 8;
  using Word = typename Bits<sizeof(T)>::Word;
  static constexpr Float kType = kDouble ? Float::f64 : Float::f32;
  // as many sums as registers hold
  static constexpr int kRows = (kRegisterBytes == 32 ? 6 : 3) / (kDouble ? 2 : 1);
  static constexpr int kColumns = 1;
  // e**x is no normal number there, so that times_power gives 0
  static constexpr double kLowest = kDouble ? -720 : -90;
  static constexpr int kTerms = kDouble ? 13 : 7;
  // adding and taking away 1.5 * 2**(bits of the fraction) rounds to an integer, which lies in the
  // lowest bits in between
  static constexpr int kFraction = kDouble ? 52 : 23;
  static constexpr T kRounder = static_cast<T>(kDouble ? 6755399441055744.0 : 12582912.0);

  template <class F>
  QPASS_INLINE Vec each(const F& f) {
    Vec out;
    repeat<Vec::kParts>(QPASS_STEP(auto i) { out.part[i] = f(i); });
    return out;
  }

  QPASS_INLINE Vec splat(T v) { return qpass::splat<T>(v); }
  QPASS_INLINE Vec load(const T* p) { return load_lanes<T>(p); }
  QPASS_INLINE void store(T* p, const Vec& v) { store_lanes(p, v); }
  QPASS_INLINE Vec plus(const Vec& a, const Vec& b) {
    return each(QPASS_STEP(auto i) { return a.part[i] + b.part[i]; });
  }
  QPASS_INLINE Vec minus(const Vec& a, const Vec& b) {
    return each(QPASS_STEP(auto i) { return a.part[i] - b.part[i]; });
  }
  QPASS_INLINE Vec times(const Vec& a, const Vec& b) {
    return each(QPASS_STEP(auto i) { return a.part[i] * b.part[i]; });
  }
  QPASS_INLINE Vec product(const Vec& a, const Vec& b, const Vec& c) {
    return each(QPASS_STEP(auto i) { return a.part[i] * b.part[i] + c.part[i]; });
  }
  QPASS_INLINE Vec negative(const Vec& a) {
    return each(QPASS_STEP(auto i) { return -a.part[i]; });
  }
  // the second where one is NaN
  QPASS_INLINE Vec larger(const Vec& a, const Vec& b) {
    return each(QPASS_STEP(auto i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
  }
  QPASS_INLINE Vec rounded(const Vec& a) {
    return each(QPASS_STEP(auto i) { return a.part[i] + kRounder - kRounder; });
  }
  // a * 2**n for n <= 0, or 0 where that is no normal number
  QPASS_INLINE Vec times_power(const Vec& a, const Vec& n) {
    constexpr int bias = kDouble ? 1023 : 127;
    return each(QPASS_STEP(auto i) {
      const Register<Word> raised = reinterpret_cast<Register<Word>>(n.part[i] + kRounder);
      const Register<Word> bits = (raised + static_cast<Word>(bias)) << kFraction;
      const Register<T> y = a.part[i] * reinterpret_cast<Register<T>>(bits);
      return n.part[i] < static_cast<T>(1 - bias) ? Register<T>{} : y;
    });
  }
  QPASS_INLINE Vec choose(uint32_t bits, const Vec& a, const Vec& b) {
    T x[16], y[16];
    store(x, a);
    store(y, b);
    for (int i = 0; i < 16; ++i) x[i] = bits >> i & 1 ? x[i] : y[i];
    return load(x);
  }
  QPASS_INLINE T first(const Vec& a) { return a.part[0][0]; }
  QPASS_INLINE T largest_of(const Vec& a) {
    T x[16];
    store(x, a);
    for (int half = 8; half; half /= 2) {
      for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
    }
    return x[0];
  }
  QPASS_INLINE T sum_of(const Vec& a) {
    T x[16];
    store(x, a);
    for (int half = 8; half; half /= 2) {
      for (int i = 0; i < half; ++i) x[i] += x[i + half];
    }
    return x[0];
  }

  // up to sixteen numbers, zeros behind them
  template <Float F>
  QPASS_INLINE Vec read(const void* p, int64_t i, int64_t count) {
    if (F == kType && count >= 16) return load(static_cast<const T*>(p) + i);
    T x[16] = {};
    if (count >= 16) {
      for (int j = 0; j < 16; ++j) x[j] = qpass::load<T>(F, p, i + j);
    } else {
      for (int64_t j = 0; j < count; ++j) x[j] = qpass::load<T>(F, p, i + j);
    }
    return load(x);
  }
  static Vec read(Float type, const void* p, int64_t i, int64_t count) {
    switch (type) {
      case Float::f32:
        return read<Float::f32>(p, i, count);
      case Float::f64:
        return read<Float::f64>(p, i, count);
      case Float::bf16:
        return read<Float::bf16>(p, i, count);
      default:
        return read<Float::f16>(p, i, count);
    }
  }
  static void write(Float type, void* p, int64_t i, int64_t count, const Vec& v) {
    T x[16];
    store(x, v);
    for (int64_t j = 0; j < 16 && j < count; ++j) qpass::store<T>(type, p, i + j, x[j]);
  }

  // the sums of four vectors
  QPASS_INLINE void store_sums(T* to, const Vec* v) {
    constexpr int lanes = kRegisterBytes / sizeof(T);
    repeat<4>(QPASS_STEP(auto j) {
      Register<T> all = v[j].part[0];
      repeat<Vec::kParts - 1>(QPASS_STEP(auto i) { all += v[j].part[i + 1]; });
      T sum = all[0];
      repeat<lanes - 1>(QPASS_STEP(auto i) { sum += all[i + 1]; });
      to[j] = sum;
    });
  }

  // to[i, k] = from[k, i] for up to 64 keys k; those behind the last one repeat it
  template <Float F>
  static void transpose(const void* from, int64_t at, int64_t stride, int64_t count, int64_t d,
                        T* to) {
    for (int64_t k = 0; k < in_tiles(count, 16); ++k) {
      const int64_t key = k < count ? k : count - 1;
      for (int64_t i = 0; i < d; ++i) {
        to[i * kKeys + k] = qpass::load<T>(F, from, at + key * stride + i);
      }
    }
  }

  // which of up to 64 keys a row of the mask shows
  static uint64_t seen(const Attention& c, int64_t at, int64_t count) {
    uint64_t word = 0;
    const uint8_t* shown = static_cast<const uint8_t*>(c.mask.data) + at;
    for (int64_t k = 0; k < count; ++k) {
      const bool hidden = c.boolean ? !shown[k] : load_hidden(c.mask_type, c.mask.data, at + k);
      word |= static_cast<uint64_t>(!hidden) << k;
    }
    return word;
  }

 private:
  static bool load_hidden(Float type, const void* p, int64_t i) {
    return qpass::load<T>(type, p, i) == -static_cast<T>(__builtin_inf());
  }
};

const char* refuse(const Attention&) { return nullptr; }

size_t scratch(const Attention& c) {
  return c.type == Float::f64 ? memory_of<Plain<double>>(c) : memory_of<Plain<float>>(c);
}

void run(const Attention& c, const Part& part, void* memory) {
  c.type == Float::f64 ? attend<Plain<double>>(c, part, memory)
                       : attend<Plain<float>>(c, part, memory);
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Attention, attention) = {
    QPASS_NAME(attention), qpass::refuse, nullptr, qpass::scratch, qpass::run, 1, nullptr};
