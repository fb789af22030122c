// How Python records what a compiled graph does, and has it done again.
#include "tape.hpp"

#include <array>
#include <exception>

#include "exported.hpp"

namespace {

using qpass::Tape;

// what a compiled loop takes: addresses and sizes, which are passed alike
constexpr size_t kMostArguments = 192;

template <size_t>
using Word = int64_t;

template <size_t... I>
void call(void* function, const int64_t* arguments, std::index_sequence<I...>) {
  reinterpret_cast<void (*)(Word<I>...)>(function)(arguments[I]...);
}

using Caller = void (*)(void*, const int64_t*);

template <size_t N>
void call_with(void* function, const int64_t* arguments) {
  call(function, arguments, std::make_index_sequence<N>{});
}

template <size_t... N>
constexpr std::array<Caller, sizeof...(N)> callers(std::index_sequence<N...>) {
  return {call_with<N>...};
}

constexpr auto kCallers = callers(std::make_index_sequence<kMostArguments + 1>{});

}  // namespace

QPASS_EXPORT void* qpass_tape_new() { return new Tape; }

QPASS_EXPORT void qpass_tape_free(void* tape) { delete static_cast<Tape*>(tape); }

// operators of this thread add to a tape from now on; to none where it is null
QPASS_EXPORT void qpass_tape_record(void* tape) { qpass::recording = static_cast<Tape*>(tape); }

QPASS_EXPORT int qpass_tape_refused(const void* tape) {
  return static_cast<const Tape*>(tape)->refused();
}

QPASS_EXPORT int64_t qpass_tape_size(const void* tape) {
  return static_cast<const Tape*>(tape)->size();
}

// adds a call of a C function whose arguments are addresses and sizes; 0 where they are too many
QPASS_EXPORT int qpass_tape_add_call(void* tape, void* function, const int64_t* arguments,
                                     int64_t count) {
  if (count < 0 || count > static_cast<int64_t>(kMostArguments)) return 0;
  std::vector<int64_t> kept(arguments, arguments + count);
  const Caller caller = kCallers[static_cast<size_t>(count)];
  static_cast<Tape*>(tape)->add(
      [function, caller, kept = std::move(kept)] { caller(function, kept.data()); });
  return 1;
}

QPASS_EXPORT void qpass_tape_shorten(void* tape, int64_t size) {
  static_cast<Tape*>(tape)->shorten(size);
}

// does the steps of [begin, end); null once all are done, else why not
QPASS_EXPORT const char* qpass_tape_run(void* tape, int64_t begin, int64_t end) {
  auto* const steps = static_cast<Tape*>(tape);
  try {
    steps->run(begin, end);
    return nullptr;
  } catch (const std::exception& error) {
    steps->error = error.what();
  } catch (...) {
    steps->error = "an unknown error";
  }
  return steps->error.c_str();
}
