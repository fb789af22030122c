// Products of bytes in plain C++, and 64 bytes read at a time.
#include "limits.hpp"
#include "vectors.hpp"

namespace qpass {
namespace {

// what a compiler makes of a sum of products of widened bytes, which lie in the nearest cache
uint32_t multiply(int64_t steps) {
  constexpr int kLength = 1024;
  int16_t a[kLength], b[kLength];
  for (int i = 0; i < kLength; ++i) {
    a[i] = static_cast<int16_t>(i % 16);
    b[i] = static_cast<int16_t>(i % 128 - 64);
  }
  uint32_t total = 0;
  for (int64_t s = 0; s < steps * (kStepProducts / kLength); ++s) {
    // opaque, or the sum is computed once
    __asm__ volatile("" : "+m"(a), "+m"(b));
    int32_t sum = 0;
    for (int i = 0; i < kLength; ++i) sum += a[i] * b[i];
    total += static_cast<uint32_t>(sum);
  }
  return total;
}

uint32_t multiply_floats(int64_t steps) {
  constexpr int kChains = 8, kLanes = kRegisterBytes / 4;
  Register<float> a = Register<float>{} + 0.5f, b = a, sums[kChains] = {};
  for (int64_t s = 0; s < steps * kStepProducts / (kChains * kLanes); ++s) {
    __asm__ volatile("" : "+m"(a), "+m"(b));
    repeat<kChains>(QPASS_STEP(auto i) { sums[i] += a * b; });
  }
  float total = 0;
  for (const auto& sum : sums) total += sum[0];
  return static_cast<uint32_t>(static_cast<int64_t>(total));
}

uint32_t read(const uint8_t* line, int64_t count) {
  constexpr int kParts = kLine / kRegisterBytes;
  Register<uint32_t> seen[kParts] = {};
  for (int64_t l = 0; l < count; ++l, line += kLine) {
    __builtin_prefetch(line + kReadAhead);
    repeat<kParts>(QPASS_STEP(auto i) {
      Register<uint32_t> v;
      __builtin_memcpy(&v, line + i * kRegisterBytes, sizeof(v));
      seen[i] ^= v;
    });
  }
  uint32_t total = 0;
  for (const auto& part : seen) {
    for (size_t i = 0; i < kRegisterBytes / 4; ++i) total ^= part[i];
  }
  return total;
}

}  // namespace
}  // namespace qpass

QPASS_KERNEL(Limits, limits) = {
    QPASS_NAME(limits),
    qpass::refuse_no_limits,
    nullptr,
    qpass::no_limits_scratch,
    qpass::run_limits<qpass::read, qpass::multiply, qpass::multiply_floats>,
    1,
    nullptr};
