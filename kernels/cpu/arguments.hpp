// From torch's tensors to the plain arguments of kernels, and every check on the way.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "kernel.hpp"
#include "tape.hpp"

namespace qpass {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

[[noreturn]] inline void refuse_call(const char* op, const std::string& what) {
  throw std::invalid_argument("qpass::" + std::string(op) + ": " + what);
}

inline void require(bool holds, const char* op, const char* what) {
  if (!holds) refuse_call(op, what);
}

inline Float float_type(ScalarType type, const char* op) {
  switch (type) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::BFloat16:
      return Float::bf16;
    case ScalarType::Half:
      return Float::f16;
    case ScalarType::Double:
      return Float::f64;
    default:
      refuse_call(op, "not a floating type");
  }
}

inline int32_t shim_type(Float type) {
  switch (type) {
    case Float::f32:
      return aoti_torch_dtype_float32();
    case Float::bf16:
      return aoti_torch_dtype_bfloat16();
    case Float::f16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float64();
  }
}

// A copy with nothing between its numbers.
inline Tensor copied(const Tensor& t) {
  refuse_recording();
  return torch::stable::contiguous(t);
}

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : copied(t); }

inline std::optional<Tensor> dense(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(dense(*t)) : std::nullopt;
}

// An uninitialised tensor; the shim's own function costs half as much as a call through the
// dispatcher.
inline Tensor strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t type) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, sizes, strides, type,
                                                         aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A contiguous tensor of the leading sizes and one more, uninitialised.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef leading, int64_t last, int32_t type) {
  constexpr int64_t kMost = 16;
  int64_t sizes[kMost], strides[kMost];
  const int64_t dims = static_cast<int64_t>(leading.size()) + 1;
  require(dims <= kMost, "empty", "results have at most 16 dimensions");
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    sizes[d] = d == dims - 1 ? last : leading[static_cast<size_t>(d)];
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  return strided(dims, sizes, strides, type);
}

// the sizes of `t` but for the last
inline torch::headeronly::IntHeaderOnlyArrayRef leading(const Tensor& t) {
  const auto sizes = t.sizes();
  require(!sizes.empty(), "operator", "the input has no dimension");
  return {sizes.data(), sizes.size() - 1};
}

inline int64_t last_size(const Tensor& t) {
  const auto sizes = t.sizes();
  require(!sizes.empty(), "operator", "the input has no dimension");
  return sizes[sizes.size() - 1];
}

struct WeightTensors {
  Tensor lines, row_scales;
  std::optional<Tensor> scales, offsets, bias;
};

inline Weight read_weight(const WeightTensors& t, int64_t features, int64_t bits, int64_t k,
                          int64_t n) {
  const char* op = "linear";
  require(bits == 4 || bits == 8, op, "weights have 4 or 8 bits");
  if (features != k) {
    refuse_call(op, "the input has " + std::to_string(features) + " features, the weight " +
                        std::to_string(k));
  }
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

// Signs and factor of the type the kernels expect; kept alive by the caller.
struct Transform {
  std::optional<Tensor> signs, factor;
};

inline void read_transform(Rows& c, const Transform& t, int64_t power) {
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

}  // namespace qpass
