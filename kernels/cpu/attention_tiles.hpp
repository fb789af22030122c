// Attention's arithmetic on tiles of rows and blocks of keys, on whichever registers `V` has.
#pragma once

#include "floats.hpp"
#include "unroll.hpp"

namespace qpass {
namespace {

// keys of a block: the bits of a word
constexpr int kKeys = 64;
constexpr int kVectors = kKeys / 16;
// up to so many rows share keys that are not transposed
constexpr int64_t kFewRows = 8;

// What one part of a call works with. A row is a query of one head; rows are numbered query by
// query.
template <class V>
struct Work {
  using T = typename V::T;
  explicit Work(const Attention& call) : c(call) {}

  const Attention& c;
  int64_t batch, group;            // which head of keys
  int64_t first_row, rows;         // which of its rows
  int64_t first_key, end_key;      // which of its keys
  int64_t query_width, out_width;  // both widths in whole vectors
  T* query;                        // [rows, query_width], zeros behind the end
  T* out;                          // [rows, out_width]: weighted values so far
  T* top;                          // [rows]: largest score so far
  T* sums;                         // [rows, 16]: weights so far, lane by lane
  T* weights;                      // [rows of a tile, kKeys]: scores, then weights of one block
  T* keys;                         // [d, kKeys]: one block, transposed
  T* values;                       // [kKeys, out_width]: one block in the type of computing

  int64_t position(int64_t row) const { return (first_row + row) / c.n; }
  int64_t head(int64_t row) const { return group * c.n + (first_row + row) % c.n; }
};

static inline int64_t whole(int64_t count) { return (count + 15) / 16 * 16; }

static inline uint64_t first_bits(int64_t count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// ln(2)**k / k!
constexpr double exp_term(int k) { return k ? exp_term(k - 1) * 0.69314718055994530942 / k : 1; }

// e**x for x <= 0, exactly 0 where it would be no normal number; NaN stays
template <class V>
QPASS_INLINE typename V::Vec exponential(typename V::Vec x) {
  using T = typename V::T;
  // far enough below, and an integer afterwards
  x = V::larger(V::splat(static_cast<T>(V::kLowest)), x);
  const auto log2e = V::splat(static_cast<T>(1.4426950408889634074));
  const auto n = V::rounded(V::times(x, log2e));
  const auto f = V::product(x, log2e, V::negative(n));
  auto y = V::splat(static_cast<T>(exp_term(V::kTerms)));
  repeat<V::kTerms>(QPASS_STEP(auto k) {
    y = V::product(y, f, V::splat(static_cast<T>(exp_term(V::kTerms - 1 - k.value))));
  });
  return V::times_power(y, n);
}

// Scores become weights, in place, for the vectors low .. high of a row; returns what the row's
// earlier sums are worth now.
template <class V>
typename V::T weigh(const Work<V>& w, int64_t row, int64_t key, uint64_t word, int low, int high,
                    typename V::T* scores) {
  using T = typename V::T;
  const Attention& c = w.c;
  const bool added = c.mask.data && !c.boolean;
  const int64_t at = added ? c.mask.at(w.batch, w.head(row), w.position(row)) + key : 0;
  const int64_t count = w.end_key - key;
  const auto nothing = V::splat(-static_cast<T>(__builtin_inf()));
  auto largest = nothing;
  for (int v = low; v < high; ++v) {
    auto x = V::load(scores + 16 * v);
    if (added) x = V::plus(x, V::read(c.mask_type, c.mask.data, at + 16 * v, count - 16 * v));
    const uint32_t bits = static_cast<uint32_t>(word >> (16 * v)) & 0xffffu;
    if (bits != 0xffffu) x = V::choose(bits, x, nothing);
    if (added || bits != 0xffffu) V::store(scores + 16 * v, x);
    largest = V::larger(largest, x);
  }
  const T before = w.top[row];
  T top = V::largest_of(largest);
  if (before > top) top = before;
  w.top[row] = top;
  // a row that has seen nothing yet has no largest score to take off
  const auto offset = V::splat(top == -static_cast<T>(__builtin_inf()) ? T{0} : top);
  auto sum = V::load(w.sums + 16 * row);
  T shrink = 1;
  if (top != before) {
    const auto factor = exponential<V>(V::minus(V::splat(before), offset));
    sum = V::times(sum, factor);
    shrink = V::first(factor);
  }
  for (int v = low; v < high; ++v) {
    const auto p = exponential<V>(V::minus(V::load(scores + 16 * v), offset));
    V::store(scores + 16 * v, p);
    sum = V::plus(sum, p);
  }
  V::store(w.sums + 16 * row, sum);
  return shrink;
}

// Rows that will be read soon, to be asked for while others are worked on; null for none.
struct Ahead {
  const char* first;
  int64_t stride, bytes;

  inline __attribute__((always_inline)) void fetch(int64_t row) const {
    if (!first) return;
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(first + row * stride + b);
  }
};

// out = out * shrink + weights @ values for R rows, N vectors of columns and keys low .. high
template <class V, int R, int N, Float F>
QPASS_INLINE void add_columns(const typename V::T* weights, int low, int high, const void* values,
                              int64_t at, int64_t stride, int64_t columns,
                              const typename V::T* shrink, typename V::T* out, int64_t out_width,
                              const Ahead& ahead) {
  typename V::Vec sum[R][N];
  repeat<R>(QPASS_STEP(auto r) {
    const auto factor = V::splat(shrink[r]);
    repeat<N>(QPASS_STEP(auto n) {
      sum[r][n] = V::times(V::load(out + r * out_width + 16 * n), factor);
    });
  });
  at += low * stride;
  for (int k = low; k < high; ++k, at += stride) {
    ahead.fetch(k);
    typename V::Vec v[N];
    repeat<N>(
        QPASS_STEP(auto n) { v[n] = V::template read<F>(values, at + 16 * n, columns - 16 * n); });
    repeat<R>(QPASS_STEP(auto r) {
      const auto p = V::splat(weights[r * kKeys + k]);
      repeat<N>(QPASS_STEP(auto n) { sum[r][n] = V::product(v[n], p, sum[r][n]); });
    });
  }
  repeat<R>(QPASS_STEP(auto r) {
    repeat<N>(QPASS_STEP(auto n) { V::store(out + r * out_width + 16 * n, sum[r][n]); });
  });
}

template <class V, int R, Float F>
void add_values(const typename V::T* weights, int low, int high, const void* values, int64_t at,
                int64_t stride, int64_t columns, const typename V::T* shrink, typename V::T* out,
                int64_t out_width, const Ahead& ahead = {nullptr, 0, 0}) {
  int64_t j = 0;
  const auto some = [&](auto n) __attribute__((always_inline)) {
    for (; out_width - j >= 16 * n; j += 16 * n) {
      add_columns<V, R, n.value, F>(weights, low, high, values, at + j, stride, columns - j, shrink,
                                    out + j, out_width, j ? Ahead{nullptr, 0, 0} : ahead);
    }
  };
  if constexpr (V::kColumns >= 4) some(Constant<4>{});
  if constexpr (V::kColumns >= 2) some(Constant<2>{});
  some(Constant<1>{});
}

// scores of R rows for N vectors of a transposed block of keys
template <class V, int R, int N>
QPASS_INLINE void score_tile(const typename V::T* query, int64_t width, int64_t d,
                             const typename V::T* keys, typename V::T* scores) {
  typename V::Vec sum[R][N];
  repeat<R>(QPASS_STEP(auto r) { repeat<N>(QPASS_STEP(auto n) { sum[r][n] = V::splat(0); }); });
  for (int64_t i = 0; i < d; ++i, keys += kKeys) {
    typename V::Vec k[N];
    repeat<N>(QPASS_STEP(auto n) { k[n] = V::load(keys + 16 * n); });
    repeat<R>(QPASS_STEP(auto r) {
      const auto q = V::splat(query[r * width + i]);
      repeat<N>(QPASS_STEP(auto n) { sum[r][n] = V::product(k[n], q, sum[r][n]); });
    });
  }
  repeat<R>(QPASS_STEP(auto r) {
    repeat<N>(QPASS_STEP(auto n) { V::store(scores + r * kKeys + 16 * n, sum[r][n]); });
  });
}

template <class V>
void score_transposed(const Work<V>& w, int64_t row, int low, int high) {
  const auto some = [&](auto n) __attribute__((always_inline)) {
    for (; high - low >= n; low += n) {
      score_tile<V, V::kRows, n.value>(w.query + row * w.query_width, w.query_width, w.c.d,
                                       w.keys + 16 * low, w.weights + 16 * low);
    }
  };
  if constexpr (V::kColumns >= 4) some(Constant<4>{});
  if constexpr (V::kColumns >= 2) some(Constant<2>{});
  some(Constant<1>{});
}

constexpr int64_t bytes_of(Float type) {
  return type == Float::f32 ? 4 : type == Float::f64 ? 8 : 2;
}

// asks for `count` numbers from memory
template <Float F>
QPASS_INLINE void fetch(const void* p, int64_t i, int64_t count) {
  constexpr int64_t size = bytes_of(F);
  const char* from = static_cast<const char*>(p) + i * size;
  for (int64_t byte = 0; byte < count * size; byte += 64) __builtin_prefetch(from + byte);
}

// scores of R rows for the keys low .. high of a block as they lie, four at a time
template <class V, int R, Float F>
void score_rows(const Work<V>& w, int64_t row, int64_t at, int64_t value_at, int low, int high) {
  const Attention& c = w.c;
  const typename V::T* query = w.query + row * w.query_width;
  for (int k = low; k < high; k += 4) {
    // behind the last key it is read again, to be ignored
    int64_t from[4];
    repeat<4>(QPASS_STEP(auto j) { from[j] = at + (k + j < high ? k + j : high - 1) * c.key.row; });
    // a cache comes from memory, row by row: the values of this block are asked for meanwhile, as
    // the keys of the next one will be among the products of its values
    for (int j = 0; j < 4; ++j) {
      fetch<F>(c.value.data, value_at + (k + j) * c.value.row, c.e);
    }
    typename V::Vec sum[R][4];
    repeat<R>(QPASS_STEP(auto r) { repeat<4>(QPASS_STEP(auto j) { sum[r][j] = V::splat(0); }); });
    for (int64_t i = 0; i < c.d; i += 16) {
      typename V::Vec q[R];
      repeat<R>(QPASS_STEP(auto r) { q[r] = V::load(query + r * w.query_width + i); });
      repeat<4>(QPASS_STEP(auto j) {
        const auto x = V::template read<F>(c.key.data, from[j] + i, c.d - i);
        repeat<R>(QPASS_STEP(auto r) { sum[r][j] = V::product(x, q[r], sum[r][j]); });
      });
    }
    repeat<R>(QPASS_STEP(auto r) { V::store_sums(w.weights + r * kKeys + k, sum[r]); });
  }
}

// f(a constant F) for the type of the call
template <class V, class A>
QPASS_INLINE void each_type(Float type, const A& f) {
  if constexpr (sizeof(typename V::T) == 8) {
    f(Type<Float::f64>{});
  } else if (type == Float::f32) {
    f(Type<Float::f32>{});
  } else if (type == Float::bf16) {
    f(Type<Float::bf16>{});
  } else {
    f(Type<Float::f16>{});
  }
}

}  // namespace
}  // namespace qpass
