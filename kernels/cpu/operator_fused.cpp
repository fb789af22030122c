// Products that make the codes they read: a norm, a sum before it, or a gate, then a transform.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments.hpp"
#include "calls.hpp"

namespace qpass {
namespace {

using Optional = std::optional<Tensor>;

// What the operators have behind their fronts: how rows become codes, and the weight.
struct Product {
  int64_t act_bits;
  Transform transform;
  int64_t power;
  WeightTensors tensors;
  int64_t bits, in_features, out_features;
};

Product read_product(int64_t act_bits, const Optional& signs, const Optional& factor, int64_t power,
                     const Tensor& lines, const Tensor& row_scales, const Optional& group_scales,
                     const Optional& group_offsets, const Optional& bias, int64_t bits,
                     int64_t in_features, int64_t out_features) {
  require(act_bits >= 2 && act_bits <= 8, "linear", "activation codes have 2 to 8 bits");
  return {act_bits,
          {dense(signs), dense(factor)},
          power,
          {dense(lines), dense(row_scales), dense(group_scales), dense(group_offsets), dense(bias)},
          bits,
          in_features,
          out_features};
}

// Rows of x that lie apart by one stride, as views of joined results do; copied where they do not.
struct Strided {
  Tensor tensor;
  int64_t row;
};

Strided rows_of(const Tensor& x) {
  const int64_t n = last_size(x);
  if (x.is_contiguous()) return {x, n};
  const auto sizes = x.sizes(), strides = x.strides();
  const size_t dims = sizes.size();
  int64_t row = 0, expected = 0;
  bool uniform = strides[dims - 1] == 1;
  for (size_t d = dims - 1; d-- > 0;) {
    if (sizes[d] == 1) continue;
    if (!row) row = expected = strides[d];
    uniform = uniform && strides[d] == expected && row > 0;
    expected *= sizes[d];
  }
  if (!uniform) return {copied(x), n};
  return {x, row ? row : n};
}

Tensor multiply(const Product& p, Rows& rows, const Tensor& x) {
  LinearCodes c{};
  c.weight = read_weight(p.tensors, rows.n, p.bits, p.in_features, p.out_features);
  read_transform(rows, p.transform, p.power);
  rows.high = static_cast<int>((int64_t{1} << (p.act_bits - 1)) - 1);
  rows.low = -rows.high;
  rows.clip = 1;
  c.m = rows.m;
  c.out_type = rows.type;
  const Tensor out = empty(leading(x), p.out_features, shim_type(c.out_type));
  c.out = out.data_ptr();
  if (c.m) {
    perform([c, rows] {
      LinearCodes call = c;
      Rows from = rows;
      run_codes(call, &from);
    });
  }
  return out;
}

Rows rows_from(const Strided& x, const char* op) {
  Rows c{};
  c.n = last_size(x.tensor);
  require(c.n >= 1, op, "the rows are empty");
  c.m = x.tensor.numel() / c.n;
  c.x = x.tensor.data_ptr();
  c.x_row = x.row;
  c.type = float_type(x.tensor.scalar_type(), op);
  return c;
}

bool alike(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

void set_norm(Rows& c, const Tensor& x, const Optional& scale, const Optional& shift, bool centred,
              double eps) {
  for (const Optional* part : {&scale, &shift}) {
    require(!*part || ((*part)->dim() == 1 && (*part)->size(0) == c.n &&
                       (*part)->scalar_type() == x.scalar_type()),
            "linear_normed", "scale and shift of the norm are [features], of the input's type");
  }
  c.front = Front::normed;
  c.norm_scale = scale ? scale->data_ptr() : nullptr;
  c.norm_shift = shift ? shift->data_ptr() : nullptr;
  c.centred = centred;
  c.eps = eps;
}

Tensor linear_rows(Tensor x, int64_t act_bits, Optional signs, Optional factor, int64_t power,
                   Tensor lines, Tensor row_scales, Optional group_scales, Optional group_offsets,
                   Optional bias, int64_t bits, int64_t in_features, int64_t out_features) {
  const Product p = read_product(act_bits, signs, factor, power, lines, row_scales, group_scales,
                                 group_offsets, bias, bits, in_features, out_features);
  const Strided at = rows_of(x);
  Rows c = rows_from(at, "linear_rows");
  return multiply(p, c, x);
}

Tensor linear_normed(Tensor x, Optional norm_scale, Optional norm_shift, bool centred, double eps,
                     int64_t act_bits, Optional signs, Optional factor, int64_t power, Tensor lines,
                     Tensor row_scales, Optional group_scales, Optional group_offsets,
                     Optional bias, int64_t bits, int64_t in_features, int64_t out_features) {
  const Product p = read_product(act_bits, signs, factor, power, lines, row_scales, group_scales,
                                 group_offsets, bias, bits, in_features, out_features);
  const Strided at = rows_of(x);
  const Optional scale = dense(norm_scale), shift = dense(norm_shift);
  Rows c = rows_from(at, "linear_normed");
  set_norm(c, x, scale, shift, centred, eps);
  return multiply(p, c, x);
}

std::tuple<Tensor, Tensor> linear_added_normed(Tensor x, Tensor added, Optional norm_scale,
                                               Optional norm_shift, bool centred, double eps,
                                               int64_t act_bits, Optional signs, Optional factor,
                                               int64_t power, Tensor lines, Tensor row_scales,
                                               Optional group_scales, Optional group_offsets,
                                               Optional bias, int64_t bits, int64_t in_features,
                                               int64_t out_features) {
  const Product p = read_product(act_bits, signs, factor, power, lines, row_scales, group_scales,
                                 group_offsets, bias, bits, in_features, out_features);
  require(alike(x, added), "linear_added_normed", "both terms have one shape and type");
  const Strided at = rows_of(x), other = rows_of(added);
  const Optional scale = dense(norm_scale), shift = dense(norm_shift);
  Rows c = rows_from(at, "linear_added_normed");
  set_norm(c, x, scale, shift, centred, eps);
  const Tensor sum = empty(leading(x), c.n, shim_type(c.type));
  c.other = other.tensor.data_ptr();
  c.other_row = other.row;
  c.sum = sum.data_ptr();
  const Tensor out = multiply(p, c, x);
  return {sum, out};
}

Tensor linear_gated(Tensor x, Optional by, int64_t gate, int64_t act_bits, Optional signs,
                    Optional factor, int64_t power, Tensor lines, Tensor row_scales,
                    Optional group_scales, Optional group_offsets, Optional bias, int64_t bits,
                    int64_t in_features, int64_t out_features) {
  const char* op = "linear_gated";
  const Product p = read_product(act_bits, signs, factor, power, lines, row_scales, group_scales,
                                 group_offsets, bias, bits, in_features, out_features);
  require(gate >= 0 && gate <= static_cast<int64_t>(Gate::relu), op, "there is no such gate");
  require(!by || alike(x, *by), op, "the gate and what it multiplies have one shape and type");
  const Strided at = rows_of(x);
  std::optional<Strided> other;
  if (by) other = rows_of(*by);
  Rows c = rows_from(at, op);
  c.front = Front::gated;
  c.gate = static_cast<Gate>(gate);
  if (other) {
    c.other = other->tensor.data_ptr();
    c.other_row = other->row;
  }
  return multiply(p, c, x);
}

}  // namespace
}  // namespace qpass

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, library) {
  library.impl("linear_rows", TORCH_BOX(&qpass::linear_rows));
  library.impl("linear_normed", TORCH_BOX(&qpass::linear_normed));
  library.impl("linear_added_normed", TORCH_BOX(&qpass::linear_added_normed));
  library.impl("linear_gated", TORCH_BOX(&qpass::linear_gated));
}
