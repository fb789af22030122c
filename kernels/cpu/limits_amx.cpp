// Products of whole tiles of bytes or of bfloat16, four tiles of sums in turn.
#include "amx.hpp"
#include "limits.hpp"

namespace qpass {
namespace {

// reads and products of float32 are the next lower set's
const char* refuse(const Limits& c) {
  if (c.lines) return "it only multiplies";
  return c.number == Number::float32 ? "tiles do not hold float32" : nullptr;
}

template <bool Bytes>
uint32_t multiply(int64_t steps) {
  constexpr int64_t kTileProducts = 16 * 16 * (Bytes ? 64 : 32);
  alignas(64) uint8_t ones[1024];
  alignas(64) uint32_t sums[4 * 256];
  for (auto& one : ones) one = 1;
  configure_2x2(16);
  zero_2x2();
  tile_load<kA0>(ones, kLine);
  tile_load<kA1>(ones, kLine);
  tile_load<kB0>(ones, kLine);
  tile_load<kB1>(ones, kLine);
  for (int64_t s = 0; s < steps * kStepProducts / (4 * kTileProducts); ++s) {
    if constexpr (Bytes) {
      tile_dot_su8<kC0, kA0, kB0>();
      tile_dot_su8<kC1, kA0, kB1>();
      tile_dot_su8<kC2, kA1, kB0>();
      tile_dot_su8<kC3, kA1, kB1>();
    } else {
      tile_dot_bf16<kC0, kA0, kB0>();
      tile_dot_bf16<kC1, kA0, kB1>();
      tile_dot_bf16<kC2, kA1, kB0>();
      tile_dot_bf16<kC3, kA1, kB1>();
    }
  }
  store_2x2(sums);
  tile_release();
  return sums[0] ^ sums[256] ^ sums[512] ^ sums[768];
}

void run(const Limits& c, const Part& part, void*) {
  const int64_t steps = part.row_end - part.row_begin;
  leave(c, c.number == Number::int8 ? multiply<true>(steps) : multiply<false>(steps));
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Limits, limits) = {
    QPASS_NAME(limits), qpass::refuse, nullptr, qpass::no_limits_scratch, qpass::run, 1, nullptr};
