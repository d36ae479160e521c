#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/crc32c.h"
#include "block/formats/vhdx.h"

namespace kvartz::block::vhdx {
namespace {

constexpr uint32_t kMostRegions = 2047;
constexpr uint32_t kMostItems = 2047;
constexpr uint64_t kMostBytes = uint64_t{64} << 40;

std::unexpected<Error> Bad(const std::string& what) {
  return Fail(ErrorCode::kInvalid, "VHDX: " + what);
}

template <typename T>
T At(std::span<const uint8_t> bytes, size_t offset) {
  T value;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

bool ChecksumHolds(std::span<const uint8_t> bytes) {
  constexpr size_t kOffset = 4;
  std::vector<uint8_t> copy(bytes.begin(), bytes.end());
  uint32_t expected = At<Le32>(bytes, kOffset);
  std::memset(copy.data() + kOffset, 0, sizeof(Le32));
  return Crc32c(copy) == expected;
}

}  // namespace

Result<Header> ParseHeader(std::span<const uint8_t> bytes) {
  if (bytes.size() < kHeaderBytes) return Bad("the header is beyond the end of the file");
  bytes = bytes.subspan(0, kHeaderBytes);
  Header header = At<Header>(bytes, 0);
  if (std::string_view(header.signature.data(), 4) != "head")
    return Bad("the header's signature is missing");
  if (!ChecksumHolds(bytes)) return Bad("the header's checksum is wrong");
  if (header.version != 1)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: VHDX version {}", uint16_t{header.version}));
  return header;
}

Result<Regions> ParseRegionTable(std::span<const uint8_t> bytes) {
  if (bytes.size() < kRegionTableBytes)
    return Bad("the region table is beyond the end of the file");
  bytes = bytes.subspan(0, kRegionTableBytes);
  auto header = At<RegionTableHeader>(bytes, 0);
  if (std::string_view(header.signature.data(), 4) != "regi")
    return Bad("the region table's signature is missing");
  if (!ChecksumHolds(bytes)) return Bad("the region table's checksum is wrong");
  if (header.entry_count > kMostRegions)
    return Bad(fmt::format("{} regions", uint32_t{header.entry_count}));
  Regions regions;
  for (uint32_t i = 0; i < header.entry_count; i++) {
    auto entry = At<RegionEntry>(bytes, sizeof header + i * sizeof(RegionEntry));
    bool bat = entry.guid == kBatRegion, metadata = entry.guid == kMetadataRegion;
    if (!bat && !metadata) {
      if (entry.required & 1)
        return Fail(ErrorCode::kUnsupported,
                    "not supported yet: VHDX with an unknown region that is required");
      continue;
    }
    if (entry.file_offset < kMiB || entry.file_offset % kMiB != 0 ||
        entry.file_offset > uint64_t{INT64_MAX} / 2 || entry.length == 0 ||
        entry.length % kMiB != 0)
      return Bad("a region's place is impossible");
    uint64_t& offset = bat ? regions.bat_offset : regions.metadata_offset;
    if (offset != 0) return Bad("a region is there twice");
    offset = entry.file_offset;
    (bat ? regions.bat_length : regions.metadata_length) = entry.length;
  }
  if (regions.bat_offset == 0 || regions.metadata_offset == 0) return Bad("a region is missing");
  return regions;
}

namespace {

// For messages: characters other than ASCII's are question marks; empty where it is impossible.
std::string TextAt(std::span<const uint8_t> item, uint64_t offset, uint64_t length) {
  std::string text;
  if (offset > item.size() || length > item.size() - offset) return text;
  for (uint64_t i = 0; i + 1 < length; i += 2) {
    unsigned unit = item[offset + i] | item[offset + i + 1] << 8;
    text += unit >= ' ' && unit < 0x7f ? static_cast<char>(unit) : '?';
  }
  return text;
}

std::string ParentOf(std::span<const uint8_t> item) {
  constexpr uint32_t kMostKeys = 16;
  std::string parent;
  if (item.size() < sizeof(LocatorHeader)) return parent;
  uint32_t count = std::min<uint32_t>(At<LocatorHeader>(item, 0).count, kMostKeys);
  for (uint32_t i = 0; i < count; i++) {
    size_t at = sizeof(LocatorHeader) + i * sizeof(LocatorEntry);
    if (at + sizeof(LocatorEntry) > item.size()) break;
    auto entry = At<LocatorEntry>(item, at);
    std::string key = TextAt(item, entry.key_offset, entry.key_length);
    if (key != "relative_path" && key != "absolute_win32_path") continue;
    parent = TextAt(item, entry.value_offset, entry.value_length);
    if (key == "relative_path") break;
  }
  return parent;
}

}  // namespace

Result<Disk> ParseMetadata(std::span<const uint8_t> region) {
  if (region.size() < kMetadataTableBytes)
    return Bad("the metadata are beyond the end of the file");
  auto header = At<MetadataTableHeader>(region, 0);
  if (std::string_view(header.signature.data(), 8) != "metadata")
    return Bad("the metadata's signature is missing");
  if (header.entry_count > kMostItems)
    return Bad(fmt::format("{} metadata items", uint16_t{header.entry_count}));
  Disk disk;
  uint32_t flags = 0;
  std::string parent;
  for (uint32_t i = 0; i < header.entry_count; i++) {
    auto entry = At<MetadataEntry>(region, sizeof header + i * sizeof(MetadataEntry));
    size_t wanted = entry.item_id == kFileParameters || entry.item_id == kVirtualDiskSize ? 8 : 4;
    bool known = entry.item_id == kFileParameters || entry.item_id == kVirtualDiskSize ||
                 entry.item_id == kLogicalSectorSize;
    if (entry.item_id == kParentLocator) {
      if (entry.offset <= region.size())
        parent = ParentOf(region.subspan(
            entry.offset, std::min<size_t>(entry.length, region.size() - entry.offset)));
      continue;
    }
    if (!known) {
      bool ours = entry.item_id == kPage83Data || entry.item_id == kPhysicalSectorSize;
      if ((entry.flags & kIsRequired) && !ours)
        return Fail(ErrorCode::kUnsupported,
                    "not supported yet: VHDX with an unknown metadata item that is required");
      continue;
    }
    if (entry.offset < kMetadataTableBytes || entry.length < wanted ||
        entry.offset > region.size() || wanted > region.size() - entry.offset)
      return Bad("a metadata item's place is impossible");
    if (entry.item_id == kFileParameters) {
      disk.block_size = At<Le32>(region, entry.offset);
      flags = At<Le32>(region, entry.offset + 4);
    } else if (entry.item_id == kVirtualDiskSize) {
      disk.size = At<Le64>(region, entry.offset);
    } else {
      disk.logical_sector = At<Le32>(region, entry.offset);
    }
  }
  if (flags & 2) {
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: differencing VHDX (its parent is '{}')", parent));
  }
  if (disk.logical_sector != 512 && disk.logical_sector != 4096)
    return Bad(fmt::format("sectors of {} bytes", disk.logical_sector));
  if (!std::has_single_bit(disk.block_size) || disk.block_size < kMiB ||
      disk.block_size > 256 * kMiB)
    return Bad(fmt::format("blocks of {} bytes", disk.block_size));
  if (disk.size > kMostBytes || disk.size % disk.logical_sector != 0)
    return Bad(fmt::format("a disk of {} bytes", disk.size));
  if (disk.entries() > Disk::kMostEntries)
    return Fail(ErrorCode::kUnsupported,
                fmt::format("not supported yet: a VHDX of {} blocks", disk.blocks()));
  return disk;
}

}  // namespace kvartz::block::vhdx
