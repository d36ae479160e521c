// On-disk structures of VHDX. Spec: [MS-VHDX], "Virtual Hard Disk v2 (VHDX) File Format"; all
// fields little-endian.
#pragma once

#include <array>
#include <cstdint>
#include <span>

#include "base/endian.h"
#include "base/result.h"

namespace kvartz::block::vhdx {

constexpr uint64_t kMiB = 1 << 20;
constexpr uint64_t kHeaderOffsets[2] = {64 << 10, 128 << 10};  // 2.2 "Header Section"
constexpr uint64_t kRegionTableOffsets[2] = {192 << 10, 256 << 10};
constexpr size_t kHeaderBytes = 4096;
constexpr size_t kRegionTableBytes = 64 << 10;
constexpr size_t kMetadataTableBytes = 64 << 10;
using Guid = std::array<uint8_t, 16>;

// A guid from its text, in the order in which it is stored: the first three groups are numbers,
// little-endian, the rest are bytes.
constexpr Guid ParseGuid(const char* text) {
  constexpr size_t kOrder[16] = {3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15};
  Guid guid = {};
  auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'A' + 10; };
  for (size_t i = 0; i < 16; i++) {
    if (*text == '-') text++;
    guid[kOrder[i]] = static_cast<uint8_t>(digit(text[0]) << 4 | digit(text[1]));
    text += 2;
  }
  return guid;
}
constexpr Guid kBatRegion = ParseGuid("2DC27766-F623-4200-9D64-115E9BFD4A08");
constexpr Guid kMetadataRegion = ParseGuid("8B7CA206-4790-4B9A-B8FE-575F050F886E");
constexpr Guid kFileParameters = ParseGuid("CAA16737-FA36-4D43-B3B6-33F0AA44E76B");
constexpr Guid kVirtualDiskSize = ParseGuid("2FA54224-CD1B-4876-B211-5DBED83BF4B8");
constexpr Guid kParentLocator = ParseGuid("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C");
constexpr Guid kPage83Data = ParseGuid("BECA12AB-B2E6-4523-93EF-C309E000C746");
constexpr Guid kLogicalSectorSize = ParseGuid("8141BF1D-A96F-4709-BA47-F233A8FAAB5F");
constexpr Guid kPhysicalSectorSize = ParseGuid("CDA348C7-445D-4471-9CC9-E9885251C556");

// 2.2.2.1.
struct Header {
  std::array<char, 4> signature;  // "head"
  Le32 checksum;                  // CRC-32C of 4 KiB, with this field 0
  Le64 sequence_number;           // of the two valid headers the larger one counts
  Guid file_write_guid;
  Guid data_write_guid;
  Guid log_guid;  // not 0: the log must be replayed first
  Le16 log_version;
  Le16 version;  // 1
  Le32 log_length;
  Le64 log_offset;
};
static_assert(sizeof(Header) == 80);

// 2.2.3.
struct RegionTableHeader {
  std::array<char, 4> signature;  // "regi"
  Le32 checksum;                  // CRC-32C of 64 KiB, with this field 0
  Le32 entry_count;
  Le32 reserved;
};
static_assert(sizeof(RegionTableHeader) == 16);
struct RegionEntry {
  Guid guid;
  Le64 file_offset;
  Le32 length;
  Le32 required;
};
static_assert(sizeof(RegionEntry) == 32);

// 2.6.1.
struct MetadataTableHeader {
  std::array<char, 8> signature;  // "metadata"
  Le16 reserved;
  Le16 entry_count;
  std::array<uint8_t, 20> reserved2;
};
static_assert(sizeof(MetadataTableHeader) == 32);
struct MetadataEntry {
  Guid item_id;
  Le32 offset;  // within the metadata region
  Le32 length;
  Le32 flags;
  Le32 reserved;
};
static_assert(sizeof(MetadataEntry) == 32);
// 2.6.2.6: where the parent is, by keys and values in UTF-16.
struct LocatorHeader {
  Guid type;
  Le16 reserved;
  Le16 count;
};
static_assert(sizeof(LocatorHeader) == 20);
struct LocatorEntry {
  Le32 key_offset, value_offset;  // within the item
  Le16 key_length, value_length;  // bytes
};
static_assert(sizeof(LocatorEntry) == 12);
constexpr uint32_t kIsVirtualDisk = 2, kIsRequired = 4;

// 2.5.1.1: a block's state, in the low bits of its entry; the rest is its place.
constexpr uint64_t kStateMask = 7, kPlaceMask = ~(kMiB - 1);
constexpr uint64_t kNotPresent = 0, kUndefined = 1, kZero = 2, kUnmapped = 3, kFullyPresent = 6;

// Where things are in a file that was checked.
struct Regions {
  uint64_t bat_offset = 0, metadata_offset = 0;
  uint32_t bat_length = 0, metadata_length = 0;
};
struct Disk {
  uint64_t size = 0;  // bytes
  uint32_t block_size = 0;
  uint32_t logical_sector = 0;
  uint64_t blocks() const { return (size + block_size - 1) / block_size; }
  // Entries of the table: one of a sector bitmap follows each `chunk_ratio` blocks.
  uint64_t chunk_ratio() const { return (uint64_t{1} << 23) * logical_sector / block_size; }
  uint64_t EntryOf(uint64_t block) const { return block + block / chunk_ratio(); }
  // The table is held in memory: 128 MiB at most.
  static constexpr uint64_t kMostEntries = 16 << 20;
  uint64_t entries() const { return blocks() == 0 ? 0 : EntryOf(blocks() - 1) + 1; }
};

// Each takes the whole structure (4 KiB, 64 KiB); errors name what is wrong.
Result<Header> ParseHeader(std::span<const uint8_t> bytes);
Result<Regions> ParseRegionTable(std::span<const uint8_t> bytes);
// `region`: the metadata region, or as much of it as there is.
Result<Disk> ParseMetadata(std::span<const uint8_t> region);

}  // namespace kvartz::block::vhdx
