#include "block/formats/vmdk/layout.h"

#include <fmt/format.h>

#include <charconv>
#include <cstring>

namespace kvartz::block::vmdk {
namespace {

constexpr uint64_t kLargestGrain = 2048;  // sectors
// Grain directories are held in memory: 4 MiB.
constexpr uint64_t kMostTables = 1 << 20;
constexpr size_t kMostExtents = 1024;
constexpr uint64_t kLargestPlace = uint64_t{INT64_MAX} / kSector / 2;

std::unexpected<Error> Bad(const std::string& what) {
  return Fail(ErrorCode::kInvalid, "VMDK: " + what);
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t' || text.back() == '\r'))
    text.remove_suffix(1);
  return text;
}

Result<uint64_t> Number(std::string_view text, int base) {
  uint64_t value = 0;
  auto [at, error] = std::from_chars(text.data(), text.data() + text.size(), value, base);
  if (error != std::errc() || at != text.data() + text.size() || text.empty())
    return Bad(fmt::format("'{}' in the descriptor is no number", text));
  return value;
}

// The next word; a quoted one without its quotes.
std::string_view TakeWord(std::string_view& line) {
  line = Trim(line);
  if (line.starts_with('"')) {
    size_t end = line.find('"', 1);
    std::string_view word = line.substr(1, end == std::string_view::npos ? end : end - 1);
    line.remove_prefix(end == std::string_view::npos ? line.size() : end + 1);
    return word;
  }
  size_t end = std::min(line.find(' '), line.size());
  std::string_view word = line.substr(0, end);
  line.remove_prefix(end);
  return word;
}

// RW 4192256 SPARSE "disk.vmdk" [0]
Result<ExtentLine> ParseExtent(std::string_view line) {
  ExtentLine extent;
  extent.access = TakeWord(line);
  extent.sectors = TRY(Number(TakeWord(line), 10));
  extent.type = TakeWord(line);
  extent.filename = TakeWord(line);
  if (!Trim(line).empty()) extent.offset = TRY(Number(TakeWord(line), 10));
  if (extent.sectors > kLargestPlace || extent.offset > kLargestPlace)
    return Bad("an extent's size is impossible");
  return extent;
}

std::string_view Unquoted(std::string_view text) { return TakeWord(text); }

}  // namespace

Result<SparseHeader> ParseHeader(std::span<const uint8_t> bytes) {
  SparseHeader header;
  if (bytes.size() < sizeof header) return Bad("the file is too short");
  std::memcpy(&header, bytes.data(), sizeof header);
  if (header.magic != kMagic) return Bad("the magic number is missing");
  if (header.version < 1 || header.version > 3)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: VMDK version {}", uint32_t{header.version}));
  if ((header.flags & kNewlineTest) && std::string_view(header.line_ends.data(), 4) != "\n \r\n")
    return Bad("the file was damaged by a transfer as text");
  uint64_t grain = header.grain_size;
  if (grain < 8 || grain > kLargestGrain || (grain & (grain - 1)) != 0)
    return Bad(fmt::format("grains of {} sectors", grain));
  if (header.entries_per_table != kEntriesPerTable)
    return Bad(fmt::format("grain tables of {} entries", uint32_t{header.entries_per_table}));
  uint64_t reach = grain * kEntriesPerTable;
  if (header.capacity > kLargestPlace || (header.capacity + reach - 1) / reach > kMostTables)
    return Fail(
        ErrorCode::kUnsupported,
        fmt::format("not supported yet: a VMDK extent of {} sectors", uint64_t{header.capacity}));
  if (header.gd_offset != kGdAtEnd && header.gd_offset > kLargestPlace)
    return Bad("the grain directory's place is impossible");
  if (header.rgd_offset > kLargestPlace && (header.flags & kRedundantTable))
    return Bad("the redundant grain directory's place is impossible");
  if (header.descriptor_offset > kLargestPlace ||
      header.descriptor_size > kLargestDescriptor / kSector)
    return Bad("the descriptor's place is impossible");
  if (header.compression > 1 || ((header.flags & kCompressed) != 0) != (header.compression == 1))
    return Bad(fmt::format("unknown compression {}", uint16_t{header.compression}));
  if ((header.flags & kCompressed) && !(header.flags & kMarkers))
    return Fail(ErrorCode::kUnsupported, "not supported yet: compressed VMDK without markers");
  return header;
}

Result<Descriptor> ParseDescriptor(std::string_view text) {
  Descriptor descriptor;
  if (text.size() > kLargestDescriptor) return Bad("the descriptor is too long");
  text = text.substr(0, text.find('\0'));
  if (!text.starts_with("# Disk DescriptorFile")) return Bad("the descriptor doesn't begin as one");
  while (!text.empty()) {
    size_t end = text.find('\n');
    std::string_view line = Trim(text.substr(0, end));
    text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    if (line.empty() || line[0] == '#') continue;
    if (line.starts_with("RW ") || line.starts_with("RDONLY ") || line.starts_with("NOACCESS ")) {
      if (descriptor.extents.size() == kMostExtents) return Bad("too many extents");
      descriptor.extents.push_back(TRY(ParseExtent(line)));
      continue;
    }
    size_t equals = line.find('=');
    if (equals == std::string_view::npos) continue;
    std::string_view key = Trim(line.substr(0, equals)), value = Trim(line.substr(equals + 1));
    if (key == "CID") descriptor.cid = static_cast<uint32_t>(TRY(Number(value, 16)));
    if (key == "parentCID") descriptor.parent_cid = static_cast<uint32_t>(TRY(Number(value, 16)));
    if (key == "createType") descriptor.create_type = Unquoted(value);
    if (key == "parentFileNameHint") descriptor.parent_hint = Unquoted(value);
  }
  return descriptor;
}

}  // namespace kvartz::block::vmdk
