// Attention block by block with a running softmax: the algorithm, on whichever registers `V` has.
//
// Many rows: a block of keys is transposed once, then tiles of rows meet it. Few rows: keys are
// read as they lie, once for all rows. Either way a tile and a block that see nothing of each other
// are passed over, decided by one word of bits for each row.
#pragma once

#include "attention_tiles.hpp"

namespace qpass {
namespace {

// which keys of a block a row sees, one bit each
template <class V>
uint64_t seen(const Work<V>& w, int64_t row, int64_t key, int64_t count) {
  const Attention& c = w.c;
  uint64_t word = first_bits(count);
  if (c.causal) {
    const int64_t before = w.position(row) + 1 - key;
    if (before <= 0) return 0;
    word &= first_bits(before);
  }
  if (!c.mask.data) return word;
  return word & V::seen(c, c.mask.at(w.batch, w.head(row), w.position(row)) + key, count);
}

// what a tile of rows sees of a block
struct View {
  uint64_t word[16];
  uint64_t any;
  int low, high;  // the keys between the first and the last one seen
};

template <class V>
View view(const Work<V>& w, int64_t row, int64_t rows, int64_t key, int64_t count) {
  View v;
  v.any = 0;
  for (int64_t r = 0; r < rows; ++r) {
    // heads that share a mask see the same
    const bool same = r && w.c.mask.head == 0 && w.position(row + r) == w.position(row + r - 1);
    v.word[r] = same ? v.word[r - 1] : seen(w, row + r, key, count);
    v.any |= v.word[r];
  }
  if (!v.any) return v;
  v.low = __builtin_ctzll(v.any);
  v.high = 64 - __builtin_clzll(v.any);
  return v;
}

// one block of keys for all rows, a tile at a time, once it and its values have been copied
template <class V>
void many_rows(const Work<V>& w, int64_t key, int64_t count) {
  const Attention& c = w.c;
  const int64_t key_at = c.key.at(w.batch, w.group, key);
  const int64_t value_at = c.value.at(w.batch, w.group, key);
  // float32 values that fill whole vectors are used where they are
  const bool in_place = sizeof(typename V::T) == 4 && c.type == Float::f32 && c.e % 16 == 0;
  bool copied = false;
  for (int64_t row = 0; row < w.rows; row += V::kRows) {
    const int64_t rows = w.rows - row < V::kRows ? w.rows - row : V::kRows;
    const View v = view(w, row, rows, key, count);
    if (!v.any) continue;
    if (!copied) {
      each_type<V>(
          c.type, QPASS_STEP(auto type) {
            V::template transpose<type.value>(c.key.data, key_at, c.key.row, count, c.d, w.keys);
            if (in_place) return;
            for (int64_t k = 0; k < count; ++k) {
              for (int64_t i = 0; i < w.out_width; i += 16) {
                const int64_t at = value_at + k * c.value.row + i;
                V::store(w.values + k * w.out_width + i,
                         V::template read<type.value>(c.value.data, at, c.e - i));
              }
            }
          });
      copied = true;
    }
    const int low = v.low / 16, high = (v.high + 15) / 16;
    score_transposed(w, row, low, high);
    typename V::T shrink[V::kRows] = {};
    for (int64_t r = 0; r < rows; ++r) {
      shrink[r] = weigh(w, row + r, key, v.word[r], low, high, w.weights + r * kKeys);
    }
    add_values<V, V::kRows, V::kType>(w.weights, v.low, v.high, in_place ? c.value.data : w.values,
                                      in_place ? value_at : 0, in_place ? c.value.row : w.out_width,
                                      w.out_width, shrink, w.out + row * w.out_width, w.out_width);
  }
}

// one block of keys for R rows, keys and values read where they are; `next` is where the keys of
// the next block begin, or negative
template <class V, int R>
void few_rows(const Work<V>& w, int64_t row, int64_t key, int64_t count, int64_t next) {
  const Attention& c = w.c;
  const View v = view(w, row, R, key, count);
  if (!v.any) return;
  typename V::T shrink[R];
  each_type<V>(
      c.type, QPASS_STEP(auto type) {
        score_rows<V, R, type.value>(w, row, c.key.at(w.batch, w.group, key),
                                     c.value.at(w.batch, w.group, key), v.low / 4 * 4, v.high);
        for (int64_t r = 0; r < R; ++r) {
          shrink[r] = weigh(w, row + r, key, v.word[r], v.low / 16, (v.high + 15) / 16,
                            w.weights + r * kKeys);
        }
        constexpr int64_t size = bytes_of(type.value);
        const char* keys = static_cast<const char*>(c.key.data);
        const Ahead ahead{next < 0 || row ? nullptr : keys + next * size, c.key.row * size,
                          c.d * size};
        add_values<V, R, type.value>(w.weights, v.low, v.high, c.value.data,
                                     c.value.at(w.batch, w.group, key), c.value.row, c.e, shrink,
                                     w.out + row * w.out_width, w.out_width, ahead);
      });
}

// asks for the first block of keys
template <class V>
void fetch_keys(const Work<V>& w) {
  const Attention& c = w.c;
  const int64_t count = w.end_key - w.first_key < kKeys ? w.end_key - w.first_key : kKeys;
  if (count <= 0 || !seen(w, 0, w.first_key, count)) return;
  const int64_t at = c.key.at(w.batch, w.group, w.first_key);
  each_type<V>(
      c.type, QPASS_STEP(auto type) {
        for (int64_t k = 0; k < count; ++k) fetch<type.value>(c.key.data, at + k * c.key.row, c.d);
      });
}

// queries in the type of computing times the scale; no sums and no largest score
template <class V>
void begin(const Work<V>& w, int64_t padded_rows) {
  using T = typename V::T;
  const Attention& c = w.c;
  const auto scale = V::splat(static_cast<T>(c.scale));
  for (int64_t row = 0; row < padded_rows; ++row) {
    const bool real = row < w.rows;
    const int64_t at = real ? c.query.at(w.batch, w.head(row), w.position(row)) : 0;
    for (int64_t i = 0; i < w.query_width; i += 16) {
      const auto x = real ? V::read(c.type, c.query.data, at + i, c.d - i) : V::splat(0);
      V::store(w.query + row * w.query_width + i, V::times(x, scale));
    }
    for (int64_t i = 0; i < w.out_width; i += 16) {
      V::store(w.out + row * w.out_width + i, V::splat(0));
    }
    V::store(w.sums + 16 * row, V::splat(0));
    w.top[row] = -static_cast<T>(__builtin_inf());
  }
}

// rows of the result, or what a range of keys leaves of them
template <class V>
void end(const Work<V>& w, int64_t split) {
  using T = typename V::T;
  const Attention& c = w.c;
  for (int64_t row = 0; row < w.rows; ++row) {
    const T sum = V::sum_of(V::load(w.sums + 16 * row));
    const T* from = w.out + row * w.out_width;
    if (c.splits == 1) {
      const int64_t heads = c.groups * c.n;
      const int64_t to = ((w.batch * c.t + w.position(row)) * heads + w.head(row)) * c.e;
      // a row that has seen nothing is 0
      const auto share = V::splat(sum == 0 ? T{0} : 1 / sum);
      for (int64_t i = 0; i < c.e; i += 16) {
        V::write(c.type, c.out, to + i, c.e - i, V::times(V::load(from + i), share));
      }
      continue;
    }
    const int64_t line = (w.batch * c.groups + w.group) * c.rows() + w.first_row + row;
    T* to = static_cast<T*>(c.partial) + (line * c.splits + split) * (c.e + 2);
    for (int64_t i = 0; i < c.e; ++i) to[i] = from[i];
    to[c.e] = w.top[row];
    to[c.e + 1] = sum;
  }
}

static inline int64_t in_tiles(int64_t rows, int64_t tile) {
  return (rows + tile - 1) / tile * tile;
}

// the pieces of a part's memory, each on a line of its own; returns how many bytes they take
template <class V>
size_t arrange(Work<V>& w, char* memory) {
  using T = typename V::T;
  const Attention& c = w.c;
  w.query_width = whole(c.d);
  w.out_width = whole(c.e);
  const int64_t rows = in_tiles(c.most_rows, V::kRows);
  size_t bytes = 0;
  const auto piece = [&](T*& at, int64_t count) {
    at = reinterpret_cast<T*>(memory + bytes);
    bytes += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  };
  piece(w.query, rows * w.query_width);
  piece(w.out, rows * w.out_width);
  piece(w.top, rows);
  piece(w.sums, rows * 16);
  // tiles of few rows have up to four
  piece(w.weights, (V::kRows < 4 ? 4 : V::kRows) * kKeys);
  piece(w.keys, c.rows() > kFewRows ? c.d * kKeys : 0);
  piece(w.values, c.rows() > kFewRows ? w.out_width * kKeys : 0);
  return bytes;
}

template <class V>
size_t memory_of(const Attention& c) {
  Work<V> w(c);
  return arrange(w, nullptr);
}

// where the keys of a range begin
static inline int64_t first_key_of(const Attention& c, int64_t block) {
  const int64_t head = block / c.splits, split = block % c.splits;
  return c.key.at(head / c.groups, head % c.groups, split * c.split_keys);
}

template <class V>
void attend(const Attention& c, const Part& part, void* memory) {
  Work<V> w(c);
  arrange(w, static_cast<char*>(memory));
  w.first_row = part.row_begin;
  w.rows = part.row_end - part.row_begin;
  for (int64_t block = part.block_begin; block < part.block_end; ++block) {
    const int64_t head = block / c.splits, split = block % c.splits;
    w.batch = head / c.groups;
    w.group = head % c.groups;
    w.first_key = split * c.split_keys;
    w.end_key = w.first_key + c.split_keys < c.s ? w.first_key + c.split_keys : c.s;
    if (c.causal) {
      const int64_t last = w.position(w.rows - 1) + 1;
      w.end_key = w.end_key < last ? w.end_key : last;
    }
    const bool few = c.rows() <= kFewRows;
    if (few && block == part.block_begin) fetch_keys(w);
    begin(w, few ? w.rows : in_tiles(w.rows, V::kRows));
    for (int64_t key = w.first_key; key < w.end_key; key += kKeys) {
      const int64_t count = w.end_key - key < kKeys ? w.end_key - key : kKeys;
      if (!few) {
        many_rows(w, key, count);
        continue;
      }
      int64_t next = key + kKeys < w.end_key ? c.key.at(w.batch, w.group, key + kKeys) : -1;
      if (next < 0 && block + 1 < part.block_end) next = first_key_of(c, block + 1);
      int64_t row = 0;
      for (; w.rows - row >= 4; row += 4) few_rows<V, 4>(w, row, key, count, next);
      if (w.rows - row == 3) few_rows<V, 3>(w, row, key, count, next);
      if (w.rows - row == 2) few_rows<V, 2>(w, row, key, count, next);
      if (w.rows - row == 1) few_rows<V, 1>(w, row, key, count, next);
    }
    end(w, split);
  }
}

}  // namespace
}  // namespace qpass
