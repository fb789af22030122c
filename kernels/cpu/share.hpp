// How the work of a call is shared among torch's threads, and the memory it uses.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "select.hpp"

namespace qpass {

// Memory of one thread, kept from call to call unless it was large.
class Memory {
 public:
  ~Memory() { std::free(data_); }
  void* reserve(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = std::aligned_alloc(64, size_);
      if (!data_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return data_;
  }
  void release_large() {
    constexpr size_t kKept = size_t{4} << 20;
    if (size_ <= kKept) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// `call_memory` holds what all threads of a call read, `thread_memory` what one part writes
inline thread_local Memory call_memory, thread_memory;

// Cuts one allocation into aligned pieces.
class Pieces {
 public:
  template <class T>
  size_t add(int64_t count) {
    const size_t at = bytes_;
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return at;
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

inline int64_t rounded_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }

// nanoseconds of work that repay waking a thread
constexpr double kWorthAThread = 4000;

// Runs f over [0, count) where one item takes about `nanoseconds`: serially if waking threads costs
// more.
template <class F>
void share(int64_t count, double nanoseconds, const F& f) {
  if (count <= 0) return;
  const double items = kWorthAThread / nanoseconds + 1;
  const int64_t grain = items < static_cast<double>(count) ? static_cast<int64_t>(items) : count;
  torch::stable::parallel_for(0, count, grain, f);
}

// Runs f(item) for every item of [0, count), each taken by whichever thread comes free; all of them
// together take about `nanoseconds`.
template <class F>
void share_uneven(int64_t count, double nanoseconds, const F& f) {
  const double worth = nanoseconds / kWorthAThread;
  int64_t workers = torch::stable::get_num_threads();
  if (workers > count) workers = count;
  if (worth < static_cast<double>(workers)) workers = static_cast<int64_t>(worth) + 1;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(item);
    thread_memory.release_large();
  });
}

// Runs every part of a call. Work is cut into chunks of rows only when blocks alone are too few.
template <class Call>
void run_parts(const Kernel<Call>& kernel, const Call& call, int64_t rows, int64_t blocks,
               double ns) {
  constexpr int64_t kRowChunk = 96;
  const int64_t threads = torch::stable::get_num_threads();
  const bool cut_rows = blocks < 4 * threads && rows > kRowChunk && threads > 1;
  const int64_t chunk = cut_rows ? kRowChunk : rows;
  const int64_t chunks = (rows + chunk - 1) / chunk;
  const size_t bytes = kernel.scratch(call);
  const double each = ns / static_cast<double>(chunks * blocks);
  share(chunks * blocks, each, [&](int64_t begin, int64_t end) {
    void* memory = bytes ? thread_memory.reserve(bytes) : nullptr;
    while (begin < end) {
      const int64_t c = begin / blocks, stop = end < (c + 1) * blocks ? end : (c + 1) * blocks;
      const int64_t last = (c + 1) * chunk < rows ? (c + 1) * chunk : rows;
      kernel.run(call, {c * chunk, last, begin - c * blocks, stop - c * blocks}, memory);
      begin = stop;
    }
    thread_memory.release_large();
  });
}

}  // namespace qpass
