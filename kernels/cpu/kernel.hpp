// What a kernel is: an operator, an instruction set, a reason to refuse, and functions over ranges.
//
// Files that are compiled for an instruction set include only this header, <cstdint>, <cstddef> and
// intrinsics: a template of the standard library or of torch that such a file instantiated could be
// the copy that the linker keeps for everyone, and would then fault on a machine without the
// instructions. For the same reason everything they define is static or a plain constant: nothing
// of theirs runs before cpuid has been asked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace qpass {

enum class Isa : int { portable = 0, avx2 = 1, avx512vnni = 2, amx = 3, amx_emulated = 4 };

enum class Float : int { f32, bf16, f16, f64 };

// rows of weights in a block, bytes in a line: see qpass/ops/packing.py
constexpr int64_t kRows = 16;
constexpr int64_t kLine = 64;

// w[n, k] = row_scales[n] * (scales[n, g] * (stored[n, k] - zero) + offsets[n, g])
struct Weight {
  const uint8_t* lines;     // [blocks, lines, 64]
  const float* row_scales;  // [n]
  const uint16_t* scales;   // float16 [blocks, groups, 16], or null for 1
  const uint16_t* offsets;  // float16 [blocks, groups, 16], or null for 0
  const void* bias;         // [n] of bias_type, or null
  Float bias_type;
  int bits;              // 4 or 8
  int zero;              // the stored value of code 0
  int64_t n, k, groups;  // rows, columns, groups of columns
  int64_t width;         // columns of a group
  int64_t group_lines;   // lines of a group; its padded columns are group_lines * columns_per_line

  int64_t columns_per_line() const { return bits == 4 ? 8 : 4; }
  int64_t lines_per_block() const { return groups * group_lines; }
  int64_t padded_k() const { return lines_per_block() * columns_per_line(); }
  int64_t blocks() const { return (n + kRows - 1) / kRows; }
};

// out[m, n] = scales[m] * sum_k codes[m, k] * w[n, k] + bias[n]
struct LinearCodes {
  Weight weight;
  int64_t m;
  const int8_t* codes;  // [m, k]
  const float* scales;  // [m]
  void* out;            // [m, n] of out_type
  Float out_type;
  // filled by prepare: codes with each group padded by zeros to whole lines (codes itself where the
  // groups are whole already), the sum of codes per group, and -zero times that sum
  int8_t* padded;   // [m, padded_k]
  float* sums;      // [m, groups]
  int32_t* starts;  // [m, groups]
};

// out[m, n] = sum_k x[m, k] * w[n, k] + bias[n]
struct LinearReal {
  Weight weight;
  int64_t m;
  const void* x;  // [m, k] of type
  void* out;      // [m, n] of type
  Float type;
  // filled by prepare, in the form its kernel wants: x with each group padded by zeros (room for
  // float64), and its sum per group
  float* padded;  // [m, padded_k]
  float* sums;    // [m, groups]
};

// what rows are before they are transformed: x; x, or x + other, after a norm; or gate(x), times
// other where there is one. Every step is rounded to the type of x.
enum class Front : int { plain, normed, gated };

enum class Gate : int { silu, gelu, gelu_tanh, relu };

// y = ((front(x) * signs) in blocks) @ (factor (x) H), then either y or its codes and scales
struct Rows {
  int64_t m, n;
  const void* x;  // [m, n] of type
  int64_t x_row;  // elements from one row to the next
  Float type;
  Front front;
  const void* other;  // [m, n] of type, or null
  int64_t other_row;
  Gate gate;
  // of a norm: (v - mean, if centred) / sqrt(mean of squares + eps) * norm_scale + norm_shift
  void* sum;                            // [m, n] of type: x + other
  const void *norm_scale, *norm_shift;  // [n] of type, or null
  bool centred;
  double eps;
  const void* signs;   // [n], or null for no transform
  const void* factor;  // [order, order] row by row
  Float part_type;     // of signs and factor: f32, or f64 where x is f64
  int64_t order, power;
  void* out;      // [m, n] of type, or null when codes are wanted
  int8_t* codes;  // [m, n]
  float* scales;  // [m]
  int low, high;  // the first and the last code
  float clip;     // the share of the largest magnitude that `high` stands for
};

// out[i, d] = codes[indices[i], d] * scales[indices[i]]; indices are checked before
struct Embedding {
  int64_t m, rows, n;
  const int64_t* indices;
  const int8_t* codes;
  const float* scales;
  void* out;
  Float out_type;
};

// a [batch, heads, length, width] tensor: its last axis has stride 1, the others count elements,
// and an axis that is broadcast has stride 0
struct Heads {
  const void* data;
  int64_t batch, head, row;

  int64_t at(int64_t b, int64_t h, int64_t r) const { return b * batch + h * head + r * row; }
};

// out[b, i, h] = softmax(scale * query[b, h, i] . key[b, h / n] + mask[b, h, i]) @ value[b, h / n]
struct Attention {
  int64_t batches, groups, n;  // heads of keys and values, query heads that share one
  int64_t t, s, d, e;          // queries, keys, widths of keys and of values
  Heads query, key, value;     // of type
  Heads mask;                  // bool, or added and of mask_type; data is null for none
  bool boolean;
  Float mask_type;
  bool causal;
  double scale;
  void* out;  // [batches, t, groups * n, e] of type
  Float type;
  // A head of keys is read in `splits` ranges of split_keys keys, a multiple of 64. If there is
  // more than one, a row of a range leaves its weighted values, its largest score and its sum of
  // weights.
  int64_t splits, split_keys;
  void* partial;      // [batches * groups, rows, splits, e + 2], in double where type is f64
  int64_t most_rows;  // of a part

  // rows of a head of keys: for each query in turn, the n heads that share it
  int64_t rows() const { return t * n; }
};

// What no linear layer can be faster than: products of registers, or bytes that are read. A row of
// a part is a step of kStepProducts products of two numbers, or a line where there are lines. A set
// without products of bfloat16 multiplies float32 for them.
enum class Number : int { int8, float32, bfloat16 };
struct Limits {
  Number number;
  const uint8_t* lines;  // 64-byte aligned, or null for products
  uint32_t* seen;        // whatever came out, so that no compiler leaves the work away
};
constexpr int64_t kStepProducts = 1 << 16;

// the part of a call that one thread does: rows of activations and blocks of 16 outputs
// (of attention: rows of a head of keys, and ranges of keys, those of one head after another)
struct Part {
  int64_t row_begin, row_end, block_begin, block_end;
};

template <class Call>
struct Kernel {
  const char* name;
  Isa isa;
  // null, or why this kernel cannot take the call
  const char* (*refuse)(const Call&);
  // what must be done for some rows before any part may run; null if nothing
  void (*prepare)(const Call&, int64_t row_begin, int64_t row_end);
  // bytes of memory each thread needs, 64-byte aligned
  size_t (*scratch)(const Call&);
  void (*run)(const Call&, const Part&, void* scratch);
  // it reads prepared activations in batches of so many rows, and writes only those that exist
  int64_t rows_at_once;
  // whether activations that need no padding may be read where they are; null for yes
  bool (*in_place)(const Call&);
};

}  // namespace qpass

// the constant that CMake's table of kernels refers to; QPASS_ISA comes from the command line
#define QPASS_JOIN_(a, b) a##_##b
#define QPASS_JOIN(a, b) QPASS_JOIN_(a, b)
#define QPASS_TEXT_(a) #a
#define QPASS_TEXT(a) QPASS_TEXT_(a)
#define QPASS_KERNEL(Call, file)                                           \
  extern const ::qpass::Kernel<::qpass::Call> QPASS_JOIN(file, QPASS_ISA); \
  const ::qpass::Kernel<::qpass::Call> QPASS_JOIN(file, QPASS_ISA)
#define QPASS_NAME(file) #file "_" QPASS_TEXT(QPASS_ISA), ::qpass::Isa::QPASS_ISA
