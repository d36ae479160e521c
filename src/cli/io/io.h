// kvartz io (qemu-io): reads and writes images by commands, for tests and rescue. Commands as rows;
// words, options, output and exit codes are those of qemu-io 7.2.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/fiber.h"
#include "cli/arguments.h"
#include "cli/img/img.h"

namespace kvartz::cli::io {

// How an image is opened, kept for reopen.
struct OpenHow {
  img::ImageName image = {};
  block::NodeOptions node = {.discard_unmap = true};
  block::Options more = {};  // -o of open and reopen
  bool snapshot = false;     // what is written goes to a file of its own
  bool copy_on_read = false;
};

// Buffers begin at odd addresses, to see who minds.
enum class Align : uint8_t { kAsAllocated, kOdd };

// Loop-owned; everything in a fiber.
class Console {
 public:
  Console(std::string program, EventLoop& loop) : session(std::move(program), loop) {}

  img::Session session;
  block::NodePtr node = nullptr;  // the image that is open; null: none
  OpenHow how = {};
  Align align = Align::kAsAllocated;
  bool quit = false;

  // Errors: cannot be opened.
  Result<> Open(OpenHow how);
  Result<> Close();  // of the open one, once nothing is under way any more

  // Requests that aren't waited for.
  void Began() { under_way_++; }
  void Ended() {
    if (--under_way_ == 0) idle_.WakeAll();
  }
  void AwaitIdle() {
    while (under_way_ > 0) idle_.Wait();
  }

  // One line. False: it failed, which was said.
  bool Run(const std::string& line);

 private:
  unsigned under_way_ = 0;
  FiberQueue idle_;
};

// False: it failed and said so. Errors are printed by Console.
using Outcome = Result<bool>;

struct Command {
  std::string_view name = {};
  std::string_view alias;            // empty: none
  int min_words = 0, max_words = 0;  // after the name; -1: any number
  std::string_view synopsis = {};    // of the words
  std::string_view help = {};        // one line
  std::span<const OptionSpec> options = {};
  bool needs_image = true;
  Outcome (*run)(Console& console, const Arguments& arguments) = nullptr;
};
std::span<const Command* const> Commands();
std::string SynopsisOf(const Command& command);

// ---- what commands have in common ----

// Prints a line to standard output; false.
bool Refuse(const std::string& text);
bool Misused(const Command& command);  // its synopsis; false
// Sizes as people write them ("64k"); nothing, after saying so, if it is none.
std::optional<uint64_t> TakeBytes(const std::string& text);
std::optional<uint8_t> TakePattern(const std::string& text);
std::string BytesText(double bytes);  // "1.062 MiB"
// "read 512/512 bytes at offset 0" and the rates, or with -C numbers and commas.
struct Report {
  std::string verb;  // "read", "wrote", "discard"
  uint64_t offset = 0, bytes = 0;
  int64_t began_ns = 0;
};
void PrintReport(const Console& console, const Arguments& arguments, const Report& report);

// Cache and discard modes of a command line or of open, into `node`.
Result<> ApplyOpenModes(const Arguments& arguments, block::NodeOptions& node);

// clang-format off
#define KVARTZ_IO_COMMANDS(X) \
  X(AioFlush) X(AioRead) X(AioWrite) X(Alloc) X(Close) X(Discard) X(Flush) X(Help) X(Info) \
  X(Length) X(Map) X(Open) X(Quit) X(Read) X(Readv) X(Reopen) X(Sleep) X(Truncate) \
  X(Write) X(Writev)
// clang-format on
#define KVARTZ_DECLARE_COMMAND(name) extern const Command k##name;
KVARTZ_IO_COMMANDS(KVARTZ_DECLARE_COMMAND)
#undef KVARTZ_DECLARE_COMMAND

}  // namespace kvartz::cli::io
