// kvartz: the tools, one program. `kvartz img ...`, or by the name it is called by (qemu-img).
#include <fmt/core.h>

#include <csignal>
#include <string_view>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/print.h"
#include "base/text.h"
#include "cli/tool.h"

namespace kvartz::cli {
namespace {

constexpr Tool kTools[] = {
    {"img", "qemu-img", "make, examine, convert and repair disk images", RunImg},
    {"io", "qemu-io", "read and write a disk image by commands", RunIo},
    {"nbd", "qemu-nbd", "offer a disk image to NBD clients", RunNbd},
};

int Usage(int code) {
  Print(code ? stderr : stdout, "usage: kvartz TOOL [argument...]\n\n");
  for (const Tool& tool : kTools)
    Print(code ? stderr : stdout, "  {:<8} {} (as {})\n", tool.verb, tool.help, tool.alias);
  Print(code ? stderr : stdout, "\n'kvartz TOOL --help' says more.\n");
  return code;
}

int Run(std::vector<std::string> words) {
  std::string_view called = words.empty() ? std::string_view() : words[0];
  called = called.substr(called.rfind('/') + 1);
  for (const Tool& tool : kTools) {
    if (called != tool.alias) continue;
    log::SetProgram(called);
    std::string name(called);
    words.erase(words.begin());
    return tool.run({std::move(name), std::move(words)});
  }
  if (words.size() < 2) return Usage(1);
  std::string verb = words[1];
  if (verb == "--help" || verb == "-h" || verb == "help") return Usage(0);
  std::vector<std::string_view> names;
  for (const Tool& tool : kTools) {
    names.push_back(tool.verb);
    if (verb != tool.verb) continue;
    std::string name = "kvartz " + verb;
    log::SetProgram(name);
    words.erase(words.begin(), words.begin() + 2);
    return tool.run({std::move(name), std::move(words)});
  }
  std::string_view nearest = NearestName(verb, names);
  Print(stderr, "kvartz: there is no tool '{}'{}; see kvartz --help\n", verb,
        nearest.empty() ? "" : fmt::format(" (did you mean '{}'?)", nearest));
  return 1;
}

int Main(std::vector<std::string> words) {
  OccupyStandardStreams();
  signal(SIGPIPE, SIG_IGN);
  int code = Run(std::move(words));
  if (FinishOutput()) return code;
  Print(stderr, "kvartz: cannot write to standard output\n");
  return code ? code : 1;
}

}  // namespace
}  // namespace kvartz::cli

int main(int argc, char** argv) { return kvartz::cli::Main({argv, argv + argc}); }
