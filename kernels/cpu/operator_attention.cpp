// Attention as torch sees it: tensors of any strides in, work shared by rows and ranges of keys.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

#include "arguments.hpp"
#include "floats.hpp"
#include "share.hpp"

namespace qpass {
namespace {

constexpr const char* kOp = "attention";
// rows of a part: what it writes stays in a second-level cache
constexpr int64_t kPartRows = 192;
// keys are cut where heads and rows alone make fewer parts than this, into ranges of so many at
// least; cutting costs less where rows are few
constexpr int64_t kParts = 16, kPartsOfFewRows = 64;
constexpr int64_t kRange = 128;

// numbers of an axis lie side by side in what a kernel reads
Tensor side_by_side(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : copied(t);
}

Heads heads_of(const Tensor& t) { return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

int64_t bytes_of(ScalarType type) {
  switch (type) {
    case ScalarType::Bool:
      return 1;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      return 2;
    case ScalarType::Float:
      return 4;
    default:
      return 8;
  }
}

// The mask as [batch, heads, t, s] with strides of 0 where it is broadcast. Its last axis is
// written out unless it is there already; then the copy is kept alive in `kept`.
void read_mask(Attention& c, const Tensor& mask, std::optional<Tensor>& kept) {
  const ScalarType type = mask.scalar_type();
  c.boolean = type == ScalarType::Bool;
  if (!c.boolean) c.mask_type = float_type(type, kOp);
  const int64_t dims = mask.dim(), full[4] = {c.batches, c.groups * c.n, c.t, c.s};
  require(dims <= 4, kOp, "the mask has more than four dimensions");
  int64_t sizes[4] = {1, 1, 1, 1}, strides[4] = {0, 0, 0, 0};
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t at = 4 - dims + i;
    sizes[at] = mask.size(i);
    if (sizes[at] != 1) strides[at] = mask.stride(i);
    require(sizes[at] == 1 || sizes[at] == full[at], kOp,
            "the mask does not broadcast to [batch, heads, queries, keys]");
  }
  c.mask = {mask.data_ptr(), strides[0], strides[1], strides[2]};
  if (c.s == 1 || (sizes[3] == c.s && strides[3] == 1)) return;
  refuse_recording();
  kept = empty({sizes, 3}, c.s, c.boolean ? aoti_torch_dtype_bool() : shim_type(c.mask_type));
  const int64_t bytes = bytes_of(type);
  const char* from = static_cast<const char*>(mask.data_ptr());
  char* to = static_cast<char*>(kept->data_ptr());
  for (int64_t row = 0; row < sizes[0] * sizes[1] * sizes[2]; ++row) {
    const int64_t head = row / sizes[2];
    const int64_t at = c.mask.at(head / sizes[1], head % sizes[1], row % sizes[2]);
    for (int64_t k = 0; k < c.s; ++k, to += bytes) {
      std::memcpy(to, from + (at + k * strides[3]) * bytes, static_cast<size_t>(bytes));
    }
  }
  int64_t stride = c.s;
  for (int i = 2; i >= 0; --i) {
    strides[i] = sizes[i] == 1 ? 0 : stride;
    stride *= sizes[i];
  }
  c.mask = {kept->data_ptr(), strides[0], strides[1], strides[2]};
}

// rows of the result from what the ranges of keys left of them
template <class T>
void merge(const Attention& c, int64_t row_begin, int64_t row_end) {
  for (int64_t line = row_begin; line < row_end; ++line) {
    const T* from = static_cast<const T*>(c.partial) + line * c.splits * (c.e + 2);
    const int64_t head = line / c.rows(), row = line % c.rows();
    const int64_t query = head / c.groups * c.t + row / c.n;
    const int64_t to = (query * c.groups * c.n + head % c.groups * c.n + row % c.n) * c.e;
    T top = -std::numeric_limits<T>::infinity();
    for (int64_t i = 0; i < c.splits; ++i) top = std::fmax(top, from[i * (c.e + 2) + c.e]);
    T sum = 0;
    constexpr int64_t kColumns = 64;
    // what each range counts; a NaN in any of them is in its sum
    for (int64_t i = 0; i < c.splits; ++i) {
      const T* part = from + i * (c.e + 2);
      if (part[c.e + 1] != 0) sum += part[c.e + 1] * std::exp(part[c.e] - top);
    }
    for (int64_t j = 0; j < c.e; j += kColumns) {
      const int64_t columns = c.e - j < kColumns ? c.e - j : kColumns;
      T y[kColumns] = {};
      for (int64_t i = 0; i < c.splits; ++i) {
        const T* part = from + i * (c.e + 2);
        if (part[c.e + 1] == 0) continue;
        const T factor = std::exp(part[c.e] - top) / sum;
        for (int64_t k = 0; k < columns; ++k) y[k] += part[j + k] * factor;
      }
      for (int64_t k = 0; k < columns; ++k) store<T>(c.type, c.out, to + j + k, y[k]);
    }
  }
}

void run_attention(Attention& c) {
  const Kernel<Attention>& kernel = choose(c);
  const int64_t heads = c.batches * c.groups, rows = c.rows();
  const int64_t threads = torch::stable::get_num_threads();
  // ranges of keys depend on sizes alone, so that results do not depend on threads
  const int64_t units = heads * ((rows + kPartRows - 1) / kPartRows);
  const int64_t wanted = rows <= kPartRows / 4 ? kPartsOfFewRows : kParts;
  int64_t splits = (wanted + units - 1) / units;
  const int64_t most = (c.s + kRange - 1) / kRange;
  splits = splits < most ? splits : most;
  c.split_keys = rounded_up((c.s + splits - 1) / splits, 64);
  c.splits = (c.s + c.split_keys - 1) / c.split_keys;
  const int64_t blocks = heads * c.splits;
  // rows of a part, which do not change a result, may
  int64_t chunk = kPartRows;
  while (chunk > 48 && blocks * ((rows + chunk - 1) / chunk) < 4 * threads) chunk /= 2;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  c.most_rows = rows < chunk ? rows : chunk;
  const bool wide = c.type == Float::f64;
  if (c.splits > 1) {
    const int64_t numbers = heads * rows * c.splits * (c.e + 2);
    c.partial = call_memory.reserve(static_cast<size_t>(numbers) * (wide ? 8 : 4));
  }
  // a number is read in about a tenth of a nanosecond, and multiplied with 100 rows in one
  const double numbers = static_cast<double>(heads * c.s) * static_cast<double>(c.d + c.e);
  const double ns = numbers * (0.1 + static_cast<double>(rows) / 100) * (c.causal ? 0.5 : 1);
  const size_t bytes = kernel.scratch(c);
  // ranges of keys that one thread reads after another, asking for the next ahead
  const int64_t run = chunks > 1 || blocks < 4 * threads ? 1 : blocks / (4 * threads);
  const int64_t runs = (blocks + run - 1) / run;
  share_uneven(chunks * runs, ns, [&](int64_t item) {
    // the last rows first, who see most
    const int64_t block = item % runs * run, first = (chunks - 1 - item / runs) * chunk;
    const int64_t last = first + chunk < rows ? first + chunk : rows;
    const int64_t end = block + run < blocks ? block + run : blocks;
    kernel.run(c, {first, last, block, end}, thread_memory.reserve(bytes));
  });
  if (c.splits > 1) {
    share(heads * rows, static_cast<double>(c.splits * (c.e + 30)) / 4,
          [&](int64_t begin, int64_t end) {
            wide ? merge<double>(c, begin, end) : merge<float>(c, begin, end);
          });
  }
  call_memory.release_large();
}

Tensor attention(Tensor query_in, Tensor key_in, Tensor value_in, std::optional<Tensor> mask,
                 bool is_causal, double scale) {
  require(query_in.dim() == 4 && key_in.dim() == 4 && value_in.dim() == 4, kOp,
          "query, key and value are [batch, heads, length, width]");
  const ScalarType type = query_in.scalar_type();
  require(key_in.scalar_type() == type && value_in.scalar_type() == type, kOp,
          "query, key and value share one dtype");
  const Tensor query = side_by_side(query_in), key = side_by_side(key_in);
  const Tensor value = side_by_side(value_in);
  Attention c{};
  c.type = float_type(type, kOp);
  c.batches = query.size(0);
  c.groups = key.size(1);
  require(c.groups >= 1 && query.size(1) % c.groups == 0, kOp,
          "the query heads are no multiple of the key heads");
  c.n = query.size(1) / c.groups;
  c.t = query.size(2);
  c.s = key.size(2);
  c.d = query.size(3);
  c.e = value.size(3);
  require(key.size(0) == c.batches && value.size(0) == c.batches && key.size(3) == c.d &&
              value.size(1) == c.groups && value.size(2) == c.s,
          kOp, "query, key and value do not fit together");
  c.query = heads_of(query);
  c.key = heads_of(key);
  c.value = heads_of(value);
  c.causal = is_causal;
  c.scale = scale;
  std::optional<Tensor> kept;
  if (mask) read_mask(c, *mask, kept);
  // [batch, heads, queries, width] in the memory order of [batch, queries, heads, width]
  const auto step = [](int64_t size) { return size > 1 ? size : 1; };
  const int64_t heads = c.groups * c.n, row = step(heads) * step(c.e);
  const int64_t sizes[4] = {c.batches, heads, c.t, c.e};
  const int64_t strides[4] = {step(c.t) * row, step(c.e), row, 1};
  const Tensor out = strided(4, sizes, strides, shim_type(c.type));
  c.out = out.data_ptr();
  if (out.numel() && c.s == 0) {
    perform([to = c.out, bytes = static_cast<size_t>(out.numel() * bytes_of(type))] {
      std::memset(to, 0, bytes);
    });
  } else if (out.numel()) {
    perform([c] {
      Attention call = c;
      run_attention(call);
    });
  }
  return out;
}

}  // namespace
}  // namespace qpass

STABLE_TORCH_LIBRARY_IMPL(qpass, CPU, library) {
  library.impl("attention", TORCH_BOX(&qpass::attention));
}
