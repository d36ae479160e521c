// The programs in this one: each answers to its own name (argv[0]) and as a word after `kvartz`.
#pragma once

#include <string>
#include <vector>

namespace kvartz::cli {

// `name`: as messages begin ("qemu-img", "kvartz img"). Answer: the exit code.
struct ToolCall {
  std::string name;
  std::vector<std::string> words;
};

struct Tool {
  const char* verb;   // kvartz VERB
  const char* alias;  // the name that it goes by elsewhere
  const char* help;
  int (*run)(const ToolCall& call);
};

constexpr const char* kVersion = "0.1.0";

int RunImg(const ToolCall& call);
int RunIo(const ToolCall& call);
int RunNbd(const ToolCall& call);

}  // namespace kvartz::cli
