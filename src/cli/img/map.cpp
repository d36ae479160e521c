// img map.
#include <fmt/core.h>

#include <algorithm>
#include <boost/json.hpp>

#include "base/print.h"
#include "cli/img/img.h"

namespace kvartz::cli::img {
namespace {

struct Entry {
  uint64_t start = 0, length = 0;
  int depth = 0;
  bool present = false, zero = false, data = false;
  bool has_offset = false;
  uint64_t offset = 0;
  std::string filename = {};

  bool Continues(const Entry& next) const {
    return depth == next.depth && present == next.present && zero == next.zero &&
           data == next.data && has_offset == next.has_offset && filename == next.filename &&
           (!has_offset || offset + length == next.offset);
  }
};

// The first layer that knows what is read here.
Result<block::ChainExtent> Examine(block::Node& top, uint64_t offset, uint64_t length) {
  block::ChainExtent found;
  for (block::Node* node = block::SkipFilters(&top);; found.depth++) {
    found.extent = TRY(block::StatusOf(*node, offset, length, block::Holes::kOfRaw));
    length = std::min(length, found.extent.length);
    node = block::BackingOf(node);
    if (found.extent.zero || found.extent.data || !node) return found;
  }
}

Entry ToEntry(uint64_t start, const block::ChainExtent& found) {
  const block::Extent& extent = found.extent;
  Entry entry = {.start = start, .length = extent.length, .depth = found.depth};
  entry.present = extent.allocated;
  entry.zero = extent.zero;
  entry.data = extent.data && extent.allocated;
  entry.has_offset = extent.has_offset && extent.file;
  if (entry.has_offset) {
    entry.offset = extent.offset;
    entry.filename = extent.file->name();
  }
  return entry;
}

class Printer {
 public:
  explicit Printer(Output output) : output_(output) {
    if (output_ == Output::kHuman)
      Print("{:<16}{:<16}{:<16}{}\n", "Offset", "Length", "Mapped to", "File");
    if (output_ == Output::kJson) Print("[");
  }
  Result<> Add(const Entry& entry) {
    if (output_ == Output::kJson) {
      AddJson(entry);
      return {};
    }
    if (!entry.data || entry.zero) return {};
    if (!entry.has_offset) {
      return Fail(
          ErrorCode::kUnsupported,
          "File contains external, encrypted or compressed clusters; --output=json shows them");
    }
    Print("{:<16}{:<16}{:<16}{}\n", Hex(entry.start), Hex(entry.length), Hex(entry.offset),
          entry.filename);
    return {};
  }
  void Finish() {
    if (output_ == Output::kJson) Print("]\n");
  }

 private:
  static std::string Hex(uint64_t value) { return value ? fmt::format("{:#x}", value) : "0"; }
  void AddJson(const Entry& entry) {
    Print(
        "{}{{ \"start\": {}, \"length\": {}, \"depth\": {}, \"present\": {}, \"zero\": {}, "
        "\"data\": {}",
        first_ ? "" : ",\n", entry.start, entry.length, entry.depth, entry.present, entry.zero,
        entry.data);
    if (entry.has_offset) Print(", \"offset\": {}", entry.offset);
    Print("}}");
    first_ = false;
  }
  const Output output_;
  bool first_ = true;
};

Result<int> Run(Session& session, const Arguments& arguments) {
  Output output = TRY(TakeOutput(arguments));
  ImageName image = TRY(TakeImage(arguments));
  uint64_t start = 0, most = UINT64_MAX;
  if (auto text = arguments.Find("start-offset")) start = TRY(TakeSize(*text, "start offset"));
  if (auto text = arguments.Find("max-length")) most = TRY(TakeSize(*text, "max length"));
  block::NodePtr node =
      TRY(session.Open(image, {.read_only = true, .force_share = arguments.Has("force-share")}));
  uint64_t end = node->size_bytes();
  if (start > end)
    return Fail(ErrorCode::kInvalid,
                fmt::format("--start-offset={} is beyond the end of the image", start));
  end = start + std::min(end - start, most);
  Printer printer(output);
  Entry last;
  for (uint64_t at = start; at < end;) {
    block::ChainExtent found = TRY(Examine(*node, at, end - at));
    if (found.extent.length == 0) break;
    Entry entry = ToEntry(at, found);
    at += entry.length;
    if (last.length > 0 && last.Continues(entry)) {
      last.length += entry.length;
      continue;
    }
    if (last.length > 0) TRY(printer.Add(last));
    last = entry;
  }
  // An empty image has one entry of no bytes, in JSON.
  if (last.length > 0 || (output == Output::kJson && start == end)) TRY(printer.Add(last));
  printer.Finish();
  return 0;
}

constexpr OptionSpec kOptions[] = {
    kObject,
    kImageOpts,
    kFormat,
    {'s', "start-offset", "OFFSET", "where to begin"},
    {'l', "max-length", "LENGTH", "how far to go"},
    kOutput,
    kForceShare,
};

}  // namespace

const Verb kMap = {"map", "FILENAME", "tells where an image's data are", kOptions, Run};

}  // namespace kvartz::cli::img
