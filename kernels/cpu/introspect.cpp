// What Python may ask of the library: instruction sets, a cap for tests, and why a kernel was
// chosen.
#include <cstring>

#include "exported.hpp"
#include "select.hpp"

namespace {

int64_t write(const std::string& text, char* buffer, int64_t size) {
  if (static_cast<int64_t>(text.size()) < size) std::memcpy(buffer, text.c_str(), text.size() + 1);
  return static_cast<int64_t>(text.size());
}

qpass::Weight weight(int bits, int64_t n, int64_t k, int64_t groups, int scaled, int shifted) {
  static const uint16_t kPresent = 0;
  qpass::Weight w{};
  w.bits = bits;
  w.n = n;
  w.k = k;
  w.groups = groups;
  w.width = k / groups;
  w.group_lines = (w.width + w.columns_per_line() - 1) / w.columns_per_line();
  w.scales = scaled ? &kPresent : nullptr;
  w.offsets = shifted ? &kPresent : nullptr;
  return w;
}

}  // namespace

QPASS_EXPORT int qpass_newest() { return static_cast<int>(qpass::newest()); }

QPASS_EXPORT int qpass_cap(int isa) {
  return static_cast<int>(qpass::cap(static_cast<qpass::Isa>(isa)));
}

QPASS_EXPORT int qpass_limit_thread(int isa) { return qpass::limit_thread(isa); }

QPASS_EXPORT int qpass_built(int isa) {
  for (auto k = qpass::kernels<qpass::LinearCodes>(); *k; ++k) {
    if ((*k)->isa == static_cast<qpass::Isa>(isa)) return 1;
  }
  return 0;
}

// each writes the explanation and returns its length; a buffer too short is left untouched
QPASS_EXPORT int64_t qpass_explain_linear_codes(int64_t m, int bits, int64_t n, int64_t k,
                                                int64_t groups, int scaled, int shifted, int type,
                                                char* buffer, int64_t size) {
  qpass::LinearCodes c{};
  c.weight = weight(bits, n, k, groups, scaled, shifted);
  c.m = m;
  c.out_type = static_cast<qpass::Float>(type);
  return write(qpass::explain(c), buffer, size);
}

QPASS_EXPORT int64_t qpass_explain_linear_real(int64_t m, int bits, int64_t n, int64_t k,
                                               int64_t groups, int scaled, int shifted, int type,
                                               char* buffer, int64_t size) {
  qpass::LinearReal c{};
  c.weight = weight(bits, n, k, groups, scaled, shifted);
  c.m = m;
  c.type = static_cast<qpass::Float>(type);
  return write(qpass::explain(c), buffer, size);
}

QPASS_EXPORT int64_t qpass_explain_rows(int64_t m, int64_t n, int64_t order, int64_t power,
                                        int bits, int type, char* buffer, int64_t size) {
  static const float kPresent = 0;
  static float scale = 0;
  qpass::Rows c{};
  c.m = m;
  c.n = n;
  c.order = order;
  c.power = power;
  c.signs = order ? &kPresent : nullptr;
  c.type = static_cast<qpass::Float>(type);
  c.high = bits ? (1 << (bits - 1)) - 1 : 0;
  c.low = -c.high;
  c.clip = 1;
  c.scales = bits ? &scale : nullptr;
  c.out = bits ? nullptr : &scale;
  return write(qpass::explain(c), buffer, size);
}

QPASS_EXPORT int64_t qpass_explain_embedding(int64_t m, int64_t rows, int64_t n, int type,
                                             char* buffer, int64_t size) {
  qpass::Embedding c{};
  c.m = m;
  c.rows = rows;
  c.n = n;
  c.out_type = static_cast<qpass::Float>(type);
  return write(qpass::explain(c), buffer, size);
}

QPASS_EXPORT int64_t qpass_explain_attention(int64_t batches, int64_t heads, int64_t groups,
                                             int64_t t, int64_t s, int64_t d, int64_t e, int type,
                                             int masked, int mask_type, char* buffer,
                                             int64_t size) {
  static const float kPresent = 0;
  qpass::Attention c{};
  c.batches = batches;
  c.groups = groups;
  c.n = heads / groups;
  c.t = t;
  c.s = s;
  c.d = d;
  c.e = e;
  c.type = static_cast<qpass::Float>(type);
  // a type below 0 stands for a boolean mask
  c.mask.data = masked ? &kPresent : nullptr;
  c.boolean = mask_type < 0;
  c.mask_type = c.boolean ? qpass::Float::f32 : static_cast<qpass::Float>(mask_type);
  return write(qpass::explain(c), buffer, size);
}
