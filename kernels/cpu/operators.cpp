// The operators as torch sees them: arguments in, a kernel chosen, the work shared, tensors out.
//
// Written against LibTorch's stable ABI: one build serves every later torch and every Python.
#include <torch/csrc/stable/library.h>

#include <cstring>
#include <tuple>

#include "arguments.hpp"
#include "calls.hpp"

namespace qpass {
namespace {

Tensor linear_codes(Tensor codes_in, Tensor scales_in, Tensor lines, Tensor row_scales,
                    std::optional<Tensor> group_scales, std::optional<Tensor> group_offsets,
                    std::optional<Tensor> bias, int64_t bits, int64_t in_features,
                    int64_t out_features, ScalarType dtype) {
  const Tensor codes = dense(codes_in), scales = dense(scales_in);
  const WeightTensors t{dense(lines), dense(row_scales), dense(group_scales), dense(group_offsets),
                        dense(bias)};
  require(codes.scalar_type() == ScalarType::Char, "linear", "codes are int8");
  LinearCodes c{};
  c.weight = read_weight(t, last_size(codes), bits, in_features, out_features);
  c.m = codes.numel() / in_features;
  require(scales.scalar_type() == ScalarType::Float && scales.numel() == c.m, "linear",
          "scales are float32, one for each row of codes");
  c.out_type = float_type(dtype, "linear");
  const Tensor out = empty(leading(codes), out_features, shim_type(c.out_type));
  if (c.m == 0) return out;
  c.codes = static_cast<const int8_t*>(codes.data_ptr());
  c.scales = static_cast<const float*>(scales.data_ptr());
  c.out = out.data_ptr();
  perform([c] {
    LinearCodes call = c;
    run_codes(call);
  });
  return out;
}

// A float times a weight, in memory of its own where the kernel wants some.
void run_real(LinearReal c) {
  const Kernel<LinearReal>& kernel = choose(c);
  Pieces pieces;
  if (kernel.prepare) {
    const int64_t rows = rounded_up(c.m, kernel.rows_at_once);
    // room for float64 too, which the portable kernel computes in
    const size_t padded = pieces.add<double>(rows * (c.weight.padded_k() + kLine));
    const size_t sums = pieces.add<float>(c.m * c.weight.groups);
    char* memory = static_cast<char*>(call_memory.reserve(pieces.bytes()));
    c.padded = reinterpret_cast<float*>(memory + padded);
    c.sums = reinterpret_cast<float*>(memory + sums);
  }
  run_linear(c, kernel);
  call_memory.release_large();
}

Tensor linear_real(Tensor x_in, Tensor lines, Tensor row_scales, std::optional<Tensor> group_scales,
                   std::optional<Tensor> group_offsets, std::optional<Tensor> bias, int64_t bits,
                   int64_t in_features, int64_t out_features) {
  const Tensor x = dense(x_in);
  const WeightTensors t{dense(lines), dense(row_scales), dense(group_scales), dense(group_offsets),
                        dense(bias)};
  LinearReal c{};
  c.weight = read_weight(t, last_size(x), bits, in_features, out_features);
  c.m = x.numel() / in_features;
  c.type = float_type(x.scalar_type(), "linear");
  const Tensor out = empty(leading(x), out_features, shim_type(c.type));
  if (c.m == 0) return out;
  c.x = x.data_ptr();
  c.out = out.data_ptr();
  perform([c] { run_real(c); });
  return out;
}

Tensor hadamard(Tensor x_in, Tensor signs, Tensor factor, int64_t power) {
  const Tensor x = dense(x_in);
  Rows c{};
  c.n = last_size(x);
  const Transform t{dense(signs), dense(factor)};
  read_transform(c, t, power);
  c.x_row = c.n;
  c.m = c.n ? x.numel() / c.n : 0;
  c.type = float_type(x.scalar_type(), "hadamard");
  const Tensor out = empty(leading(x), c.n, shim_type(c.type));
  c.x = x.data_ptr();
  c.out = out.data_ptr();
  perform([c] { run_rows(c); });
  return out;
}

std::tuple<Tensor, Tensor> clipped_rows(Tensor x_in, int64_t low, int64_t high, double clip,
                                        std::optional<Tensor> signs, std::optional<Tensor> factor,
                                        int64_t power) {
  const Tensor x = dense(x_in);
  require(low >= -128 && low < 0 && high > 0 && high <= 127, "quantize_rows", "codes are bytes");
  require(clip > 0 && clip <= 1, "quantize_rows", "the clip lies in (0, 1]");
  Rows c{};
  c.n = last_size(x);
  const Transform t{dense(signs), dense(factor)};
  read_transform(c, t, power);
  c.type = float_type(x.scalar_type(), "quantize_rows");
  c.x_row = c.n;
  c.low = static_cast<int>(low);
  c.high = static_cast<int>(high);
  c.clip = static_cast<float>(clip);
  const Tensor codes = empty(leading(x), c.n, aoti_torch_dtype_int8());
  const Tensor scales = empty(leading(x), 1, aoti_torch_dtype_float32());
  c.m = scales.numel();
  c.x = x.data_ptr();
  c.codes = static_cast<int8_t*>(codes.data_ptr());
  c.scales = static_cast<float*>(scales.data_ptr());
  perform([c] {
    if (c.n == 0) std::memset(c.scales, 0, static_cast<size_t>(c.m) * sizeof(float));
    run_rows(c);
  });
  return {codes, scales};
}

std::tuple<Tensor, Tensor> quantize_rows(Tensor x, int64_t bits, std::optional<Tensor> signs,
                                         std::optional<Tensor> factor, int64_t power) {
  require(bits >= 2 && bits <= 8, "quantize_rows", "activation codes have 2 to 8 bits");
  const int64_t last = (int64_t{1} << (bits - 1)) - 1;
  return clipped_rows(x, -last, last, 1.0, signs, factor, power);
}

void look_up(const Embedding& c) {
  for (int64_t i = 0; i < c.m; ++i) {
    if (c.indices[i] < 0 || c.indices[i] >= c.rows) {
      throw std::out_of_range("qpass::embedding: index " + std::to_string(c.indices[i]) +
                              " lies outside the table of " + std::to_string(c.rows) + " rows");
    }
  }
  if (c.m && c.n) run_parts(choose(c), c, c.m, 1, static_cast<double>(c.m * c.n));
}

Tensor embedding(Tensor indices_in, Tensor codes_in, Tensor scales_in, ScalarType dtype) {
  const char* op = "embedding";
  const Tensor codes = dense(codes_in), scales = dense(scales_in);
  require(codes.dim() == 2 && codes.scalar_type() == ScalarType::Char, op, "codes are int8 [v, d]");
  Embedding c{};
  c.rows = codes.size(0);
  c.n = codes.size(1);
  require(
      scales.scalar_type() == ScalarType::Float && scales.dim() == 1 && scales.size(0) == c.rows,
      op, "scales are float32 [v]");
  const bool wide = indices_in.scalar_type() == ScalarType::Long;
  require(wide || indices_in.scalar_type() == ScalarType::Int, op, "indices are int64 or int32");
  if (!wide) refuse_recording();
  const Tensor indices = dense(wide ? indices_in : torch::stable::to(indices_in, ScalarType::Long));
  c.m = indices.numel();
  c.indices = static_cast<const int64_t*>(indices.data_ptr());
  c.out_type = float_type(dtype, op);
  const Tensor out = empty(indices.sizes(), c.n, shim_type(c.out_type));
  c.codes = static_cast<const int8_t*>(codes.data_ptr());
  c.scales = static_cast<const float*>(scales.data_ptr());
  c.out = out.data_ptr();
  perform([c] { look_up(c); });
  return out;
}

Tensor materialize(Tensor x_in) {
  const Tensor x = dense(x_in);
  int32_t type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  const auto sizes = x.sizes();
  const Tensor out =
      sizes.empty() ? strided(0, nullptr, nullptr, type) : empty(leading(x), last_size(x), type);
  perform([to = out.data_ptr(), from = x.data_ptr(),
           bytes = static_cast<size_t>(x.numel()) * x.element_size()] {
    if (bytes) std::memcpy(to, from, bytes);
  });
  return out;
}

}  // namespace
}  // namespace qpass

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, library) {
  library.impl("hadamard", TORCH_BOX(&qpass::hadamard));
  library.impl("quantize_rows", TORCH_BOX(&qpass::quantize_rows));
  library.impl("quantize_rows.clipped", TORCH_BOX(&qpass::clipped_rows));
  library.impl("linear.codes", TORCH_BOX(&qpass::linear_codes));
  library.impl("linear.real", TORCH_BOX(&qpass::linear_real));
  library.impl("embedding", TORCH_BOX(&qpass::embedding));
  library.impl("materialize", TORCH_BOX(&qpass::materialize));
}
