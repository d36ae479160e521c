// On-disk structures of VHD. Spec: "Virtual Hard Disk Image Format Specification", version 1.0
// (Microsoft, October 2006); all fields big-endian.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "base/endian.h"
#include "base/result.h"

namespace kvartz::block::vpc {

constexpr uint32_t kSector = 512;
constexpr uint32_t kFixed = 2, kDynamic = 3, kDifferencing = 4;  // "Disk Type"
constexpr uint32_t kFree = 0xffffffff;                           // "Block Allocation Table"
constexpr uint64_t kNoOffset = UINT64_MAX;

// "Hard Disk Footer Format": the last sector; dynamic disks have a copy at 0.
struct Footer {
  std::array<char, 8> cookie;  // "conectix"
  Be32 features;
  Be32 version;      // 0x00010000
  Be64 data_offset;  // of the dynamic header; kNoOffset: fixed
  Be32 timestamp;    // seconds since 2000-01-01 UTC
  std::array<char, 4> creator_application;
  Be32 creator_version;
  std::array<char, 4> creator_host_os;
  Be64 original_size;
  Be64 current_size;  // bytes
  Be16 cylinders;     // "Disk Geometry"
  uint8_t heads;
  uint8_t sectors_per_track;
  Be32 disk_type;
  Be32 checksum;  // ones' complement of the sum of all other bytes
  std::array<uint8_t, 16> unique_id;
  uint8_t saved_state;
  std::array<uint8_t, 427> reserved;
};
static_assert(sizeof(Footer) == 512);

// "Dynamic Disk Header Format".
struct DynamicHeader {
  std::array<char, 8> cookie;  // "cxsparse"
  Be64 data_offset;            // unused, kNoOffset
  Be64 table_offset;           // of the block allocation table
  Be32 header_version;         // 0x00010000
  Be32 max_table_entries;
  Be32 block_size;  // bytes of data, without the bitmap
  Be32 checksum;
  std::array<uint8_t, 16> parent_unique_id;
  Be32 parent_timestamp;
  Be32 reserved;
  std::array<uint8_t, 512> parent_name;  // UTF-16, big-endian
  std::array<uint8_t, 192> parent_locators;
  std::array<uint8_t, 256> reserved2;
};
static_assert(sizeof(DynamicHeader) == 1024);

uint32_t Checksum(std::span<const uint8_t> bytes);  // of a structure whose checksum is 0

// Errors name what is wrong. The checksum, too.
Result<Footer> ParseFooter(std::span<const uint8_t> bytes);
Result<DynamicHeader> ParseDynamicHeader(std::span<const uint8_t> bytes);
// For messages: characters other than ASCII's are question marks.
std::string ParentName(const DynamicHeader& header);

struct Geometry {
  uint16_t cylinders = 0;
  uint8_t heads = 0;
  uint8_t sectors_per_track = 0;
  uint64_t sectors() const { return uint64_t{cylinders} * heads * sectors_per_track; }
};
// "Appendix: CHS Calculation". A disk larger than 65535*16*255 sectors gets that.
Geometry GeometryOf(uint64_t sectors);
// The disk's size in bytes, by its maker: some mean the geometry, others the size itself.
uint64_t DiskSize(const Footer& footer);

}  // namespace kvartz::block::vpc
