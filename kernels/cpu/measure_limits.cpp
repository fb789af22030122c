// What Python times to know the limits of kernels.
#include "exported.hpp"
#include "share.hpp"

// Without lines, each of torch's threads multiplies `steps` steps; otherwise they share the reading
// of `steps` lines. All of it `rounds` times over. Returns what was seen.
QPASS_EXPORT uint32_t qpass_limits(const uint8_t* lines, int number, int64_t steps,
                                   int64_t rounds) {
  uint32_t seen = 0;
  const qpass::Limits call{static_cast<qpass::Number>(number), lines, &seen};
  const qpass::Kernel<qpass::Limits>& kernel = qpass::choose(call);
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      const int64_t first = lines ? steps * thread / threads : 0;
      const int64_t last = lines ? steps * (thread + 1) / threads : steps;
      for (int64_t r = 0; r < rounds; ++r) kernel.run(call, {first, last, 0, 1}, nullptr);
    }
  });
  return seen;
}

// The number of products in a step, and the name of the kernel that measures.
QPASS_EXPORT int64_t qpass_limit_products() { return qpass::kStepProducts; }
QPASS_EXPORT const char* qpass_limit_kernel() {
  return qpass::choose(qpass::Limits{qpass::Number::int8, nullptr, nullptr}).name;
}
