// VERIFY(cond): an invariant of our own code. Always on: prints place and condition, then aborts.
// Never for anything that a guest, a user, a file or a peer can cause.
#pragma once

namespace kvartz {
[[noreturn]] void VerifyFailed(const char* condition, const char* file, int line);
}

#define VERIFY(cond)                                     \
  do {                                                   \
    if (!(cond)) [[unlikely]]                            \
      ::kvartz::VerifyFailed(#cond, __FILE__, __LINE__); \
  } while (0)
