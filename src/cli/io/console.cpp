// One command line at a time, and what commands have in common.
#include <fmt/core.h>

#include <cmath>
#include <ctime>

#include "base/print.h"
#include "block/options.h"
#include "cli/img/overlay.h"
#include "cli/io/io.h"

namespace kvartz::cli::io {
namespace {

#define KVARTZ_LIST_COMMAND(name) &k##name,
const Command* const kCommands[] = {KVARTZ_IO_COMMANDS(KVARTZ_LIST_COMMAND)};
#undef KVARTZ_LIST_COMMAND

std::vector<std::string> Words(const std::string& line) {
  std::vector<std::string> words;
  for (size_t at = 0; (at = line.find_first_not_of(" \t\n", at)) != std::string::npos;) {
    size_t end = std::min(line.find_first_of(" \t\n", at), line.size());
    words.push_back(line.substr(at, end - at));
    at = end;
  }
  return words;
}

const Command* FindCommand(const std::string& name) {
  for (const Command* command : kCommands) {
    if (command->name == name || (!command->alias.empty() && command->alias == name))
      return command;
  }
  return nullptr;
}

std::string WantedCount(const Command& command) {
  if (command.max_words < 0) return fmt::format("at least {} arguments", command.min_words);
  if (command.min_words == command.max_words) return fmt::format("{} arguments", command.min_words);
  return fmt::format("between {} and {} arguments", command.min_words, command.max_words);
}

}  // namespace

std::span<const Command* const> Commands() { return kCommands; }

std::string SynopsisOf(const Command& command) {
  return fmt::format("{} {}{}-- {}", command.name, command.synopsis,
                     command.synopsis.empty() ? "" : " ", command.help);
}

bool Console::Run(const std::string& line) {
  std::vector<std::string> words = Words(line);
  if (words.empty()) return true;
  auto complain = [](const std::string& text) {
    fflush(stdout);
    Print(stderr, "{}\n", text);
    return false;
  };
  const Command* command = FindCommand(words[0]);
  if (!command) return complain(fmt::format("command \"{}\" not found", words[0]));
  if (command->needs_image && !node) return complain("no file open, try 'help open'");
  int count = static_cast<int>(words.size()) - 1;
  if (count < command->min_words || (command->max_words >= 0 && count > command->max_words))
    return complain(fmt::format("bad argument count {} to {}, expected {}", count, words[0],
                                WantedCount(*command)));
  Result<Arguments> arguments = ParseArguments(command->options, std::span(words).subspan(1));
  if (!arguments) {
    complain(fmt::format("{}: {}", words[0], arguments.error().what));
    return Misused(*command);
  }
  Outcome outcome = command->run(*this, *arguments);
  if (!outcome) session.Complain(outcome.error().what);
  fflush(stdout);
  return outcome && *outcome;
}

Result<> Console::Open(OpenHow wanted) {
  if (node) return Fail(ErrorCode::kState, "file open already, try 'help close'");
  auto open = [&]() -> Result<block::NodePtr> {
    block::NodeOptions options = wanted.node;
    if (wanted.snapshot) options.read_only = true;
    if (wanted.copy_on_read && wanted.node.read_only)
      return Fail(ErrorCode::kInvalid, "Can't use copy-on-read on read-only device");
    if (options.force_share && !options.read_only)
      return Fail(ErrorCode::kInvalid, "force-share=on can only be used with read-only images");
    block::Options all = wanted.more;
    if (wanted.image.is_options) {
      block::Options named = TRY(block::Options::Parse(wanted.image.name));
      for (const auto& [key, value] : named.all()) all.Set(key, value.text);
    } else if (!wanted.image.name.empty()) {
      all.Set("filename", wanted.image.name);
    }
    if (!wanted.image.format.empty()) all.Set("driver", wanted.image.format);
    return session.OpenOptions(std::move(all), options);
  };
  Result<block::NodePtr> opened = open();
  if (!opened) return Fail(std::move(opened).error().In("can't open device " + wanted.image.name));
  node = std::move(*opened);
  how = std::move(wanted);
  if (how.snapshot) node = TRY(img::TemporaryOverlay(session, std::move(node)));
  if (how.copy_on_read) {
    block::Options filter;
    filter.Set("driver", "copy-on-read");
    filter.SetNode("file", node);
    node = TRY(session.OpenOptions(std::move(filter), {.discard_unmap = how.node.discard_unmap}));
  }
  return {};
}

Result<> Console::Close() {
  AwaitIdle();
  block::NodePtr closing = std::move(node);
  node = nullptr;
  return closing ? session.Close(closing) : Result<>();
}

bool Refuse(const std::string& text) {
  Print("{}\n", text);
  return false;
}

bool Misused(const Command& command) { return Refuse(SynopsisOf(command)); }

std::optional<uint64_t> TakeBytes(const std::string& text) {
  Result<uint64_t> bytes = block::ParseSize(text);
  if (bytes && *bytes <= uint64_t{INT64_MAX}) return *bytes;
  Refuse("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- " + text);
  return std::nullopt;
}

std::optional<uint8_t> TakePattern(const std::string& text) {
  Result<uint64_t> byte = block::ParseNumber(text);
  if (byte && *byte <= 0xff) return static_cast<uint8_t>(*byte);
  Refuse(text + " is not a valid pattern byte");
  return std::nullopt;
}

std::string BytesText(double bytes) {
  constexpr const char* kUnits[] = {"EiB", "PiB", "TiB", "GiB", "MiB", "KiB"};
  auto trimmed = [](std::string number, std::string_view zeros) {
    if (number.ends_with(zeros)) number.resize(number.size() - zeros.size());
    return number;
  };
  double unit = std::exp2(60);
  for (const char* name : kUnits) {
    if (bytes >= unit) return trimmed(fmt::format("{:.3f}", bytes / unit), ".000") + " " + name;
    unit /= 1024;
  }
  return trimmed(fmt::format("{:f}", bytes), ".000000") + " bytes";
}

void PrintReport(const Console& console, const Arguments& arguments, const Report& report) {
  if (arguments.Has("q")) return;
  int64_t took_ns = std::max<int64_t>(1, console.session.loop().clock().NowNs() - report.began_ns);
  double seconds = static_cast<double>(took_ns) / 1e9;
  auto whole = static_cast<uint64_t>(seconds);
  uint64_t hundredths = static_cast<uint64_t>(took_ns) / 10'000'000 % 100;
  bool numbers = arguments.Has("C");
  std::string time = whole >= 60 || numbers ? fmt::format("{}:{:02}:{:02}.{:02}", whole / 3600,
                                                          whole / 60 % 60, whole % 60, hundredths)
                                            : fmt::format("{:02}.{:02} sec", whole, hundredths);
  double rate = static_cast<double>(report.bytes) / seconds, operations = 1 / seconds;
  if (numbers) {
    Print("{},1,{},{:.3f},{:.3f}\n", report.bytes, time, rate, operations);
    return;
  }
  Print("{0} {1}/{1} bytes at offset {2}\n{3}, 1 ops; {4} ({5}/sec and {6:.4f} ops/sec)\n",
        report.verb, report.bytes, report.offset, BytesText(static_cast<double>(report.bytes)),
        time, BytesText(rate), operations);
}

// ---- help and quit ----

namespace {

Outcome RunHelp(Console&, const Arguments& arguments) {
  if (arguments.operands.empty()) {
    for (const Command* command : Commands()) Print("{}\n", SynopsisOf(*command));
    Print("\nUse 'help commandname' for extended help.\n");
    return true;
  }
  const Command* command = FindCommand(arguments.operands[0]);
  if (!command) return Refuse(fmt::format("command {} not found", arguments.operands[0]));
  Print("{}\n", SynopsisOf(*command));
  if (!command->options.empty()) Print("\n{}\n", OptionsHelp(command->options));
  return true;
}

Outcome RunQuit(Console& console, const Arguments&) {
  console.quit = true;
  return true;
}

}  // namespace

const Command kHelp = {.name = "help",
                       .alias = "?",
                       .max_words = 1,
                       .synopsis = "[command]",
                       .help = "help for one or all commands",
                       .needs_image = false,
                       .run = RunHelp};
const Command kQuit = {
    .name = "quit", .alias = "q", .help = "exit the program", .needs_image = false, .run = RunQuit};

}  // namespace kvartz::cli::io
