// The operators as torch sees them: arguments in, a kernel chosen, the work shared out, tensors out.
//
// Written against LibTorch's stable ABI: one build serves every later torch and every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "select.hpp"

namespace qpass {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Memory of one thread, kept from call to call unless it was large.
class Memory {
 public:
  ~Memory() { std::free(data_); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }
  void release_large() {
    constexpr size_t kKept = size_t{4} << 20;
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// `call_memory` holds what all threads of a call read, `thread_memory` what one part writes
thread_local Memory call_memory, thread_memory;

void require(bool holds, const char* op, const std::string& what) {
  if (!holds) throw std::invalid_argument("qpass::" + std::string(op) + ": " + what);
}

Float float_type(ScalarType type, const char* op) {
  switch (type) {
    case ScalarType::Float: return Float::f32;
    case ScalarType::BFloat16: return Float::bf16;
    case ScalarType::Half: return Float::f16;
    case ScalarType::Double: return Float::f64;
    default: throw std::invalid_argument("qpass::" + std::string(op) + ": not a floating type");
  }
}

int32_t shim_type(Float type) {
  switch (type) {
    case Float::f32: return aoti_torch_dtype_float32();
    case Float::bf16: return aoti_torch_dtype_bfloat16();
    case Float::f16: return aoti_torch_dtype_float16();
    default: return aoti_torch_dtype_float64();
  }
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

// `like` with its last dimension replaced, uninitialised (by the shim: half the cost of a dispatch)
Tensor empty(const Tensor& like, int64_t last, int32_t type) {
  constexpr int64_t kMost = 16;
  int64_t sizes[kMost], strides[kMost];
  const int64_t dims = like.dim();
  require(dims >= 1 && dims <= kMost, "empty", "inputs have 1 to 16 dimensions");
  const auto from = like.sizes();
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? last : from[d];
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, type, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Runs f over [0, count) where one item takes about `nanoseconds`: serially if waking threads costs more.
template <class F>
void share(int64_t count, double nanoseconds, const F& f) {
  constexpr double kWorthAThread = 4000;
  if (count <= 0) return;
  const double items = kWorthAThread / nanoseconds + 1;
  const int64_t grain = items < static_cast<double>(count) ? static_cast<int64_t>(items) : count;
  torch::stable::parallel_for(0, count, grain, f);
}

// Runs every part of a call. Work is cut into chunks of rows only when blocks alone are too few.
template <class Call>
void run_parts(const Kernel<Call>& kernel, const Call& call, int64_t rows, int64_t blocks, double ns) {
  constexpr int64_t kRowChunk = 96;
  const int64_t threads = torch::stable::get_num_threads();
  const bool cut_rows = blocks < 4 * threads && rows > kRowChunk && threads > 1;
  const int64_t chunk = cut_rows ? kRowChunk : rows;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const size_t bytes = kernel.scratch(call);
  const double each = ns / static_cast<double>(chunks * blocks);
  share(chunks * blocks, each, [&](int64_t begin, int64_t end) {
    void* memory = bytes ? thread_memory.reserve(bytes) : nullptr;
    while (begin < end) {
      const int64_t c = begin / blocks, stop = end < (c + 1) * blocks ? end : (c + 1) * blocks;
      const int64_t last = (c + 1) * chunk < rows ? (c + 1) * chunk : rows;
      kernel.run(call, {c * chunk, last, begin - c * blocks, stop - c * blocks}, memory);
      begin = stop;
    }
    thread_memory.release_large();
  });
}

template <class Call>
void run_linear(const Call& call, const Kernel<Call>& kernel) {
  const Weight& w = call.weight;
  // read from memory at about 10 bytes, multiplied at about 100 a nanosecond and thread
  const double bytes = static_cast<double>(w.n) * static_cast<double>(w.padded_k()) * w.bits / 8;
  const double products = static_cast<double>(w.n) * static_cast<double>(w.padded_k() * call.m);
  if (kernel.prepare) {
    share(call.m, static_cast<double>(w.k) / 20, [&](int64_t begin, int64_t end) {
      kernel.prepare(call, begin, end);
    });
  }
  run_parts(kernel, call, call.m, w.blocks(), bytes / 10 + products / 100);
}

struct WeightTensors {
  Tensor lines, row_scales;
  std::optional<Tensor> scales, offsets, bias;
};

Weight read_weight(const WeightTensors& t, int64_t features, int64_t bits, int64_t k, int64_t n) {
  const char* op = "linear";
  require(bits == 4 || bits == 8, op, "weights have 4 or 8 bits");
  require(features == k, op,
          "the input has " + std::to_string(features) + " features, the weight " + std::to_string(k));
  Weight w{};
  w.bits = static_cast<int>(bits);
  w.n = n;
  w.k = k;
  w.groups = t.scales ? t.scales->size(1) : 1;
  require(n >= 1 && k >= 1 && w.groups >= 1 && k % w.groups == 0, op,
          "the columns do not divide into the groups");
  w.width = k / w.groups;
  require(w.width <= (int64_t{1} << 17), op, "a group this long could overflow int32");
  w.group_lines = (w.width + w.columns_per_line() - 1) / w.columns_per_line();
  w.zero = bits == 8 ? 128 : t.offsets ? 0 : 8;
  const auto is = [&](const Tensor& x, ScalarType type, std::initializer_list<int64_t> shape) {
    if (x.scalar_type() != type || x.dim() != static_cast<int64_t>(shape.size())) return false;
    int64_t d = 0;
    for (const int64_t size : shape) {
      if (x.size(d++) != size) return false;
    }
    return true;
  };
  require(is(t.lines, ScalarType::Byte, {w.blocks(), w.lines_per_block(), kLine}), op,
          "weight is not packed for this many rows, columns and groups");
  require(is(t.row_scales, ScalarType::Float, {n}), op, "row_scales is no float32 [rows]");
  for (const auto* part : {&t.scales, &t.offsets}) {
    require(!*part || is(**part, ScalarType::Half, {w.blocks(), w.groups, kRows}), op,
            "group scales and offsets are float16 [blocks, groups, 16]");
  }
  require(!t.bias || (t.bias->dim() == 1 && t.bias->size(0) == n), op, "bias is no [rows]");
  w.lines = static_cast<const uint8_t*>(t.lines.data_ptr());
  w.row_scales = static_cast<const float*>(t.row_scales.data_ptr());
  if (t.scales) w.scales = static_cast<const uint16_t*>(t.scales->data_ptr());
  if (t.offsets) w.offsets = static_cast<const uint16_t*>(t.offsets->data_ptr());
  if (t.bias) {
    w.bias = t.bias->data_ptr();
    w.bias_type = float_type(t.bias->scalar_type(), op);
  }
  return w;
}

// Cuts one allocation into aligned pieces.
class Pieces {
 public:
  template <class T>
  size_t add(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

Tensor linear_codes(Tensor codes_in, Tensor scales_in, Tensor lines, Tensor row_scales,
                    std::optional<Tensor> group_scales, std::optional<Tensor> group_offsets,
                    std::optional<Tensor> bias, int64_t bits, int64_t in_features,
                    int64_t out_features, ScalarType dtype) {
  const Tensor codes = dense(codes_in), scales = dense(scales_in);
  const WeightTensors t{dense(lines), dense(row_scales), dense(group_scales),
                        dense(group_offsets), dense(bias)};
  require(codes.dim() >= 1 && codes.scalar_type() == ScalarType::Char, "linear", "codes are int8");
  LinearCodes c{};
  c.weight = read_weight(t, codes.size(codes.dim() - 1), bits, in_features, out_features);
  c.m = codes.numel() / in_features;
  require(scales.scalar_type() == ScalarType::Float && scales.numel() == c.m, "linear",
          "scales are float32, one for each row of codes");
  c.out_type = float_type(dtype, "linear");
  const Tensor out = empty(codes, out_features, shim_type(c.out_type));
  if (c.m == 0) return out;
  c.codes = static_cast<const int8_t*>(codes.data_ptr());
  c.scales = static_cast<const float*>(scales.data_ptr());
  c.out = out.data_ptr();
  const bool whole = c.weight.padded_k() == in_features;
  Pieces pieces;
  const size_t padded = pieces.add<int8_t>(whole ? 0 : c.m * c.weight.padded_k());
  const size_t sums = pieces.add<float>(c.m * c.weight.groups);
  const size_t starts = pieces.add<int32_t>(c.m * c.weight.groups);
  char* memory = static_cast<char*>(call_memory.reserve(pieces.bytes()));
  c.padded = whole ? const_cast<int8_t*>(c.codes) : reinterpret_cast<int8_t*>(memory + padded);
  c.sums = reinterpret_cast<float*>(memory + sums);
  c.starts = reinterpret_cast<int32_t*>(memory + starts);
  run_linear(c, choose(c));
  call_memory.release_large();
  return out;
}

Tensor linear_real(Tensor x_in, Tensor lines, Tensor row_scales, std::optional<Tensor> group_scales,
                   std::optional<Tensor> group_offsets, std::optional<Tensor> bias, int64_t bits,
                   int64_t in_features, int64_t out_features) {
  const Tensor x = dense(x_in);
  const WeightTensors t{dense(lines), dense(row_scales), dense(group_scales),
                        dense(group_offsets), dense(bias)};
  require(x.dim() >= 1, "linear", "the input has no dimension");
  LinearReal c{};
  c.weight = read_weight(t, x.size(x.dim() - 1), bits, in_features, out_features);
  c.m = x.numel() / in_features;
  c.type = float_type(x.scalar_type(), "linear");
  const Tensor out = empty(x, out_features, shim_type(c.type));
  if (c.m == 0) return out;
  c.x = x.data_ptr();
  c.out = out.data_ptr();
  const Kernel<LinearReal>& kernel = choose(c);
  Pieces pieces;
  if (kernel.prepare) {
    const size_t padded = pieces.add<float>(c.m * c.weight.padded_k());
    const size_t sums = pieces.add<float>(c.m * c.weight.groups);
    char* memory = static_cast<char*>(call_memory.reserve(pieces.bytes()));
    c.padded = reinterpret_cast<float*>(memory + padded);
    c.sums = reinterpret_cast<float*>(memory + sums);
  }
  run_linear(c, kernel);
  call_memory.release_large();
  return out;
}

// Signs and factor of the type the kernels expect; kept alive by the caller.
struct Transform {
  std::optional<Tensor> signs, factor;
};

void read_transform(Rows& c, const Transform& t, int64_t power) {
  const char* op = "hadamard";
  require(t.signs.has_value() == t.factor.has_value(), op, "both signs and factor, or neither");
  if (!t.signs) return;
  const Tensor &signs = *t.signs, &factor = *t.factor;
  require(power >= 1 && (power & (power - 1)) == 0, op, "the power is no power of two");
  require(factor.dim() == 2 && factor.size(0) == factor.size(1) && factor.size(0) >= 1, op,
          "factor is no square matrix");
  require(signs.dim() == 1 && signs.size(0) == c.n, op, "signs has not one entry per channel");
  require(c.n % (factor.size(0) * power) == 0, op, "the width is no multiple of the block");
  const ScalarType type = signs.scalar_type();
  require(type == factor.scalar_type() && (type == ScalarType::Float || type == ScalarType::Double),
          op, "signs and factor are float32, or both float64");
  c.signs = signs.data_ptr();
  c.factor = factor.data_ptr();
  c.part_type = float_type(type, op);
  c.order = factor.size(0);
  c.power = power;
}

void run_rows(const Rows& c) {
  if (c.m == 0 || c.n == 0) return;
  const double mixing = c.signs ? static_cast<double>(c.order) / 16 + 1 : 0;
  run_parts(choose(c), c, c.m, 1, static_cast<double>(c.m * c.n) * (0.3 + mixing / 4));
}

Tensor hadamard(Tensor x_in, Tensor signs, Tensor factor, int64_t power) {
  const Tensor x = dense(x_in);
  require(x.dim() >= 1, "hadamard", "the input has no dimension");
  Rows c{};
  c.n = x.size(x.dim() - 1);
  const Transform t{dense(signs), dense(factor)};
  read_transform(c, t, power);
  c.m = c.n ? x.numel() / c.n : 0;
  c.type = float_type(x.scalar_type(), "hadamard");
  const Tensor out = empty(x, c.n, shim_type(c.type));
  c.x = x.data_ptr();
  c.out = out.data_ptr();
  run_rows(c);
  return out;
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x_in, int64_t bits, std::optional<Tensor> signs,
                                         std::optional<Tensor> factor, int64_t power) {
  const Tensor x = dense(x_in);
  require(x.dim() >= 1, "quantize_rows", "the input has no dimension");
  require(bits >= 2 && bits <= 8, "quantize_rows", "activation codes have 2 to 8 bits");
  Rows c{};
  c.n = x.size(x.dim() - 1);
  const Transform t{dense(signs), dense(factor)};
  read_transform(c, t, power);
  c.type = float_type(x.scalar_type(), "quantize_rows");
  c.bits = static_cast<int>(bits);
  const Tensor codes = empty(x, c.n, aoti_torch_dtype_int8());
  const Tensor scales = empty(x, 1, aoti_torch_dtype_float32());
  c.m = scales.numel();
  c.x = x.data_ptr();
  c.codes = static_cast<int8_t*>(codes.data_ptr());
  c.scales = static_cast<float*>(scales.data_ptr());
  if (c.n == 0) std::memset(c.scales, 0, static_cast<size_t>(c.m) * sizeof(float));
  run_rows(c);
  return {codes, scales};
}

Tensor embedding(Tensor indices_in, Tensor codes_in, Tensor scales_in, ScalarType dtype) {
  const char* op = "embedding";
  const Tensor codes = dense(codes_in), scales = dense(scales_in);
  require(codes.dim() == 2 && codes.scalar_type() == ScalarType::Char, op, "codes are int8 [v, d]");
  Embedding c{};
  c.rows = codes.size(0);
  c.n = codes.size(1);
  require(scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.size(0) == c.rows,
          op, "scales are float32 [v]");
  const bool wide = indices_in.scalar_type() == ScalarType::Long;
  require(wide || indices_in.scalar_type() == ScalarType::Int, op, "indices are int64 or int32");
  const Tensor indices =
      dense(wide ? indices_in : torch::stable::to(indices_in, ScalarType::Long));
  c.m = indices.numel();
  c.indices = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t i = 0; i < c.m; ++i) {
    if (c.indices[i] < 0 || c.indices[i] >= c.rows) {
      throw std::out_of_range("qpass::embedding: index " + std::to_string(c.indices[i]) +
                              " lies outside the table of " + std::to_string(c.rows) + " rows");
    }
  }
  c.out_type = float_type(dtype, op);
  int64_t sizes[17], strides[17];
  const int64_t dims = indices.dim() + 1;
  require(dims <= 17, op, "indices have at most 16 dimensions");
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? c.n : indices.size(d);
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dims, sizes, strides, shim_type(c.out_type), aoti_torch_device_type_cpu(), 0, &handle));
  const Tensor out(handle);
  c.codes = static_cast<const int8_t*>(codes.data_ptr());
  c.scales = static_cast<const float*>(scales.data_ptr());
  c.out = out.data_ptr();
  if (c.m && c.n) run_parts(choose(c), c, c.m, 1, static_cast<double>(c.m * c.n));
  return out;
}

}  // namespace
}  // namespace qpass

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, library) {
  library.impl("hadamard", TORCH_BOX(&qpass::hadamard));
  library.impl("quantize_rows", TORCH_BOX(&qpass::quantize_rows));
  library.impl("linear.codes", TORCH_BOX(&qpass::linear_codes));
  library.impl("linear.real", TORCH_BOX(&qpass::linear_real));
  library.impl("embedding", TORCH_BOX(&qpass::embedding));
}
