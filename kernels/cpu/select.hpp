// Which kernel serves a call: the newest instruction set of this machine that does not refuse it.
#pragma once

#include <string>

#include "kernel.hpp"

namespace qpass {

// null-terminated tables written by CMake from the files of this folder, newest set first
template <class Call>
const Kernel<Call>* const* kernels();

// the cap of this thread
Isa capped_at();

// whether the machine has the set, and the cap does not take it away
bool usable(Isa isa, Isa cap);

// the newest set of this machine; the emulated one counts as none
Isa newest();

// Use no set above `isa` from now on, in threads without a limit of their own; the cap before. The
// emulated set runs only while it is itself the cap.
Isa cap(Isa isa);

// The same for the calls of this thread alone (below 0: no limit of its own); the limit before.
int limit_thread(int isa);

const char* isa_name(Isa isa);

template <class Call>
const Kernel<Call>& choose(const Call& call) {
  const Kernel<Call>* const* k = kernels<Call>();
  const Isa cap = capped_at();
  // the portable kernel ends every table and refuses nothing
  while (!usable((*k)->isa, cap) || (*k)->refuse(call)) ++k;
  return **k;
}

// "name" of the chosen kernel, then a line "name: reason" for each one passed over
template <class Call>
std::string explain(const Call& call) {
  std::string refused;
  for (const Kernel<Call>* const* k = kernels<Call>();; ++k) {
    const char* why = nullptr;
    if (!usable((*k)->isa, capped_at())) {
      why = "the machine lacks the instructions, or they are capped";
    } else {
      why = (*k)->refuse(call);
    }
    if (!why) return (*k)->name + refused;
    refused += std::string("\n") + (*k)->name + ": " + why;
  }
}

}  // namespace qpass
