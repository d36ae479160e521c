// The program: options, then commands of -c or of standard input.
#include "cli/io/io.h"

#include <fmt/core.h>
#include <poll.h>
#include <unistd.h>

#include <cerrno>

#include "base/print.h"
#include "block/sync_io.h"
#include "cli/tool.h"

namespace kvartz::cli {
namespace io {
namespace {

constexpr OptionSpec kOptions[] = {
    {'h', "help", {}, "display this help and exit"},
    {'V', "version", {}, "output version information and exit"},
    img::kObject,
    {0, "image-opts", {}, "FILE is a list of options: driver=qcow2,file.filename=..."},
    {'c', "cmd", "STRING", "run this command (more than once: in order)"},
    {'f', "format", "FMT", "format of the image (else it is found out)"},
    {'r', "read-only", {}, "open it read-only"},
    {'s', "snapshot", {}, "what is written is kept until the end, and apart"},
    {'n', "nocache", {}, "past the host's page cache, as -t none"},
    {'C', "copy-on-read", {}, "what is read from below is kept"},
    {'m', "misalign", {}, "buffers begin at odd addresses"},
    {'k', "native-aio", {}, "as --aio=native"},
    {'i', "aio", "MODE", "threads, native or io_uring: the best there is is taken"},
    {'t', "cache", "MODE",
     "cache mode: writeback (default), none, writethrough, directsync, unsafe"},
    {'d', "discard", "MODE", "unmap (default) or ignore"},
    {'T', "trace", "PATTERN", "not supported yet"},
    {0, "untrusted", {}, "open no backing or data file that an image names"},
    {'U', "force-share", {}, "open it although others write to it (with -r)"},
};

// Lines of standard input. The loop goes on meanwhile.
class LineReader {
 public:
  explicit LineReader(EventLoop& loop) : loop_(loop) {}

  // Fiber. Nothing at the end.
  std::optional<std::string> Next() {
    while (true) {
      size_t end = held_.find('\n');
      if (end != std::string::npos || (ended_ && !held_.empty())) {
        std::string line = held_.substr(0, end);
        held_.erase(0, end == std::string::npos ? end : end + 1);
        return line;
      }
      if (ended_) return std::nullopt;
      More();
    }
  }

 private:
  void More() {
    pollfd ready = {.fd = STDIN_FILENO, .events = POLLIN, .revents = 0};
    if (poll(&ready, 1, 0) == 0) {
      Fiber* fiber = Fiber::Current();
      loop_.Watch(STDIN_FILENO, FdEvents::kRead, [this, fiber](FdEvents) {
        loop_.Unwatch(STDIN_FILENO);
        fiber->Wake();
      });
      Fiber::Suspend();
    }
    char buffer[4096];
    ssize_t got = read(STDIN_FILENO, buffer, sizeof buffer);
    if (got > 0) held_.append(buffer, static_cast<size_t>(got));
    ended_ = got == 0 || (got < 0 && errno != EINTR && errno != EAGAIN);
  }

  EventLoop& loop_;
  std::string held_;
  bool ended_ = false;
};

Result<> CheckOptions(const Arguments& arguments) {
  if (arguments.Has("trace")) return Fail(ErrorCode::kUnsupported, "not supported yet: --trace");
  TRY(block::CheckAio(arguments.Get("aio", "io_uring")));
  if (arguments.operands.size() > 1) return img::Misuse("Expecting one file name at most");
  if (arguments.Has("image-opts") && arguments.Has("format"))
    return Fail(ErrorCode::kInvalid, "--image-opts and -f are mutually exclusive");
  return {};
}

Result<int> RunAll(Console& console, const Arguments& arguments) {
  TRY(CheckOptions(arguments));
  TRY(console.session.AddObjects(arguments));
  if (arguments.Has("untrusted")) console.session.Distrust();
  if (arguments.Has("misalign")) console.align = Align::kOdd;
  OpenHow how;
  how.node.read_only = arguments.Has("read-only");
  how.node.force_share = arguments.Has("force-share");
  how.snapshot = arguments.Has("snapshot");
  how.copy_on_read = arguments.Has("copy-on-read");
  TRY(ApplyOpenModes(arguments, how.node));
  if (!arguments.operands.empty()) {
    how.image = {arguments.operands[0], arguments.Get("format"), arguments.Has("image-opts")};
    TRY(console.Open(std::move(how)));
  }
  bool good = true;
  std::vector<std::string> commands = arguments.All("cmd");
  for (size_t i = 0; i < commands.size() && !console.quit; i++)
    good = console.Run(commands[i]) && good;
  LineReader lines(console.session.loop());
  while (commands.empty() && !console.quit) {
    Print("{}> ", console.session.program());
    fflush(stdout);
    std::optional<std::string> line = lines.Next();
    if (!line) break;
    good = console.Run(*line) && good;
  }
  return good ? 0 : 1;
}

}  // namespace
}  // namespace io

int RunIo(const ToolCall& call) {
  auto refuse = [&](const Error& error) {
    fflush(stdout);
    Print(stderr, "{}: {}\n", call.name, error.what);
    return 1;
  };
  Result<Arguments> arguments = ParseArguments(io::kOptions, call.words);
  if (!arguments) return refuse(img::Misuse(arguments.error().what).error());
  if (arguments->Has("help")) {
    Print(
        "usage: {} [options] [-c command]... [FILE]\n"
        "Reads and writes a disk image by commands.\n\n{}\n"
        "'{} -c help' lists the commands.\n",
        call.name, OptionsHelp(io::kOptions), call.name);
    return 0;
  }
  if (arguments->Has("version")) {
    Print("{} version 7.2.0 (Kvartz {})\n", call.name, kVersion);
    return 0;
  }
  Result<std::unique_ptr<EventLoop>> loop = EventLoop::Create();
  if (!loop) return refuse(loop.error());
  io::Console console(call.name, **loop);
  Result<int> code = block::RunInFiber(**loop, [&]() -> Result<int> {
    Result<int> done = io::RunAll(console, *arguments);
    console.AwaitIdle();
    console.node = nullptr;
    Result<> closed = console.session.CloseAll();
    if (done && !closed) return std::unexpected(closed.error());
    return done;
  });
  fflush(stdout);
  return code ? *code : refuse(code.error());
}

}  // namespace kvartz::cli
