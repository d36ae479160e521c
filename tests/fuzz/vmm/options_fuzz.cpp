// The command line: arguments, separated by NUL bytes.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "vmm/command_line.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text(reinterpret_cast<const char*>(data), size);
  std::vector<const char*> arguments;
  for (size_t at = 0; at < text.size(); at += std::string_view(arguments.back()).size() + 1) {
    arguments.push_back(text.c_str() + at);
  }
  auto line = kvartz::vmm::ParseCommandLine(arguments);
  // A refusal is one line.
  if (!line && line.error().what.empty()) __builtin_trap();
  return 0;
}
