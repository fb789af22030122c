// What operators and compiled loops did, kept to be done again in the same memory.
//
// While a thread records, every operator adds a step of its own: a copy of its plain arguments. It
// has to refuse where running again would not be the same, such as where it read a copy of a tensor
// that it had to make first.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace qpass {

class Tape {
 public:
  void add(std::function<void()> step) { steps_.push_back(std::move(step)); }
  void refuse() { refused_ = true; }
  bool refused() const { return refused_; }
  int64_t size() const { return static_cast<int64_t>(steps_.size()); }
  // forgets the last steps, and that one of them was refused
  void shorten(int64_t size) {
    steps_.resize(static_cast<size_t>(size));
    refused_ = false;
  }
  void run(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) steps_[static_cast<size_t>(i)]();
  }
  // why the last run in vain was so
  std::string error;

 private:
  std::vector<std::function<void()>> steps_;
  bool refused_ = false;
};

inline thread_local Tape* recording = nullptr;

// Does what an operator does, and keeps it where this thread records. `step` holds its arguments by
// value: pointers to memory that the recorder keeps.
template <class Step>
void perform(const Step& step) {
  if (recording) recording->add(step);
  step();
}

// An operator is about to read what it has made of its arguments outside of its step.
inline void refuse_recording() {
  if (recording) recording->refuse();
}

}  // namespace qpass
