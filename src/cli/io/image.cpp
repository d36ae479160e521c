// The commands for images as such: open, close, reopen, info, map and the like.
#include <fmt/core.h>

#include <cerrno>
#include <cstring>

#include "base/print.h"
#include "block/fiber_io.h"
#include "cli/img/output.h"
#include "cli/io/io.h"

namespace kvartz::cli::io {
namespace {

// ---- open, close, reopen ----

Result<> AddOptions(block::Options& to, const Arguments& arguments) {
  for (const std::string& text : arguments.All("o")) {
    block::Options more = TRY(block::Options::Parse(text));
    for (const auto& [key, value] : more.all()) to.Set(key, value.text);
  }
  return {};
}

Outcome RunOpen(Console& console, const Arguments& arguments) {
  OpenHow how;
  how.node.read_only = arguments.Has("r");
  how.node.force_share = arguments.Has("U");
  how.snapshot = arguments.Has("s");
  how.copy_on_read = arguments.Has("C");
  TRY(ApplyOpenModes(arguments, how.node));
  TRY(AddOptions(how.more, arguments));
  if (arguments.operands.size() > 1) return Misused(kOpen);
  if (!arguments.operands.empty()) how.image.name = arguments.operands[0];
  TRY(console.Open(std::move(how)));
  return true;
}

Outcome RunClose(Console& console, const Arguments&) {
  TRY(console.Close());
  return true;
}

// Closed, and opened again with the changes. What doesn't work leaves it as it was.
Outcome RunReopen(Console& console, const Arguments& arguments) {
  if (arguments.Has("r") && arguments.Has("w"))
    return Fail(ErrorCode::kInvalid, "Only one -r/-w option may be given");
  if (!arguments.operands.empty()) return Misused(kReopen);
  if (console.how.snapshot)
    return Fail(ErrorCode::kUnsupported, "not supported yet: reopen of an image opened with -s");
  OpenHow before = console.how, after = console.how;
  if (arguments.Has("r")) after.node.read_only = true;
  if (arguments.Has("w")) after.node.read_only = false;
  if (auto mode = arguments.Find("c")) {
    if (!img::ApplyCache(*mode, after.node))
      return Fail(ErrorCode::kInvalid, "Invalid cache option: " + *mode);
  }
  TRY(AddOptions(after.more, arguments));
  TRY(console.Close());
  Result<> opened = console.Open(std::move(after));
  if (opened) return true;
  TRY(console.Open(std::move(before)));
  return std::unexpected(opened.error());
}

// ---- what it is like ----

Outcome RunLength(Console& console, const Arguments&) {
  Print("{}\n", BytesText(static_cast<double>(console.node->size_bytes())));
  return true;
}

Outcome RunInfo(Console& console, const Arguments&) {
  block::ImageInfo info = TRY(console.node->Info());
  Print("format name: {}\ncluster size: {}\nvm state offset: {}\n", info.format,
        BytesText(static_cast<double>(info.cluster_size)),
        BytesText(static_cast<double>(info.vm_state_offset)));
  if (!info.specific.empty())
    Print("Format specific information:\n{}", img::HumanText(info.specific, 1));
  return true;
}

// Bytes from `offset` on that are alike, of at most `length`: the image has them itself, or not.
Result<block::Extent> Alike(block::Node& node, uint64_t offset, uint64_t length) {
  block::Extent all = {};
  while (all.length < length) {
    block::Extent next = TRY(node.Status(offset + all.length, length - all.length));
    if (next.length == 0) break;
    if (all.length > 0 && next.allocated != all.allocated) break;
    all.allocated = next.allocated;
    all.length += next.length;
  }
  return all;
}

Outcome RunMap(Console& console, const Arguments&) {
  uint64_t size = console.node->size_bytes();
  for (uint64_t offset = 0; offset < size;) {
    block::Extent extent = TRY(Alike(*console.node, offset, size - offset));
    if (extent.length == 0) return Refuse("Unexpected end of image");
    Print("{0} ({1:#x}) bytes {2} at offset {3} ({4:#x})\n",
          BytesText(static_cast<double>(extent.length)), extent.length,
          extent.allocated ? "    allocated" : "not allocated",
          BytesText(static_cast<double>(offset)), offset);
    offset += extent.length;
  }
  return true;
}

Outcome RunAlloc(Console& console, const Arguments& arguments) {
  constexpr uint64_t kSector = 512;
  auto start = TakeBytes(arguments.operands.at(0));
  if (!start) return false;
  uint64_t count = kSector;
  if (arguments.operands.size() == 2) {
    auto given = TakeBytes(arguments.operands[1]);
    if (!given) return false;
    count = *given;
  }
  uint64_t size = console.node->size_bytes();
  count = *start >= size ? 0 : std::min(count, size - *start);
  uint64_t allocated = 0;
  for (uint64_t done = 0; done < count;) {
    block::Extent extent = TRY(Alike(*console.node, *start + done, count - done));
    if (extent.length == 0) break;
    if (extent.allocated) allocated += extent.length;
    done += extent.length;
  }
  Print("{}/{} bytes allocated at offset {}\n", allocated, count,
        BytesText(static_cast<double>(*start)));
  return true;
}

// ---- what changes it ----

Outcome RunFlush(Console& console, const Arguments&) {
  if (int rc = block::FlushNode(*console.node))
    return Refuse(fmt::format("flush failed: {}", strerror(-rc)));
  return true;
}

Outcome RunTruncate(Console& console, const Arguments& arguments) {
  if (arguments.operands.size() != 1) return Misused(kTruncate);
  block::ResizeOptions options;
  if (auto mode = arguments.Find("m"))
    options.preallocation = TRY(block::ParsePreallocation(*mode));
  auto size = TakeBytes(arguments.operands[0]);
  if (!size) return false;
  options.size = *size;
  if (console.node->read_only()) return Fail(ErrorCode::kPermission, "Block node is read-only");
  console.AwaitIdle();
  TRY(console.node->Resize(options));
  return true;
}

Outcome RunDiscard(Console& console, const Arguments& arguments) {
  if (arguments.operands.size() != 2) return Misused(kDiscard);
  auto offset = TakeBytes(arguments.operands[0]);
  auto length = offset ? TakeBytes(arguments.operands[1]) : std::nullopt;
  if (!length) return false;
  if (console.node->read_only()) return Fail(ErrorCode::kPermission, "Block node is read-only");
  Report report = {.verb = "discard", .offset = *offset, .bytes = *length};
  report.began_ns = console.session.loop().clock().NowNs();
  uint64_t size = console.node->size_bytes();
  int rc = *offset > size || *length > size - *offset
               ? -EIO
               : block::DiscardAt(*console.node, *offset, *length);
  if (rc) return Refuse(fmt::format("discard failed: {}", strerror(-rc)));
  PrintReport(console, arguments, report);
  return true;
}

Outcome RunSleep(Console& console, const Arguments& arguments) {
  Result<uint64_t> milliseconds = block::ParseNumber(arguments.operands.at(0));
  constexpr uint64_t kMost = 1'000'000'000;
  if (!milliseconds || *milliseconds > kMost)
    return Refuse(fmt::format("{} is not a valid number", arguments.operands[0]));
  EventLoop& loop = console.session.loop();
  FiberSleepUntil(loop, loop.clock().NowNs() + static_cast<int64_t>(*milliseconds) * 1'000'000);
  return true;
}

constexpr OptionSpec kOpenOptions[] = {
    {'r', {}, {}, "read-only"},
    {'s', {}, {}, "what is written is kept until it is closed, and apart"},
    {'C', {}, {}, "what is read from below is kept"},
    {'n', {}, {}, "past the host's page cache, as -t none"},
    {'U', {}, {}, "although others write to it (with -r)"},
    {'t', {}, "CACHE", "cache mode: writeback (default), none, writethrough, directsync, unsafe"},
    {'d', {}, "MODE", "discard: unmap (default) or ignore"},
    {'o', {}, "OPTIONS", "options of the node: driver=qcow2,..."},
};
constexpr OptionSpec kReopenOptions[] = {
    {'r', {}, {}, "read-only"},
    {'w', {}, {}, "to be written to"},
    {'c', {}, "CACHE", "another cache mode"},
    {'o', {}, "OPTIONS", "other options of the node"},
};
constexpr OptionSpec kTruncateOptions[] = {
    {'m', {}, "MODE", "preallocation of what is added: off, metadata, falloc, full"}};
constexpr OptionSpec kDiscardOptions[] = {
    {'C', {}, {}, "report statistics as numbers with commas between"},
    {'q', {}, {}, "don't report statistics"},
};

}  // namespace

Result<> ApplyOpenModes(const Arguments& arguments, block::NodeOptions& node) {
  const char* cache_key = arguments.Has("cache") ? "cache" : "t";
  const char* discard_key = arguments.Has("discard") ? "discard" : "d";
  std::string mode = arguments.Get(
      cache_key, arguments.Has("n") || arguments.Has("nocache") ? "none" : "writeback");
  if (!img::ApplyCache(mode, node))
    return Fail(ErrorCode::kInvalid, "Invalid cache option: " + mode);
  std::string discard = arguments.Get(discard_key, "unmap");
  if (discard != "unmap" && discard != "on" && discard != "ignore" && discard != "off")
    return Fail(ErrorCode::kInvalid, "Invalid discard option: " + discard);
  node.discard_unmap = discard == "unmap" || discard == "on";
  return {};
}

const Command kOpen = {.name = "open",
                       .alias = "o",
                       .min_words = 1,
                       .max_words = -1,
                       .synopsis = "[-rsCnU] [-t cache] [-d discard] [-o options] [path]",
                       .help = "open the file specified by path",
                       .options = kOpenOptions,
                       .needs_image = false,
                       .run = RunOpen};
const Command kClose = {
    .name = "close", .alias = "c", .help = "close the current open file", .run = RunClose};
const Command kReopen = {.name = "reopen",
                         .alias = {},
                         .max_words = -1,
                         .synopsis = "[(-r|-w)] [-c cache] [-o options]",
                         .help = "reopens an image with new options",
                         .options = kReopenOptions,
                         .run = RunReopen};
const Command kLength = {.name = "length",
                         .alias = "l",
                         .help = "gets the length of the current file",
                         .run = RunLength};
const Command kInfo = {.name = "info",
                       .alias = "i",
                       .help = "prints information about the current file",
                       .run = RunInfo};
const Command kMap = {
    .name = "map", .alias = {}, .help = "prints the allocated areas of a file", .run = RunMap};
const Command kAlloc = {.name = "alloc",
                        .alias = "a",
                        .min_words = 1,
                        .max_words = 2,
                        .synopsis = "offset [count]",
                        .help = "checks if offset is allocated in the file",
                        .run = RunAlloc};
const Command kFlush = {
    .name = "flush", .alias = "f", .help = "flush all in-core file state to disk", .run = RunFlush};
const Command kTruncate = {.name = "truncate",
                           .alias = "t",
                           .min_words = 1,
                           .max_words = 3,
                           .synopsis = "[-m prealloc_mode] off",
                           .help = "truncates the current file at the given offset",
                           .options = kTruncateOptions,
                           .run = RunTruncate};
const Command kDiscard = {.name = "discard",
                          .alias = "d",
                          .min_words = 2,
                          .max_words = -1,
                          .synopsis = "[-Cq] off len",
                          .help = "discards a number of bytes at a specified offset",
                          .options = kDiscardOptions,
                          .run = RunDiscard};
const Command kSleep = {.name = "sleep",
                        .alias = {},
                        .min_words = 1,
                        .max_words = 1,
                        .help = "waits for the given value in milliseconds",
                        .needs_image = false,
                        .run = RunSleep};

}  // namespace kvartz::cli::io
