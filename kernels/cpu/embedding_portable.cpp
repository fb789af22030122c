// Looking rows up, any machine: memory-bound, so no instruction set does better.
#include "floats.hpp"

namespace qpass {
namespace {

const char* refuse(const Embedding&) { return nullptr; }

size_t scratch(const Embedding&) { return 0; }

void run(const Embedding& c, const Part& part, void*) {
  for (int64_t i = part.row_begin; i < part.row_end; ++i) {
    const int8_t* codes = c.codes + c.indices[i] * c.n;
    const float scale = c.scales[c.indices[i]];
    for (int64_t d = 0; d < c.n; ++d) {
      store<float>(c.out_type, c.out, i * c.n + d, static_cast<float>(codes[d]) * scale);
    }
  }
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Embedding, embedding) = {
    QPASS_NAME(embedding), qpass::refuse, nullptr, qpass::scratch, qpass::run, 1, nullptr};
