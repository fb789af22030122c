// How calls of kernels are carried out: work shared, memory found.
#pragma once

#include "share.hpp"

namespace qpass {

template <class Call>
inline void run_linear(const Call& call, const Kernel<Call>& kernel) {
  const Weight& w = call.weight;
  // read from memory at about 10 bytes, multiplied at about 100 a nanosecond and thread
  const double bytes = static_cast<double>(w.n) * static_cast<double>(w.padded_k()) * w.bits / 8;
  const double products = static_cast<double>(w.n) * static_cast<double>(w.padded_k() * call.m);
  if (kernel.prepare) {
    share(call.m, static_cast<double>(w.k) / 20,
          [&](int64_t begin, int64_t end) { kernel.prepare(call, begin, end); });
  }
  run_parts(kernel, call, call.m, w.blocks(), bytes / 10 + products / 100);
}

inline void run_rows(const Rows& c) {
  if (c.m == 0 || c.n == 0) return;
  const double mixing = c.signs ? static_cast<double>(c.order) / 16 + 1 : 0;
  run_parts(choose(c), c, c.m, 1, static_cast<double>(c.m * c.n) * (0.3 + mixing / 4));
}

// Codes times a weight; with `rows`, the codes and scales are made of these first.
inline void run_codes(LinearCodes& c, Rows* rows = nullptr) {
  const Kernel<LinearCodes>& kernel = choose(c);
  const int64_t padded_k = c.weight.padded_k(), count = rounded_up(c.m, kernel.rows_at_once);
  const bool whole =
      padded_k == c.weight.k && count == c.m && (!kernel.in_place || kernel.in_place(c));
  Pieces pieces;
  const size_t codes = pieces.add<int8_t>(rows ? c.m * c.weight.k : 0);
  const size_t scales = pieces.add<float>(rows ? c.m : 0);
  const size_t padded = pieces.add<int8_t>(whole ? 0 : count * padded_k + kLine);
  const size_t sums = pieces.add<float>(c.m * c.weight.groups);
  const size_t starts = pieces.add<int32_t>(c.m * c.weight.groups);
  char* memory = static_cast<char*>(call_memory.reserve(pieces.bytes()));
  if (rows) {
    rows->codes = reinterpret_cast<int8_t*>(memory + codes);
    rows->scales = reinterpret_cast<float*>(memory + scales);
    c.codes = rows->codes;
    c.scales = rows->scales;
    run_rows(*rows);
  }
  c.padded = whole ? const_cast<int8_t*>(c.codes) : reinterpret_cast<int8_t*>(memory + padded);
  c.sums = reinterpret_cast<float*>(memory + sums);
  c.starts = reinterpret_cast<int32_t*>(memory + starts);
  run_linear(c, kernel);
  call_memory.release_large();
}

}  // namespace qpass
