// The commands that move data: read, write, readv, writev, aio_read, aio_write, aio_flush.
#include <fcntl.h>
#include <fmt/core.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/fd.h"
#include "base/print.h"
#include "block/fiber_io.h"
#include "cli/io/io.h"

namespace kvartz::cli::io {
namespace {

using block::Request;

constexpr uint64_t kMostBytes = 2147483136;  // of one request: 2 GiB less a sector
constexpr uint8_t kWritten = 0xcd, kUnread = 0xab;

// Memory that may begin at an odd address.
class Buffer {
 public:
  bool Allocate(uint64_t size, uint8_t fill, Align align) {
    size_t skip = align == Align::kOdd ? 1 : 0;
    memory_.reset(new (std::nothrow) uint8_t[size + skip]);
    if (!memory_) return Refuse(fmt::format("no memory for {} bytes", size));
    bytes_ = {memory_.get() + skip, size};
    std::memset(bytes_.data(), fill, size);
    return true;
  }
  std::span<uint8_t> bytes() const { return bytes_; }

 private:
  std::unique_ptr<uint8_t[]> memory_;
  std::span<uint8_t> bytes_;
};

// One request of a command, and what is said when it is done.
struct Transfer {
  Console* console = nullptr;
  Arguments arguments = {};
  std::string command = {};
  Report report = {};
  std::optional<uint8_t> pattern = {};
  uint64_t check_from = 0, check_bytes = 0;  // of a read with a pattern, from its offset on
  Buffer buffer = {};
  std::vector<iovec> iov = {};
  Request request = {};
};

void Dump(const Transfer& transfer) {
  std::span<const uint8_t> bytes = transfer.buffer.bytes();
  for (uint64_t at = 0; at < bytes.size(); at += 16) {
    std::span<const uint8_t> row = bytes.subspan(at, std::min<uint64_t>(16, bytes.size() - at));
    std::string hex, text;
    for (uint8_t byte : row) {
      hex += fmt::format("{:02x} ", byte);
      text += isalnum(byte) ? static_cast<char>(byte) : '.';
    }
    Print("{:08x}:  {} {}\n", transfer.report.offset + at, hex, text);
  }
}

// What came of it; true if all is well.
bool Conclude(const Transfer& transfer, int result) {
  if (result < 0) return Refuse(fmt::format("{} failed: {}", transfer.command, strerror(-result)));
  bool good = true;
  if (transfer.request.kind == Request::Kind::kRead) {
    if (transfer.pattern) {
      for (uint8_t byte :
           transfer.buffer.bytes().subspan(transfer.check_from, transfer.check_bytes))
        good = good && byte == *transfer.pattern;
      if (!good)
        Refuse(fmt::format("Pattern verification failed at offset {}, {} bytes",
                           transfer.report.offset + transfer.check_from, transfer.check_bytes));
    }
    if (transfer.arguments.Has("v") && !transfer.arguments.Has("q")) Dump(transfer);
  }
  PrintReport(*transfer.console, transfer.arguments, transfer.report);
  return good;
}

std::unique_ptr<Transfer> NewTransfer(Console& console, const Arguments& arguments,
                                      Request::Kind kind, std::string command) {
  auto transfer = std::make_unique<Transfer>();
  transfer->console = &console;
  transfer->arguments = arguments;
  transfer->command = std::move(command);
  transfer->request.kind = kind;
  transfer->report.verb = kind == Request::Kind::kRead ? "read" : "wrote";
  return transfer;
}

// "off len [len..]"; false: it was said why not.
bool TakeRange(Transfer& transfer) {
  const std::vector<std::string>& words = transfer.arguments.operands;
  if (words.size() < 2) return false;
  auto offset = TakeBytes(words[0]);
  if (!offset) return false;
  transfer.report.offset = transfer.request.offset = *offset;
  uint64_t total = 0;
  for (size_t i = 1; i < words.size(); i++) {
    auto length = TakeBytes(words[i]);
    if (!length) return false;
    if (*length > kMostBytes || total + *length > kMostBytes)
      return Refuse(fmt::format("length cannot exceed {}, given {}", kMostBytes, words[i]));
    transfer.iov.push_back({nullptr, *length});
    total += *length;
  }
  transfer.report.bytes = transfer.request.length = total;
  return true;
}

bool AllocateBuffer(Transfer& transfer, uint8_t fill) {
  if (!transfer.buffer.Allocate(transfer.request.length, fill, transfer.console->align))
    return false;
  uint8_t* at = transfer.buffer.bytes().data();
  for (iovec& part : transfer.iov) {
    part.iov_base = at;
    at += part.iov_len;
  }
  transfer.request.iov = transfer.iov.data();
  transfer.request.iov_count = static_cast<unsigned>(transfer.iov.size());
  return true;
}

// The words of peers for what lies outside.
bool IsOutside(const Console& console, const Request& request) {
  uint64_t size = console.node->size_bytes();
  return request.offset > size || request.length > size - request.offset;
}

// The VM state is reached through the snapshots.
int AwaitVmState(Transfer& transfer) {
  block::SnapshotStore* store = transfer.console->node->snapshots();
  if (!store) return -ENOMEDIUM;
  bool read = transfer.request.kind == Request::Kind::kRead;
  Result<> done = read ? store->ReadVmState(transfer.report.offset, transfer.buffer.bytes())
                       : store->WriteVmState(transfer.report.offset, transfer.buffer.bytes());
  return done ? 0 : -EIO;
}

bool Finish(Transfer& transfer) {
  Console& console = *transfer.console;
  transfer.report.began_ns = console.session.loop().clock().NowNs();
  int result = 0;
  if (transfer.arguments.Has("b")) {
    result = AwaitVmState(transfer);
  } else {
    result =
        IsOutside(console, transfer.request) ? -EIO : block::Await(*console.node, transfer.request);
  }
  return Conclude(transfer, result);
}

// It goes on by itself and deletes itself.
Outcome StartAsync(std::unique_ptr<Transfer> transfer) {
  Console& console = *transfer->console;
  transfer->report.began_ns = console.session.loop().clock().NowNs();
  if (IsOutside(console, transfer->request)) {
    Conclude(*transfer, -EIO);
    return true;
  }
  transfer->request.owner = transfer.get();
  transfer->request.done = [](Request* request, int result) {
    std::unique_ptr<Transfer> done(static_cast<Transfer*>(request->owner));
    Conclude(*done, result);
    fflush(stdout);
    done->console->Ended();
  };
  console.Began();
  block::Node& node = *console.node;
  node.Start(&transfer.release()->request);
  return true;
}

// ---- reading ----

bool TakeReadPattern(Transfer& transfer) {
  const Arguments& arguments = transfer.arguments;
  transfer.check_bytes = transfer.request.length;
  if (auto text = arguments.Find("P")) {
    transfer.pattern = TakePattern(*text);
    if (!transfer.pattern) return false;
  }
  uint64_t size = transfer.request.length;
  if (auto text = arguments.Find("s")) {
    auto from = TakeBytes(*text);
    if (!from) return false;
    if (*from > size) return Refuse("pattern verification range exceeds end of read data");
    transfer.check_from = *from;
    transfer.check_bytes = size - *from;
  }
  if (auto text = arguments.Find("l")) {
    auto bytes = TakeBytes(*text);
    if (!bytes) return false;
    if (*bytes > size - transfer.check_from)
      return Refuse("pattern verification range exceeds end of read data");
    transfer.check_bytes = *bytes;
  }
  return true;
}

Outcome RunRead(Console& console, const Arguments& arguments) {
  if ((arguments.Has("s") || arguments.Has("l")) && !arguments.Has("P")) return Misused(kRead);
  if (arguments.operands.size() != 2) return Misused(kRead);
  auto transfer = NewTransfer(console, arguments, Request::Kind::kRead, "read");
  if (!TakeRange(*transfer) || !TakeReadPattern(*transfer) || !AllocateBuffer(*transfer, kUnread))
    return false;
  return Finish(*transfer);
}

Outcome RunReadv(Console& console, const Arguments& arguments) {
  if (arguments.operands.size() < 2) return Misused(kReadv);
  auto transfer = NewTransfer(console, arguments, Request::Kind::kRead, "readv");
  if (!TakeRange(*transfer) || !TakeReadPattern(*transfer) || !AllocateBuffer(*transfer, kUnread))
    return false;
  return Finish(*transfer);
}

Outcome RunAioRead(Console& console, const Arguments& arguments) {
  if (arguments.operands.size() < 2) return Misused(kAioRead);
  auto transfer = NewTransfer(console, arguments, Request::Kind::kRead, "readv");
  if (!TakeRange(*transfer) || !TakeReadPattern(*transfer) || !AllocateBuffer(*transfer, kUnread))
    return false;
  return StartAsync(std::move(transfer));
}

// ---- writing ----

// The contents of a file, over and over.
bool FillFromFile(const std::string& path, std::span<uint8_t> bytes) {
  auto failed = [&](const char* why) {
    Print(stderr, "{}: {}\n", path, why);
    return false;
  };
  UniqueFd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd) return failed(strerror(errno));
  size_t held = 0;
  while (held < bytes.size()) {
    ssize_t got = read(fd.get(), bytes.data() + held, bytes.size() - held);
    if (got < 0) return failed(strerror(errno));
    if (got == 0) break;
    held += static_cast<size_t>(got);
  }
  if (held == 0) return failed("it is empty");
  for (size_t i = held; i < bytes.size(); i++) bytes[i] = bytes[i - held];
  return true;
}

bool CheckWriteOptions(const Arguments& arguments) {
  if (arguments.Has("b") && arguments.Has("z"))
    return Refuse("-b and -z cannot be specified at the same time");
  if (arguments.Has("b") && arguments.Has("c"))
    return Refuse("-b and -c cannot be specified at the same time");
  if (arguments.Has("c") && arguments.Has("z"))
    return Refuse("-c and -z cannot be specified at the same time");
  if (arguments.Has("f") && (arguments.Has("b") || arguments.Has("c")))
    return Refuse("-f and -b or -c cannot be specified at the same time");
  if (arguments.Has("n") && !arguments.Has("z")) return Refuse("-n requires -z to be specified");
  if (arguments.Has("u") && !arguments.Has("z")) return Refuse("-u requires -z to be specified");
  if (arguments.Has("z") + arguments.Has("P") + arguments.Has("s") > 1)
    return Refuse("Only one of -z, -P, and -s can be specified at the same time");
  return true;
}

bool PrepareWrite(Transfer& transfer) {
  const Arguments& arguments = transfer.arguments;
  if (!CheckWriteOptions(arguments) || !TakeRange(transfer)) return false;
  Request& request = transfer.request;
  request.fua = arguments.Has("f");
  request.compressed = arguments.Has("c");
  if (arguments.Has("z")) {
    request.kind = Request::Kind::kWriteZeroes;
    request.unmap = arguments.Has("u");
    request.no_fallback = arguments.Has("n");
    return true;
  }
  if ((request.compressed || arguments.Has("b")) && request.length % 512 != 0)
    return Refuse(fmt::format("{} is not a sector-aligned value for 'count'", request.length));
  uint8_t fill = kWritten;
  if (auto text = arguments.Find("P")) {
    auto pattern = TakePattern(*text);
    if (!pattern) return false;
    fill = *pattern;
  }
  if (!AllocateBuffer(transfer, fill)) return false;
  auto source = arguments.Find("s");
  return !source || FillFromFile(*source, transfer.buffer.bytes());
}

// Null: writing is possible.
Result<> CheckWritable(const Console& console) {
  if (console.node->read_only()) return Fail(ErrorCode::kPermission, "Block node is read-only");
  return {};
}

Outcome RunWrite(Console& console, const Arguments& arguments) {
  TRY(CheckWritable(console));
  if (arguments.operands.size() != 2) return Misused(kWrite);
  auto transfer = NewTransfer(console, arguments, Request::Kind::kWrite, "write");
  return PrepareWrite(*transfer) && Finish(*transfer);
}

Outcome RunWritev(Console& console, const Arguments& arguments) {
  TRY(CheckWritable(console));
  if (arguments.operands.size() < 2) return Misused(kWritev);
  auto transfer = NewTransfer(console, arguments, Request::Kind::kWrite, "writev");
  return PrepareWrite(*transfer) && Finish(*transfer);
}

Outcome RunAioWrite(Console& console, const Arguments& arguments) {
  TRY(CheckWritable(console));
  if (arguments.operands.size() < 2) return Misused(kAioWrite);
  if (arguments.Has("z") && arguments.operands.size() > 2)
    return Refuse("-z supports only a single length parameter");
  auto transfer = NewTransfer(console, arguments, Request::Kind::kWrite, "aio_write");
  if (!PrepareWrite(*transfer)) return false;
  return StartAsync(std::move(transfer));
}

Outcome RunAioFlush(Console& console, const Arguments&) {
  console.AwaitIdle();
  return true;
}

constexpr OptionSpec kNumbers = {'C', {}, {}, "report statistics as numbers with commas between"};
constexpr OptionSpec kNoReport = {'q', {}, {}, "don't report statistics"};
constexpr OptionSpec kExpect = {'P', {}, "PATTERN", "each byte must have this value"};
constexpr OptionSpec kFill = {'P', {}, "PATTERN", "write bytes of this value, not 0xcd"};
constexpr OptionSpec kDump = {'v', {}, {}, "print what was read"};
constexpr OptionSpec kFua = {'f', {}, {}, "on stable storage when done (FUA)"};
constexpr OptionSpec kZero = {'z', {}, {}, "write zeros by a request of its own"};
constexpr OptionSpec kUnmap = {'u', {}, {}, "with -z: the space may be given back"};
constexpr OptionSpec kOldFlag = {'p', {}, {}, "nothing; as in old scripts"};

constexpr OptionSpec kReadOptions[] = {
    {'b', {}, {}, "the VM state, not the disk"},
    kNumbers,
    {'l', {}, "LEN", "with -P: check so many bytes"},
    kOldFlag,
    kExpect,
    kNoReport,
    {'s', {}, "OFF", "with -P: check from there in what was read"},
    kDump,
};
constexpr OptionSpec kReadvOptions[] = {kNumbers, kExpect, kNoReport, kDump};
constexpr OptionSpec kWriteOptions[] = {
    {'b', {}, {}, "the VM state, not the disk"},
    {'c', {}, {}, "store it compressed"},
    kNumbers,
    kFua,
    {'n', {}, {}, "with -z: fail rather than write zeros out"},
    kOldFlag,
    kFill,
    kNoReport,
    {'s', {}, "FILE", "write the contents of this file, over and over"},
    kUnmap,
    kZero,
};
constexpr OptionSpec kWritevOptions[] = {kNumbers, kFua, kFill, kNoReport};
constexpr OptionSpec kAioWriteOptions[] = {kNumbers, kFua, kFill, kNoReport, kUnmap, kZero};

}  // namespace

const Command kRead = {.name = "read",
                       .alias = "r",
                       .min_words = 2,
                       .max_words = -1,
                       .synopsis = "[-bCqv] [-P pattern [-s off] [-l len]] off len",
                       .help = "reads a number of bytes at a specified offset",
                       .options = kReadOptions,
                       .run = RunRead};
const Command kReadv = {.name = "readv",
                        .alias = {},
                        .min_words = 2,
                        .max_words = -1,
                        .synopsis = "[-Cqv] [-P pattern] off len [len..]",
                        .help = "reads a number of bytes at a specified offset",
                        .options = kReadvOptions,
                        .run = RunReadv};
const Command kWrite = {.name = "write",
                        .alias = "w",
                        .min_words = 2,
                        .max_words = -1,
                        .synopsis = "[-bcCfnquz] [-P pattern | -s source_file] off len",
                        .help = "writes a number of bytes at a specified offset",
                        .options = kWriteOptions,
                        .run = RunWrite};
const Command kWritev = {.name = "writev",
                         .alias = {},
                         .min_words = 2,
                         .max_words = -1,
                         .synopsis = "[-Cfq] [-P pattern] off len [len..]",
                         .help = "writes a number of bytes at a specified offset",
                         .options = kWritevOptions,
                         .run = RunWritev};
const Command kAioRead = {.name = "aio_read",
                          .alias = {},
                          .min_words = 2,
                          .max_words = -1,
                          .synopsis = "[-Cqv] [-P pattern] off len [len..]",
                          .help = "asynchronously reads a number of bytes",
                          .options = kReadvOptions,
                          .run = RunAioRead};
const Command kAioWrite = {.name = "aio_write",
                           .alias = {},
                           .min_words = 2,
                           .max_words = -1,
                           .synopsis = "[-Cfquz] [-P pattern] off len [len..]",
                           .help = "asynchronously writes a number of bytes",
                           .options = kAioWriteOptions,
                           .run = RunAioWrite};
const Command kAioFlush = {.name = "aio_flush",
                           .alias = {},
                           .help = "completes all outstanding aio requests",
                           .run = RunAioFlush};

}  // namespace kvartz::cli::io
