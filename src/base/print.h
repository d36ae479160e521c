// Printing for people. What can't be written is left out, and nobody ends for it: a reader may have
// gone away.
#pragma once

#include <fmt/format.h>

#include <cstdio>
#include <string>
#include <utility>

namespace kvartz {

template <typename... Args>
void Print(std::FILE* to, fmt::format_string<Args...> format, Args&&... args) {
  std::string text = fmt::format(format, std::forward<Args>(args)...);
  [[maybe_unused]] size_t written = std::fwrite(text.data(), 1, text.size(), to);
}

template <typename... Args>
void Print(fmt::format_string<Args...> format, Args&&... args) {
  Print(stdout, format, std::forward<Args>(args)...);
}

// First of all in a program: standard streams that are closed become /dev/null's, or the next file
// that is opened would be one, and be printed into.
void OccupyStandardStreams();

// Last of all: whether standard output has all that was printed, or its reader doesn't want it
// (`kvartz img info ... | head`).
bool FinishOutput();

}  // namespace kvartz
